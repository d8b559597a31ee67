"""All that a rented GPU can tell in a few minutes: ``python -m perf --all --minutes 9``.

Checks run beside each other; then what is timed runs alone, the most telling first. Every stage is a process with a
limit, so that a crash or a hang costs nobody else's rows. Rows go to the results file as they come, what the programs
print to a log beside it.
"""

import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch

from perf.measure import Bench
from perf.results import Writer, read
from perf.run import Selection, measure_jobs, missing, order
from perf.stages import sanitize
from perf.stages.programs import GRACE, ROOT, Program, Run, Verdict, mend, module

SPARE = 10.0
"""Seconds that a stage that stops by itself has left at its limit: for imports, and to end its last job."""
LEAST = 12.0
"""Seconds left below which no stage is begun."""
REPORT = 5.0
"""Seconds at the end for the table."""
VERIFIED = (
    "--rule", "adamw", "--dtype", "float32", "--dtype", "bfloat16", "--formats", "int8", "--formats", "split16",
    "--formats", "split8", "--formats", "split8+int8",
)  # fmt: skip
"""What is measured; the GPU tests have every rule."""
TOO_LONG = ("test_accuracy.py",)
"""Everything that `fusedopt verify` knows, compiled."""


# Stages ------------------------------------------------------------------------------------------------------------


def checks(run: Run, seconds: float) -> None:
    """Correctness, GPU tests and the sanitizer's tools, on as many cores as there are."""
    programs = [correctness(run.device, seconds)]
    if run.device == "cuda":
        programs.append(tests(seconds))
        for tool in sanitize.TOOLS:
            program = sanitize.program(tool, seconds)
            if program is None:
                run.note(f"sanitizer: {tool}", Verdict(None, "compute-sanitizer is not present"))
            else:
                programs.append(program)
    run.carry_out(programs)


def correctness(device: str, seconds: float) -> Program:
    """`fusedopt verify` of what is measured."""
    backends = ("eager", "compiled") if device == "cuda" else ("eager",)
    asked = [argument for name in backends for argument in ("--backend", name)]
    return Program("correctness", module("fusedopt.cli", "verify", *VERIFIED, *asked), seconds, judge=judge_verify)


def judge_verify(status: int, output: str) -> Verdict:
    """The line that sums up each of its parts."""
    return Verdict(status == 0, "; ".join(re.findall(r"(?:PASSED|FAILED): [^,\n]*", output)) or _last(output))


