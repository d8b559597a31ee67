"""What became worse between two files of results.

Counts are compared exactly. A time became worse if its median grew by more than `MARGIN` and the new 20th percentile
exceeds the old 80th; one without percentiles, if it grew by more than `LOOSE`. Times of different machines are not
compared at all. Only what is ours can regress; times of others are shown.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from perf.report.shown import OURS, is_number, number, spread
from perf.results import IDENTITY, Row, latest, read

MARGIN, LOOSE = 1.03, 1.25
FEW = 20
"""Lines for what only one of the files has."""

COUNTS = (
    "launches", "bytes", "instructions", "registers", "spills", "stack", "barriers", "held_bytes", "peak_bytes",
)  # fmt: skip
PROCESSOR, ALL = ("cpu", "cores", "threads"), ("gpu", "cpu", "cores", "threads")
TIMES = {
    "device_ms": ("gpu",), "host_us": PROCESSOR, "wall_ms": ALL, "gb_s": ("gpu",), "tokens_per_s": ALL,
    "step_ms": ALL, "cold_s": ALL, "warm_s": ALL, "seconds": PROCESSOR,
}  # fmt: skip
"""Field → what of the machine must be the same."""
RATES = ("gb_s", "tokens_per_s")
"""More is better. A measured row's GB/s is its time over again, so only those of copies are compared."""
UNCOMPARED = ("predicted", "missing", "red", "stage")
"""Kinds without numbers that were measured; of red and stage it is their being there, or ok, that counts."""


@dataclass(frozen=True)
class Change:
    """Of one field of one thing. verdict: "regression", "improvement", or "theirs" for what is not ours."""

    what: str
    field: str
    before: str
    after: str
    verdict: str


@dataclass
class Comparison:
    """refused: why times were not compared. only_a, only_b: things that one file has."""

    changes: list[Change] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    compared: int = 0

    @property
    def regressions(self) -> list[Change]:
        """What became worse."""
        return [change for change in self.changes if change.verdict == "regression"]

    @property
    def status(self) -> int:
        """Of the process: 1 with regressions, 2 if something could not be compared that should have been."""
        return 1 if self.regressions else 2 if self.refused or not self.compared else 0


def compare(a_rows: Sequence[Row], b_rows: Sequence[Row]) -> Comparison:
    """The newest row about each thing of one file with that of another."""
    a, b = latest(a_rows), latest(b_rows)
    found = Comparison()
    found.only_a = [title(a[key]) for key in a if key not in b]
    found.only_b = [title(b[key]) for key in b if key not in a]
    refused: dict[str, None] = {}
    for key in a.keys() & b.keys():
        for change, why in _differences(a[key], b[key]):
            found.compared += not why
            if change is not None:
                found.changes.append(change)
            if why:
                refused[why] = None
    found.changes += [
        _change(row, "", "measured", f"red: {row.get('why', '')}", worse=True)
        for key, row in b.items()
        if row["kind"] == "red" and ("measured", *key[1:]) in a and ("measured", *key[1:]) not in b
    ]
    found.changes.sort(key=lambda change: (change.verdict != "regression", change.verdict, change.what, change.field))
    found.refused = list(refused)
    return found


def title(row: Row) -> str:
    """What a row is about, in a line."""
    parts = [str(row[name]) for name in IDENTITY if row.get(name) not in (None, False, "whole")]
    return " · ".join("graph" if part == "True" else part for part in parts)


def _ours(row: Row) -> bool:
    return row.get("contender") in (None, OURS)


