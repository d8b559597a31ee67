"""The first step in a new process, with nothing compiled before and with what that process left in the caches:
``python -m perf.stages.first_step``. Timed from making the optimizer, which compiles in some packages, until the device
is done; imports are timed apart, and the context of the GPU and the parameters exist before.
"""

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch

from perf import check
from perf.cases import CASES
from perf.contenders import CONTENDERS, Contender, Setup
from perf.instances import Job, parameters
from perf.results import RESULTS, Row, Writer
from perf.stages.programs import Program, alone
from perf.work import FORMATS, WORKS

FIRST = (
    ("fusedopt", "fp32", "clip"),
    ("torch fused", "fp32", "clip"),
    ("fusedopt", "int8", "clip"),
    ("torch.compile of clip + step", "fp32", "clip"),
    ("fusedopt", "bf16", "clip"),
    ("torch foreach", "fp32", "clip"),
)
"""(contender, format, work); then all the rest."""

CACHES: tuple[str, ...] = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "CUDA_CACHE_PATH")
LONGEST = 300.0
"""Seconds that a process may take."""
SHORTEST = 15.0
"""Seconds left below which none is begun."""

CHILD = """
import sys, time
begin = time.perf_counter()
import torch, torch._dynamo  # the latter is imported by the first optimizer, whosever it is
from importlib import import_module
getattr(import_module(sys.argv[1]), "AdamW", None)  # ours is imported when it is asked for
seconds = time.perf_counter() - begin
from perf.stages import first_step
first_step.child(seconds, *sys.argv[2:])
"""
"""Times the imports before anything of perf/ imports them."""


def rows(writer: Writer, device: str, deadline: float, case: str = "gpt2") -> list[Row]:
    """A row for each of `jobs` that `time.monotonic()` leaves time for."""
    made = []
    for contender, job in jobs(device, case):
        try:
            made.append(_row(writer, contender, job, deadline))
        except TimeoutError:
            print(f"out of time: the rest from {contender.name}, {job.form.name}, {job.work.name} on was not measured")
            break
        print(line(made[-1]), flush=True)
    return made


def jobs(device: str, case: str = "gpt2") -> Iterator[tuple[Contender, Job]]:
    """Who does what, the most telling first."""
    fitted = CASES[case].fitted(math.inf)
    assert fitted is not None
    others = (key for key in product(CONTENDERS, FORMATS, WORKS) if key not in FIRST)
    for name, form, work in (*FIRST, *others):
        job = Job(fitted, FORMATS[form], WORKS[work], device)
        if CONTENDERS[name].installed and CONTENDERS[name].takes(job.form, job.work, device):
            yield CONTENDERS[name], job


def _row(writer: Writer, contender: Contender, job: Job, deadline: float) -> Row:
    """Of two processes that share a folder of caches, empty for the first. The second one's result is checked."""
    about = {name: value for name, value in job.identity().items() if name != "graph"}
    try:
        with tempfile.TemporaryDirectory(prefix="fusedopt-first-") as caches:
            cold, warm = (_timed(contender, job, deadline, caches, checked) for checked in (False, True))
        allowed = contender.tolerance(job.form)
        if not warm["error"] <= allowed:
            raise ArithmeticError(f"off by {warm['error']:.3g} of the change, {allowed:g} allowed")
    except ArithmeticError as failure:
        return writer.add("red", contender=contender.name, **about, why=f"first step: {failure}")
    seconds = {"cold_s": cold["seconds"], "warm_s": warm["seconds"], "import_s": warm["import_s"]}
    rounded = {name: round(value, 4) for name, value in seconds.items()}
    return writer.add("first", contender=contender.name, **about, **rounded)


def _timed(contender: Contender, job: Job, deadline: float, caches: str, checked: bool) -> dict[str, Any]:
    """What `child` printed in a new process.

    Raises:
        TimeoutError: there is no time for it. ArithmeticError: it did not end well.
    """
    left = min(LONGEST, deadline - time.monotonic())
    if left < SHORTEST:
        raise TimeoutError
    names = (contender.name, job.form.name, job.work.name, job.fitted.case.name, job.device, *(["check"] * checked))
    command = [sys.executable, "-c", CHILD, contender.package, *names]
    with tempfile.TemporaryDirectory() as folder:
        ended = alone(Program("first step", command, left, dict.fromkeys(CACHES, caches)), Path(folder))
    found = [text for text in ended.output.splitlines() if text.startswith("{")]
    if ended.status is None and left < LONGEST:
        raise TimeoutError
    if ended.status != 0 or not found:
        raise ArithmeticError(ended.verdict.line[:200])
    return json.loads(found[-1])


def child(import_s: float, contender: str, form: str, work: str, case: str, device: str, *checked: str) -> None:
    """Time the first step of this process and print the seconds as JSON; if asked, how wrong the contender is, too."""
    fitted = CASES[case].fitted(math.inf)
    assert fitted is not None
    entry, setting = CONTENDERS[contender], (FORMATS[form], WORKS[work])
    params = parameters(fitted.shapes, FORMATS[form], device)
    _wait(device)
    begin = time.perf_counter()
    step = entry.make(Setup(params, *setting))
    step()
    _wait(device)
    seconds = time.perf_counter() - begin
    error = check.error(entry, *setting, device) if checked else None
    print(json.dumps({"seconds": seconds, "import_s": import_s, "error": error}))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def line(row: Row) -> str:
    """A row for the terminal."""
    head = f"{row['contender']:38}{row['format']:6}{row['work']:6}"
    if row["kind"] == "red":
        return f"{head}{row['why']}"
    return f"{head}{row['cold_s']:8.2f} s cold{row['warm_s']:8.2f} s warm{row['import_s']:8.2f} s to import"


@click.command("perf.stages.first_step", help=__doc__)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--case", type=click.Choice(tuple(CASES)), default="gpt2", show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=600.0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "first-step.jsonl")
def main(device: str, case: str, seconds: float, out: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("torch sees no GPU here; --device cpu")
    rows(Writer(out), device, time.monotonic() + seconds, case)


if __name__ == "__main__":
    main()