def tests(seconds: float) -> Program:
    """What is marked for GPUs."""
    files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*.py")) if _for_gpus(path)]
    workers = ["-n", str(max(2, min(8, (os.cpu_count() or 2) // 2)))] if importlib.util.find_spec("xdist") else []
    options = ["-q", "-m", "gpu", "--tb=short", "--continue-on-collection-errors", *workers]
    compiled = {"FUSEDOPT_TEST_MODE": "compiled"}
    return Program("GPU tests", module("pytest", *options, *files), seconds, compiled, judge_tests)


def _for_gpus(path: Path) -> bool:
    return "pytest.mark.gpu" in path.read_text() and path.name not in TOO_LONG


def judge_tests(status: int, output: str) -> Verdict:
    """pytest's closing line. 5 is its status when no test was selected."""
    return Verdict(None if status == 5 else status == 0, f"{_last(output)}, without {', '.join(TOO_LONG)}")


def _last(output: str) -> str:
    return (output.strip().splitlines() or ["no output"])[-1].strip("= ")


def measured(run: Run, seconds: float, name: str = "measurements") -> None:
    """Jobs that have no row yet. After a crash a new process goes on behind the job that it happened in."""
    end = time.monotonic() + seconds
    while True:
        limit = end - time.monotonic()
        before = run.known
        more = ("--begun", run.first, "--lost", run.lost)
        (ended,) = run.carry_out([own(run, "perf.everything", name, limit, *more)])
        if ended.status is not None and ended.status < 0:  # killed by a signal: nothing tells of its last job
            run.lost += 1
        elif not ended.status or run.known <= before + 1:
            return
        if end - time.monotonic() < 2 * SPARE:
            return
        name = f"{name.removesuffix(', again')}, again"


def training(run: Run, seconds: float) -> None:
    """Of a model of two layers where there is no GPU."""
    tiny = () if run.device == "cuda" else ("--tiny",)
    run.carry_out([own(run, "perf.stages.training_step", "training step", seconds, *tiny)])


def first(run: Run, seconds: float) -> None:
    """Of GPT-2, or of something small where there is no GPU."""
    case = "gpt2" if run.device == "cuda" else "tiny-1000"
    run.carry_out([own(run, "perf.stages.first_step", "first step", seconds, "--case", case)])


def tuning(run: Run, seconds: float) -> None:
    """Launch shapes."""
    if run.device == "cpu":
        return run.note("tuning", Verdict(None, "needs a GPU"))
    minutes = ("--minutes", f"{_asked(seconds) / 60:.3f}", "--out", run.writer.path)
    run.carry_out([Program("tuning", module("perf.tune", *minutes), seconds, partial=True)])


def rest(run: Run, seconds: float) -> None:
    """As many jobs as the time allows."""
    measured(run, seconds, "further measurements")


def own(run: Run, name: str, title: str, seconds: float, *more: object) -> Program:
    """A program of perf/ that writes rows and is told when to stop."""
    told = ("--out", run.writer.path, "--device", run.device, "--seconds", f"{_asked(seconds):.2f}", *more)
    return Program(title, module(name, *told), seconds, partial=True)


def _asked(seconds: float) -> float:
    return max(seconds - SPARE, seconds / 2)


Stage = Callable[[Run, float], None]
PLAN: tuple[tuple[Stage, float], ...] = (
    (checks, 0.2), (measured, 0.38), (training, 0.08), (first, 0.12), (tuning, 0.1), (rest, 1.0),
)  # fmt: skip
"""With the share of all the time that each may take; what one leaves is the last one's."""


# The run -----------------------------------------------------------------------------------------------------------


def main(minutes: float, out: Path, device: str) -> int:
    """Carry out `PLAN`. Returns 0 if every stage that ran was ok, and one did, else 1; 2 for a file of something else;
    128 and more for a signal.
    """
    out = out.resolve()
    try:
        mend(out)
        run = Run(Writer(out), device, 60 * minutes - REPORT)
    except (ValueError, OSError) as error:
        print(f"perf: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a background job would else ignore it
    signal.signal(signal.SIGTERM, _terminate)
    try:
        missing(run.writer)
        stopped = _carry_out(run)
        _report(run)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return stopped or int(any(row["ok"] is False for row in run.stages) or all(row["ok"] is None for row in run.stages))


def _carry_out(run: Run) -> int:
    """All stages, each whatever became of the others. Returns the status of whoever ended it from outside, or 0."""
    for stage, share in PLAN:
        limit = min(share * run.seconds, run.left - GRACE)
        try:
            if limit < LEAST:
                run.note(stage.__name__, Verdict(None, "no time was left"))
            else:
                stage(run, limit)
        except KeyboardInterrupt:
            return 128 + signal.SIGINT
        except SystemExit as end:
            return int(end.code or 0)
        except Exception as failure:  # of the stage's own code; the next ones still run
            run.note(stage.__name__, Verdict(False, f"{type(failure).__name__}: {' '.join(str(failure).split())}"))
    return 0


def _terminate(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _report(run: Run) -> None:
    """The short table; it is the rows that count, so it fails by itself."""
    mend(run.writer.path)
    try:
        from perf import report

        report.short(run.rows())
    except Exception as failure:  # whatever it is: rows and stages are written
        print(f"no table: {type(failure).__name__}: {failure}")
    print(f"{len(run.rows()) - run.first} rows in {run.writer.path}, output of programs in {run.log}")


@click.command("perf.everything", help="The process in which `python -m perf --all` measures.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), required=True)
@click.option("--seconds", type=float, required=True)
@click.option("--begun", type=int, required=True, help="Rows of the file that are older than this run.")
@click.option("--lost", type=int, required=True, help="Jobs to leave out of those that have no row.")
def measure(out: Path, device: str, seconds: float, begun: int, lost: int) -> None:
    deadline = time.monotonic() + seconds
    rows = [row for row in read(out)[begun:] if row["kind"] in ("measured", "red")] if out.exists() else []
    done = {tuple(row.get(name) for name in ("case", "format", "work", "graph")) for row in rows}
    keys = list(order(device, Selection()))
    left_out = [key for key in keys if key in done] + [key for key in keys if key not in done][:lost]

    def tell(line: str) -> None:
        print(line, flush=True)
        if device == "cuda":
            torch.cuda.synchronize()  # a kernel that failed ends this process: all that follows would fail too

    bench = Bench.on(Writer(out), device)
    bench.checked |= {(r["contender"], r["format"], r["work"]): r["why"] for r in rows if r.get("wrong")}
    measure_jobs(bench, deadline, tell=tell, skip=left_out)


if __name__ == "__main__":
    measure()
