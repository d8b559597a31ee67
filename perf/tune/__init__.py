"""`python -m perf.tune`: tries launch shapes, says which rows of `fusedopt_kernels/tuning.py` should change, and writes
the tables of the note.

With a GPU they are measured. Without one they are compiled for GPUs and read; what follows then is a prediction.
"""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

from fusedopt_kernels import numerics
from perf import marked
from perf.clock import Clock, CudaClock
from perf.results import RESULTS, Row, Writer, read
from perf.tune import choice as tune_choice
from perf.tune import code as tune_code
from perf.tune import text as tune_text
from perf.tune import timing as tune_time
from perf.tune.trials import PRESENT, TRIALS, Candidate, candidates

NOTE = Path(__file__).parents[1] / "notes" / "tuning.md"
CODE = "<!-- tune, code: begin -->", "<!-- tune, code: end -->"
TIMES = "<!-- tune, times: begin -->", "<!-- tune, times: end -->"
"""Markers of the note's tables."""

HELP = """Try launch shapes: blocks, tails, warps, chunks, persistent grids, state in one buffer.

With a GPU they are timed beside the present ones; without, compiled for GPUs and read. What should change is printed,
and nothing is changed.
"""


def _path(name: str, text: str, **more: bool) -> Any:
    return click.option(name, type=click.Path(dir_okay=False, path_type=Path, **more), metavar="FILE", help=text)


@click.command("perf.tune", help=HELP)
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=5.0, show_default=True,
              help="With a GPU: begin no measurement later than this.")  # fmt: skip
@click.option("--row", "kinds", multiple=True, type=click.Choice(tuple(TRIALS)), metavar="NAME",
              help=f"Only this row of the table (repeatable): {', '.join(TRIALS)}.")  # fmt: skip
@click.option("--arch", "architectures", multiple=True, type=click.Choice(tuple(tune_code.CHIPS)), metavar="NAME",
              help=f"Without a GPU: read all for this architecture (repeatable): {', '.join(tune_code.CHIPS)}.  "
              f"[default: all for {tune_code.MAIN}, the present for the others]")  # fmt: skip
@click.option("--only", default="", metavar="TEXT", help="Only the present, and candidates with this in their names.")
@_path("--out", "Append rows to this file, and leave the note alone.  [default: begin perf/results/tuning*.jsonl anew]")
@_path("--show", "Try nothing: show what the rows of this file say, and put it into the note.", exists=True)
@_path("--note", "Another note than perf/notes/tuning.md.")
def main(
    minutes: float, kinds: tuple[str, ...], architectures: tuple[str, ...], only: str, out: Path | None,
    show: Path | None, note: Path | None,
) -> None:  # fmt: skip
    if show is not None:
        try:
            sys.exit(tell(read(show), note or NOTE))
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    if numerics.INTERPRETED:
        raise click.UsageError("launch shapes are of compiled kernels: unset TRITON_INTERPRET")
    has_gpu, whole = torch.cuda.is_available(), not (kinds or architectures or only or out)
    out = out or default_out(has_gpu)
    if whole:
        out.unlink(missing_ok=True)
    writer = Writer(out)
    if has_gpu:
        measure(writer, kinds or tuple(TRIALS), only, time.monotonic() + 60 * minutes)
    else:
        click.echo("no GPU: reading compiled code")
        tune_code.rows(writer, kinds or tuple(TRIALS), architectures, only)
    status = tell(writer.rows, note or NOTE if whole else note)
    click.echo(f"\n{len(writer.rows)} rows in {out}")
    sys.exit(status)


def default_out(has_gpu: bool) -> Path:
    """A file for each GPU, and one for what was only compiled."""
    gpu = f"-{torch.cuda.get_device_name().lower().replace(' ', '-')}" if has_gpu else ""
    return RESULTS / f"tuning{gpu}.jsonl"


def measure(
    writer: Writer, kinds: Sequence[str], only: str, deadline: float, clock: Clock | None = None, device: str = "cuda"
) -> None:
    """Each candidate alone, then what was best together."""
    if device == "cuda":
        tune_time.compile_ahead(kinds, only, deadline)
    clock, jobs = clock or CudaClock(), tune_time.order(kinds)
    tune_time.rows(writer, jobs, deadline, clock, lambda kind: candidates(kind, only), device, click.echo)
    best = {kind: tune_choice.combination(kind, writer.rows) for kind in kinds}
    jobs = [(kind, case) for kind, case in jobs if best[kind] is not None]
    tune_time.rows(writer, jobs, deadline, clock, lambda kind: _together(kind, best), device, click.echo)


def _together(kind: str, best: Mapping[str, Candidate | None]) -> dict[str, Candidate]:
    found = {PRESENT: candidates(kind)[PRESENT], "the best together": best[kind]}
    return {name: candidate for name, candidate in found.items() if candidate is not None}


def tell(rows: Sequence[Row], note: Path | None) -> int:
    """Print tables and the lines to change; put the tables into the note. Returns 1 if nothing was found out."""
    for row in rows:
        if row["kind"] == "red" and "row" in row:
            click.echo(f"red: {row['row']}, {row['name']}: {row['why']}")
    tuned = [row for row in rows if row["kind"] == "tune"]
    timed = [row for row in tuned if "ratio" in row]
    compiled = [row for row in tuned if "ratio" not in row]
    for found, text, markers in ((compiled, tune_text.of_code, CODE), (timed, tune_text.of_times, TIMES)):
        if found:
            written = text(found)
            click.echo(f"\n{written}")
            if note is not None:
                marked.write(note, written, markers, "Launch shapes")
    return 0 if tuned else 1