def _differences(a: Row, b: Row) -> Iterator[tuple[Change | None, str]]:
    """(what changed or None, why it was refused or "") for each field that both have."""
    if a["kind"] == "stage" and a.get("ok") != b.get("ok") and None not in (a.get("ok"), b.get("ok")):
        yield _change(b, "ok", str(a.get("ok")), str(b.get("ok")), worse=not b.get("ok")), ""
    if a["kind"] in UNCOMPARED:
        return
    for name in COUNTS:
        before, after = a.get(name), b.get(name)
        if is_number(before) and is_number(after):
            yield None if before == after else _change(b, name, _exact(before), _exact(after), worse=after > before), ""
    for name, hardware in TIMES.items():
        if a["kind"] == "measured" and a.get("device") == "cpu" and name != "wall_ms":
            continue  # the same number three times
        if spread(a.get(name)) is None or spread(b.get(name)) is None or (name == "gb_s" and a["kind"] != "copy"):
            continue
        there, here = _machine(a, hardware), _machine(b, hardware)
        if there != here:
            yield None, f"{name}: A was measured on {there}, B on {here}"
        else:
            yield _slower(a, b, name), ""


def _slower(a: Row, b: Row, name: str) -> Change | None:
    """A change of a time or rate that its noise does not explain."""
    old, new = spread(a[name]), spread(b[name])
    assert old is not None and new is not None
    noisy = old.p20 < old.p80 or new.p20 < new.p80
    margin = MARGIN if noisy else LOOSE
    rose = new.p20 > old.p80 and new.median > margin * old.median
    fell = new.p80 < old.p20 and old.median > margin * new.median
    if not (rose or fell):
        return None
    after = f"{number(new)} ({new.median / old.median - 1:+.1%})"
    return _change(b, name, number(old), after, worse=(name in RATES) != rose)


def _change(row: Row, name: str, before: str, after: str, worse: bool) -> Change:
    verdict = ("regression" if worse else "improvement") if _ours(row) else "theirs"
    return Change(title(row), name, before, after, verdict)


def _exact(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"


def _machine(row: Row, names: Sequence[str]) -> str:
    machine = row.get("machine") or {}
    return (
        ", ".join(f"{name} {machine[name]}" for name in names if machine.get(name) is not None) or "an unknown machine"
    )


def show(found: Comparison, a: Path, b: Path, console: Console) -> None:
    """Everything, regressions first."""
    console.print(f"A: {a}\nB: {b}\n{found.compared:,} numbers in both", soft_wrap=True)
    for why in found.refused:
        console.print(f"not compared: {why}", soft_wrap=True)
    if found.changes:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("", "what", "number", "A", "B"):
            table.add_column(column, overflow="fold")
        for change in found.changes:
            style = {"regression": "bold red", "improvement": "green"}.get(change.verdict, "dim")
            table.add_row(change.verdict, change.what, change.field, change.before, change.after, style=style)
        console.print(table)
    for name, only in (("A", found.only_a), ("B", found.only_b)):
        for line in only[:FEW]:
            console.print(f"only in {name}: {line}", soft_wrap=True)
        if len(only) > FEW:
            console.print(f"only in {name}: {len(only) - FEW:,} more")
    improvements = sum(change.verdict == "improvement" for change in found.changes)
    console.print(f"{len(found.regressions)} regressions, {improvements} improvements")


def rows_of(path: Path) -> list[Row]:
    """Rows of a file.

    Raises:
        ValueError: it cannot be read, holds none, or a line is damaged; in one line.
    """
    try:
        rows = read(path)
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not text") from None
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    if not rows:
        raise ValueError(f"{path} holds no rows of results")
    if (torn := len(path.read_text().splitlines()) - len(rows)) > 0:
        print(f"{path}: the last line is torn and left out" if torn == 1 else f"{path}: torn", file=sys.stderr)
    return rows


def main(a: str | Path, b: str | Path) -> int:
    """Compare two files and print what changed. Exit status: 0; 1 with regressions; 2 for what cannot be compared."""
    try:
        found = compare(rows_of(Path(a)), rows_of(Path(b)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    console = Console(highlight=False)
    show(found, Path(a), Path(b), console if console.is_terminal else Console(highlight=False, width=160))
    return found.status
