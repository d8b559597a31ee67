"""`python -m perf`: measure, predict and count; compare two runs. Exit status: 1 for a regression or a failed stage."""

import math
import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from perf.cases import CASES
from perf.contenders import CONTENDERS
from perf.results import RESULTS
from perf.run import Selection
from perf.work import FORMATS, WORKS

OUT = """Results file, to which rows are appended.  [default: in perf/results, no-gpu.jsonl, which is begun anew, or
gpu-NAME-DATE.jsonl]"""
HELP = """Measure fusedopt beside other optimizers and write the rows to a file.

\b
With a GPU: times, launches, memory, shares of the bandwidth of a copy, the most telling cases first.
Without: bytes, instructions and registers of the kernels, host time with launches stubbed, the eager backend
against torch's CPU optimizers, and what a bandwidth model predicts for GPUs. Without a choice of what to measure,
perf/REPORT.md and the plots are written, too.

\b
Examples:
  python -m perf
  python -m perf --all --minutes 9            # on a rented GPU: tests, sanitizer, measurements
  python -m perf --case gpt2 --work clip --contender "torch fused" --minutes 1
  python -m perf --compare perf/results/before.jsonl perf/results/after.jsonl
"""


def _names(option: str, short: str, known: Any, what: str) -> Any:
    return click.option(
        option, short, multiple=True, type=click.Choice(tuple(known)), metavar="NAME", help=f"Only {what} (repeatable)."
    )


@click.command("perf", help=HELP)
@_names("--case", "cases", CASES, f"this case: {', '.join(CASES)}")
@_names("--format", "formats", FORMATS, f"this format: {', '.join(FORMATS)}")
@_names("--work", "works", WORKS, f"this work: {', '.join(f'{w.name} ({w.title})' for w in WORKS.values())}")
@_names("--contender", "contenders", CONTENDERS, "these beside ours, by the names that --list shows")
@click.option("--graph/--no-graph", default=None, help="Only steps in CUDA graphs, or none.  [default: both]")
@click.option("--device", type=click.Choice(["auto", "cuda", "cpu"]), default="auto", show_default=True)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), help="Stop beginning new jobs in time.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help=OUT)
@click.option("--all", "everything", is_flag=True, help="Tests, sanitizer and tuning too: for a rented GPU.")
@click.option("--list", "listing", is_flag=True, help="List cases, formats and contenders, and what is missing.")
@click.option(
    "--compare", nargs=2, type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="A B",
    help="Show what got worse from results file A to B.",
)  # fmt: skip
def main(everything: bool, listing: bool, compare: tuple[Path, Path] | None, **given: Any) -> None:
    selection = Selection(*(given[name] for name in ("cases", "formats", "works", "contenders", "graph")))
    if compare:
        from perf.report import regressions

        sys.exit(regressions.main(*compare))
    if listing:
        return show()
    device = _device(given["device"])
    minutes = given["minutes"]
    if minutes is not None and not math.isfinite(minutes):
        raise click.UsageError("--minutes takes a number of minutes")
    if device == "cpu" and given["graph"]:
        raise click.UsageError("--graph needs a GPU")
    if everything:
        from perf import everything as all_of_it

        if not selection.is_empty:
            raise click.UsageError("--all chooses what is measured: leave out --case, --format, --work and the like")
        sys.exit(all_of_it.main(minutes or 9.0, _out(given["out"], device), device))
    deadline = time.monotonic() + 60 * minutes if minutes else float("inf")
    sys.exit(one(device, selection, deadline, _out(given["out"], device)))


def one(device: str, selection: Selection, deadline: float, out: Path) -> int:
    """Measure on a device; on the CPU without a selection, everything that needs no GPU. Then report."""
    from perf import report
    from perf.measure import Bench
    from perf.results import Writer
    from perf.run import measure_jobs, missing

    try:
        writer = Writer(out)
        missing(writer, selection)
    except OSError as error:
        raise click.UsageError(f"--out {out}: {error.strerror or error}") from None
    if device == "cpu" and selection.is_empty:
        from perf import no_gpu

        no_gpu.rows(writer, deadline)
    measure_jobs(Bench.on(writer, device), deadline, selection)
    if selection.is_empty:
        kept = (path for path in sorted(RESULTS.glob("gpu-*.jsonl")) if path != out)  # else the report would drop them
        report.write([*kept, out])
    report.short(writer.rows)
    click.echo(f"{len(writer.rows)} rows in {out}")
    return 0


def show() -> None:
    """What there is."""
    for title, table in (("cases", CASES), ("formats", FORMATS), ("works", WORKS)):
        click.echo(f"{title}:")
        for entry in table.values():
            click.echo(f"  {entry.name:16}{entry.title}")
    click.echo("contenders:")
    for contender in CONTENDERS.values():
        where = "" if contender.installed else f"   MISSING: {contender.install}"
        click.echo(f"  {contender.name:40}{'; '.join(f'{k}: {v}' for k, v in contender.formats.items())}{where}")


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("--device cuda: torch sees no GPU here")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _out(path: Path | None, device: str) -> Path:
    """By default a new file for every GPU run, and one that is begun anew where there is none."""
    if path is not None:
        return path
    if device == "cuda":
        gpu = torch.cuda.get_device_name().lower().replace(" ", "-")
        return RESULTS / f"gpu-{gpu}-{time.strftime('%Y-%m-%d-%H%M')}.jsonl"
    out = RESULTS / "no-gpu.jsonl"
    out.unlink(missing_ok=True)
    return out


if __name__ == "__main__":
    main()
