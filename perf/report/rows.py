"""Rows of results, chosen, ordered and named for reports."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from perf.cases import CASES
from perf.report.shown import OURS, Spread, inverse, median, place, spread, versions
from perf.results import Row, identity
from perf.work import FORMATS, WORKS

FUSED = "torch fused"
GPU = "H200"
"""What predictions, plots and targets are about; a part of the name that its driver tells."""


def newest(rows: Iterable[Row]) -> list[Row]:
    """The newest row about each thing on each machine, in the order of cases, formats and works; ours first, then the
    fastest. What has been measured since is red no more.
    """
    found = {(place(row), identity(row)): row for row in rows}
    cured = {(where, "red", *key[1:]) for where, key in found if key[0] == "measured"}
    kept = [row for (where, key), row in found.items() if (where, *key) not in cured]
    return sorted(kept, key=_order)


def _order(row: Row) -> tuple[Any, ...]:
    def at(table: Iterable[str], name: Any) -> int:
        return list(table).index(name) if name in table else len(list(table))

    rank = (at(CASES, row.get("case")), at(FORMATS, row.get("format")), at(WORKS, row.get("work")))
    fastest = next((m for name in ("device_ms", "host_us") if (m := median(row.get(name))) is not None), 0.0)
    return (*rank, bool(row.get("graph")), row.get("arch") or "", row.get("contender") != OURS, fastest)


def of(rows: Iterable[Row], kind: str, **wanted: Any) -> list[Row]:
    """Rows of a kind with these values."""
    return [row for row in rows if row["kind"] == kind and all(row.get(k) == v for k, v in wanted.items())]


def work(row: Row) -> str:
    """Its work in words."""
    name = row.get("work", "")
    return f"{WORKS[name].title if name in WORKS else name}{', graph' if row.get('graph') else ''}"


def who(row: Row) -> str:
    """Its contender, ours in bold."""
    return f"**{OURS}**" if row.get("contender") == OURS else str(row.get("contender", ""))


def predictions(rows: Iterable[Row]) -> list[Row]:
    """What a model says of `GPU`."""
    return [row for row in of(rows, "predicted") if row.get("hardware", GPU) == GPU]


def by_place(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by machine."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(place(row), []).append(row)
    return found


def provenance(rows: Iterable[Row]) -> str:
    """Versions and commits of rows."""
    return "; ".join(dict.fromkeys(filter(None, map(versions, rows))))


JOB = ("device", "case", "part", "tensors", "format", "work", "graph")
"""Fields of what several contenders did in turn."""


TURNS = {("measured", "device_ms"): "ratio", ("measured", "wall_ms"): "ratio_wall", ("host", "host_us"): "ratio"}
"""(kind, time) → where a row of another contender holds our time to its own, within rounds."""


def longer(other: Row, mine: Row, field: str = "") -> Spread | None:
    """How many times as long the other takes: within rounds if they took turns, else of medians, as wide as the
    percentiles allow. field: a time, by default that of the device, in rows of kind host that of Python.
    """
    field = field or ("host_us" if mine["kind"] == "host" else "device_ms")
    turn = TURNS.get((mine["kind"], field), "")
    if all(other.get(name) == mine.get(name) for name in JOB) and (found := inverse(other.get(turn))):
        return found
    a, b = spread(mine.get(field)), spread(other.get(field))
    if a is None or b is None or min(a) <= 0:
        return None
    return Spread(b.p20 / a.p80, b.median / a.median, b.p80 / a.p20)


class Beside(NamedTuple):
    """What ours did, and others in turn with it. best: the fastest that is not `FUSED`."""

    mine: Row
    fused: Row | None
    best: Row | None


def beside(rows: Iterable[Row]) -> Iterator[Beside]:
    """For each row of ours among those of one machine and kind."""
    rows = list(rows)
    for mine in (row for row in rows if row.get("contender") == OURS):
        job = {name: mine.get(name) for name in JOB}
        others = [r for r in of(rows, mine["kind"], **job) if r is not mine and longer(r, mine) is not None]
        fused = next((r for r in others if r["contender"] == FUSED), None)
        rest = (r for r in others if r is not fused)
        yield Beside(mine, fused, min(rest, key=lambda r: median(longer(r, mine)) or 0.0, default=None))


def steps(rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """(format, work, arch) → rows of the kernels of a step of ours, from machine code: of aligned full chunks."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in of(rows, "code"):
        if row.get("chunk") not in (None, "full"):
            continue
        found.setdefault((row.get("format"), row.get("work"), row.get("arch")), []).append(row)
    return found
