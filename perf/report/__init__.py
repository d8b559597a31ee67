"""``perf/REPORT.md`` and the README's section on speed: ``python -m perf.report FILE… [--readme]``.

Sections are there for what rows are there for. A number that a model says, and nobody measured, has the word
"predicted" in its line.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import click

from perf import marked
from perf.report import plots
from perf.report.readme import section
from perf.report.regressions import rows_of
from perf.report.rows import newest
from perf.report.sections import SECTIONS, Section
from perf.report.summary import short
from perf.results import RESULTS, Row

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
MARKERS = ("<!-- speed, by perf.report: begin -->", "<!-- speed, by perf.report: end -->")


def text(rows: Sequence[Row], drawn: Sequence[str], files: Sequence[str]) -> str:
    """The report. drawn: addresses of plots. files: names of what it was made from."""
    now = newest(rows)
    made = f"python -m perf.report {' '.join(files)}"
    head = (
        f"# What was measured\n\nWritten by `{made}`. Rows come from `python -m perf`, "
        "with a GPU from `python -m perf --all --minutes 9`. Medians, with 20th and 80th percentiles where a range "
        "stands; a number from a model has the word predicted beside it."
    )
    parts = [found for make in SECTIONS if (found := _made(make, now))]
    images = [f"![{Path(address).stem}]({address})" for address in drawn]
    return "\n\n".join([head, *parts[:1], *images, *parts[1:]]) + "\n"


def _made(make: Section, rows: list[Row]) -> str:
    """A section, or why there is none: the others matter no less."""
    try:
        return make(rows)
    except Exception as failure:  # of rows that another version wrote, say
        return f"## A section that failed\n\n{type(failure).__name__}: {failure}"


def write(paths: Sequence[Path], readme: Path | None = None) -> Path:
    """Write the report and its plots: beside the folder ``results`` if the first file is in one, else beside that file.

    readme: a file whose section on speed is renewed too. Returns the report's path.

    Raises:
        ValueError: a file cannot be read, holds no rows, or is damaged.
    """
    rows = [row for path in paths for row in rows_of(path)]
    folder = paths[0].parent
    report = (folder.parent if folder.name == RESULTS.name else folder) / "REPORT.md"
    drawn = plots.draw(newest(rows), folder / "plots")
    files = [str(path) for path in map(_within, paths)]
    report.write_text(text(rows, [str(path.relative_to(report.parent)) for path in drawn], files))
    if readme is not None:
        images = [str(path.resolve().relative_to(readme.resolve().parent)) for path in drawn]
        marked.write(readme, section(newest(rows), images), MARKERS, "fusedopt")
    return report


def _within(path: Path) -> Path:
    """From the checkout on: a report names no folder of one machine."""
    path = path.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(path.name)


@click.command("perf.report")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--readme", is_flag=True, help="Renew the section on speed in README.md too; for files of perf/results.")
def main(files: tuple[Path, ...], readme: bool) -> None:
    """Write perf/REPORT.md and plots from FILES of results, later ones over earlier ones, and print a short table."""
    try:
        written = write(files, README if readme else None)
        short([row for path in files for row in rows_of(path)])
    except ValueError as error:
        click.echo(error, err=True)
        sys.exit(2)
    click.echo(f"written: {written}")
