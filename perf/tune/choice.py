"""Which launch shapes rows of kind tune speak for."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fusedopt_kernels import table, tuning
from perf.report.shown import median
from perf.results import Row
from perf.tune.trials import PRESENT, TRIALS, Candidate, candidates

WORTH, LOSS = 0.99, 1.02
"""A measured shape must save 1 % on the average of all cases, and cost no case more than 2 %."""
CLEAR = 0.98
"""A shape that was only compiled must be predicted to save 2 %: less is not to be told from code."""


@dataclass(frozen=True)
class Choice:
    """What a row of the table should hold. name: of the candidate; why: in words."""

    kind: str
    name: str
    shape: tuning.Shape
    why: str

    @property
    def line(self) -> str:
        """Of ``tuning.py``."""
        s = self.shape
        more = f", programs={s.programs}" if s.programs else ""
        more += f', chosen="{s.chosen}"' if s.chosen != tuning.DISASSEMBLY else ""
        return f'"{self.kind}": Shape({s.block}, {s.tail}, {s.warps}{more}),'


def by_row(rows: Iterable[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Rows of kind tune by row of the table."""
    tuned = [row for row in rows if row["kind"] == "tune"]
    for kind in TRIALS:
        if found := [row for row in tuned if row["row"] == kind]:
            yield kind, found


def refused(row: Row) -> str:
    """Why compiled code is not taken; "" if it may be."""
    if row["spills"] or row["stack"]:
        return "spills"
    return "barriers" if row["barriers"] else ""


def predicted(row: Row) -> float:
    """Picoseconds for an element: memory's or issuing's, whichever takes longer."""
    return max(row["memory_ps"], row["issue_ps"])


def rank(row: Row) -> tuple[float, float, int, str]:
    """Equals by instructions, then by registers."""
    return predicted(row), row["instructions"], row["registers"], row["name"]


def from_code(rows: Iterable[Row], arch: str) -> list[Choice]:
    """Of those without spills, and without barriers on full chunks, the one that is predicted to be fastest, if that
    saves 2 %. How long chunks should be is not to be told from code.
    """
    found = []
    for kind, here in by_row(rows):
        read = {row["name"]: row for row in here if row["arch"] == arch and row["chunk"] == table.CHUNK}
        if (present := read.get(PRESENT)) is None:
            continue
        best = min((row for row in read.values() if not refused(row)), key=rank, default=present)
        if not refused(present) and predicted(best) > CLEAR * predicted(present):
            found.append(Choice(kind, PRESENT, tuning.SHAPES[kind], "no other is predicted to save 2 %"))
        else:
            why = f"predicted to take {predicted(best) / predicted(present):.2f} of the present one's time"
            found.append(Choice(kind, best["name"], _shape(best, tuning.DISASSEMBLY), why))
    return found


def from_times(rows: Iterable[Row], gpu: str) -> tuple[list[Choice], int]:
    """For each row of the table the shape with the smallest mean ratio to the present one's time; and how long chunks
    should be, for all together.
    """
    rows = list(rows)
    found = []
    for kind, here in by_row(rows):
        own = [row for row in here if row["chunk"] == table.CHUNK and not row["arena"]]
        name, why = _best(ratios(own))
        row = next((row for row in own if row["name"] == name), None)
        if row is not None:
            found.append(Choice(kind, name, _shape(row, f"measured on {gpu}"), why))
    alone = [r for _, here in by_row(rows) for r in here if r["name"] == PRESENT or r["name"].startswith("chunks of ")]
    chunks = {row["name"]: row["chunk"] for row in alone}
    return found, chunks.get(_best(ratios(alone))[0], table.CHUNK)


def _shape(row: Row, chosen: str) -> tuning.Shape:
    return tuning.Shape(row["block"], row["tail"], row["warps"], row["programs"], chosen)


def ratios(rows: Iterable[Row]) -> dict[str, list[float]]:
    """Name → median ratios to the present one's time, of all cases."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if (ratio := median(row["ratio"])) is not None:
            found.setdefault(row["name"], []).append(ratio)
    return found


def mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, values)) / len(values))


def _best(measured: Mapping[str, Sequence[float]]) -> tuple[str, str]:
    """Name of the fastest of those that were measured in every case, and why it is chosen."""
    whole = max(map(len, measured.values()), default=0)
    able = {name: mean(r) for name, r in measured.items() if max(r) <= LOSS and len(r) == whole}
    best = min(able, key=lambda name: (able[name], name), default=PRESENT)
    if best == PRESENT or able[best] > WORTH:
        return PRESENT, "no other saves 1 % without costing a case 2 %"
    return best, f"takes {able[best]:.3f} of the present one's time"


def combination(kind: str, rows: Iterable[Row]) -> Candidate | None:
    """What was best of blocks, of grids and of chunks, together; None where at most one of them is new."""
    tried = candidates(kind)
    now = tried[PRESENT]
    here = [row for row in rows if row["kind"] == "tune" and row["row"] == kind and row["name"] in tried]

    def best(differs: Sequence[str]) -> Candidate:
        name, _ = _best(ratios(row for row in here if row["name"] in (PRESENT, *differs)))
        return tried[name]

    chunk = best([name for name, c in tried.items() if c.chunk != now.chunk])
    grid = best([name for name, c in tried.items() if c.shape.programs != now.shape.programs])
    shape = best([name for name, c in tried.items() if replace(c.shape, programs=now.shape.programs) != now.shape])
    if sum(candidate != now for candidate in (chunk, grid, shape)) < 2:
        return None
    return Candidate(replace(shape.shape, programs=grid.shape.programs), chunk.chunk)
