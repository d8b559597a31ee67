"""The report in few lines, for the terminal on which a run ends."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from perf.report.rows import FUSED, Beside, beside, by_place, longer, newest, of, steps, work
from perf.report.sections import step
from perf.report.shown import number, percent, times
from perf.report.targets import verdicts
from perf.results import Row

WIDTH = 120


class Part(NamedTuple):
    """A table for the terminal. most: lines that are shown."""

    title: str
    columns: tuple[str, ...]
    lines: list[tuple[str, ...]]
    most: int


def short(rows: Sequence[Row]) -> None:
    """Print targets, times beside torch's fused ones and the best other's, and without a GPU what machine code says. At
    most 40 lines.
    """
    console = Console(highlight=False)
    if not console.is_terminal or console.width < WIDTH:
        console = Console(highlight=False, width=WIDTH)
    place_of = {id(row): i for i, row in enumerate(rows)}
    now = sorted(newest(rows), key=lambda row: place_of[id(row)])  # what is measured first tells most
    for part in _parts(now):
        table = Table(title=part.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for i, column in enumerate(part.columns):
            table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True, header_style="dim")
        for line in part.lines[: part.most]:
            table.add_row(*line)
        console.print(table)
        if len(part.lines) > part.most:
            console.print(f"… and {len(part.lines) - part.most} more", style="dim")
        console.print()
    for line in _troubles(now):
        console.print(line[: 2 * WIDTH], markup=False, soft_wrap=True)


def _parts(rows: list[Row]) -> Iterator[Part]:
    on_gpu = of(rows, "measured", device="cuda")
    if lines := [
        (v.target.title, f"≥ {v.target.text(v.limit)}", v.text) for v in verdicts(rows) if v.value is not None
    ]:
        yield Part("Targets on an H200", ("", "limit", ""), lines, 9)
    for where, here in by_place(on_gpu or of(rows, "measured")).items():
        columns = ("", "device ms", "wall ms", "of copy", FUSED, "its wall", "best other")
        lines = [_cells(line) for line in beside(here)]
        yield Part(f"fusedopt on {where}, and how many times as long others take", columns, lines, 18 if on_gpu else 6)
    if on_gpu:
        return
    columns = ("", "launches", "B/param", "instructions/param", "registers", "spills", "widths, bit")
    lines = [(f"{form} {work(k[0])}", *step(k)) for (form, job, arch), k in steps(rows).items() if arch == "sm_90"]
    if lines:
        yield Part("Compiled for sm_90", columns, lines, 9)


def _cells(line: Beside) -> tuple[str, ...]:
    row, fused, best = line
    name = " ".join((row["case"], row["format"], row["work"], *(["graph"] if row.get("graph") else [])))
    found = (number(row.get("device_ms")), number(row.get("wall_ms")), percent(row.get("share")))
    others = [times(longer(fused, row, field)) if fused else "" for field in ("device_ms", "wall_ms")]
    return (name, *found, *others, f"{times(longer(best, row))} {best['contender'][:24]}" if best else "")


def _troubles(rows: list[Row]) -> Iterator[str]:
    """What failed and what is missing, a line each."""
    failed = [f"{row.get('name')}: {row.get('line', '')}" for row in of(rows, "stage") if row.get("ok") is False]
    red = [
        f"{row.get('contender')} ({row.get('case', row.get('arch', ''))}): {row.get('why')}" for row in of(rows, "red")
    ]
    missing = [str(row.get("contender")) for row in of(rows, "missing")]
    for title, found in (("FAILED", failed), ("red", red), ("not installed", missing)):
        if found:
            yield f"{title}: {'; '.join(found)}"
