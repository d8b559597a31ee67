"""A whole training step of a real Transformer, whoever steps it: ``python -m perf.stages.training_step``.

The decoder of `fusedopt train` at the size of GPT-2 124M, on random tokens: forward, backward, clipping, step,
gradients freed. fp32 weights under bf16 autocast, bf16 weights as they are. Several steps follow each other without a
wait, as in training, so that Python may run ahead.
"""

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import nn

from fusedopt.train.model import Transformer
from perf.cases import Case, Fitted
from perf.clock import Sample, Times, spread, turns
from perf.contenders import CONTENDERS, FUSEDOPT, Contender, Setup
from perf.instances import Job, launches
from perf.measure import Bench
from perf.results import RESULTS, Row, Writer, in_a_line, rounded
from perf.work import FORMATS, WORKS

STEPS = 3
"""Between two synchronisations."""
ROUNDS = 20

FIRST = (
    ("fusedopt", "fp32"), ("torch foreach", "fp32"), ("torch fused", "fp32"), ("fusedopt", "int8"),
    ("fusedopt", "bf16"), ("torch fused", "bf16"),
)  # fmt: skip
"""(contender, format); then other packages. torch foreach is what torch does by default."""


@dataclass(frozen=True)
class Size:
    """batches: the first that fits is taken."""

    layers: int
    width: int
    heads: int
    sequence: int
    vocabulary: int
    batches: tuple[int, ...]

    def model(self, device: str, dtype: torch.dtype) -> Transformer:
        """`fusedopt train` reads bytes; this one has an embedding of its own, tied as there."""
        torch.manual_seed(0)
        with torch.device(device):
            model = Transformer(self.width, self.layers, self.heads, self.sequence, dropout=0.0)
            model.embedding = nn.Embedding(self.vocabulary, self.width)
            model.head = nn.Linear(self.width, self.vocabulary, bias=False)
        nn.init.normal_(model.embedding.weight, std=0.02)
        model.head.weight = model.embedding.weight
        return model.to(dtype)

    def fitted(self) -> Fitted:
        """Its parameters as a case."""
        model = self.model("meta", torch.float32)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        title = f"decoder, {self.layers} layers of {self.width}"
        return Fitted(Case(f"decoder-{self.layers}x{self.width}", title, lambda: shapes), shapes, "whole")


FULL = Size(12, 768, 12, 1024, 50304, (16, 8, 4, 2, 1))
"""50304: GPT-2's 50257, rounded up to a multiple of 128."""
TINY = Size(2, 32, 2, 16, 64, (2,))


class Marks:
    """Points in time: of the device's own, where there is one."""

    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"

    def now(self) -> Any:
        """This point."""
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device is done; needed before `seconds`."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, begin: Any, end: Any) -> float:
        """Between two points."""
        return begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin


class Clock:
    """Seconds of one of a call's `STEPS` training steps."""

    def __init__(self, marks: Marks) -> None:
        self.marks = marks

    def sample(self, call: Any) -> Sample:
        """Carry it out once."""
        self.marks.wait()
        start, begin = time.perf_counter(), self.marks.now()
        call()
        host, end = time.perf_counter() - start, self.marks.now()
        self.marks.wait()
        wall = time.perf_counter() - start
        return Sample(self.marks.seconds(begin, end) / STEPS, host / STEPS, wall / STEPS)


class Training:
    """A model in training; a call makes `STEPS` steps. spans: when each optimizer step began and ended."""

    def __init__(self, contender: Contender, job: Job, size: Size, batch: int) -> None:
        self.job, self.marks = job, Marks(job.device)
        self.model = size.model(job.device, job.form.dtype)
        self.params = list(self.model.parameters())
        for p in self.params:
            p.grad = torch.zeros_like(p)
        self.step = contender.make(Setup(self.params, job.form, job.work))
        tokens = torch.randint(size.vocabulary, (batch, size.sequence + 1), device=job.device)
        self.tokens, self.targets = tokens[:, :-1], tokens[:, 1:]
        self.spans: list[tuple[Any, Any]] = []

    def __call__(self) -> None:
        for _ in range(STEPS):
            self.backward()
            begin = self.marks.now()
            self.step()
            self.spans.append((begin, self.marks.now()))

    def backward(self) -> None:
        """Gradients, new ones."""
        for p in self.params:
            p.grad = None
        with torch.autocast(self.job.device, torch.bfloat16, enabled=self.job.form.dtype == torch.float32):
            loss = self.model(self.tokens, self.targets)
        loss.backward()


class Built(NamedTuple):
    """A training that is warm. peak: bytes that it takes at most; launches: of its optimizer's step."""

    contender: Contender
    job: Job
    training: Training
    batch: int
    peak: int | None
    launches: int | None


def build(contender: Contender, job: Job, size: Size, batch: int) -> Built:
    """Make and warm up; memory is that of the second call, since state and workspaces are made in the first."""
    on_gpu = job.device == "cuda"
    before = torch.cuda.memory_allocated() if on_gpu else 0
    training = Training(contender, job, size, batch)
    training()
    if not on_gpu:
        return Built(contender, job, training, batch, None, None)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    training()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    training.backward()
    return Built(contender, job, training, batch, peak, launches(training.step))


def rows(writer: Writer, device: str, deadline: float, size: Size = FULL) -> list[Row]:
    """A row for each contender and format that is right and fits, until `time.monotonic()` passes the deadline."""
    bench = Bench(writer, device, memory=0.9 * torch.cuda.mem_get_info()[0] if device == "cuda" else float("inf"))
    able = [
        (c, job) for c, job in entries(size, device) if time.monotonic() < deadline and bench.verdict(c, job) is None
    ]
    made: list[Row] = []
    while able and time.monotonic() < deadline:
        batch = made[0]["batch"] if made else None
        able, built = _gather(bench, able, size, batch, deadline)
        made += _timed(bench, built, size, deadline)
        built.clear()
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
    if able:
        print(f"out of time: {len(able)} trainings were not measured")
    return made


def entries(size: Size, device: str) -> Iterator[tuple[Contender, Job]]:
    """Who trains, the most telling first."""
    packages = (name for name, c in CONTENDERS.items() if c.package not in ("torch", "fusedopt"))
    fitted = size.fitted()
    for name, form in (*FIRST, *product(packages, FORMATS)):
        contender, job = CONTENDERS[name], Job(fitted, FORMATS[form], WORKS["clip"], device)
        if contender.installed and contender.takes(job.form, job.work, device):
            yield contender, job


Entries = Sequence[tuple[Contender, Job]]


def _gather(
    bench: Bench, able: Entries, size: Size, batch: int | None, deadline: float
) -> tuple[list[tuple[Contender, Job]], list[Built]]:
    """As many trainings as memory has room for beside each other, and who is left. batch: None to find it."""
    left, built = list(able), list[Built]()
    while left and (not built or (time.monotonic() < deadline and _room(bench, built[0]))):
        contender, job = left.pop(0)
        chosen = batch or (built[0].batch if built else None)
        try:
            built.append(_fit(contender, job, size, (chosen,) if chosen else size.batches))
        except Exception as failure:  # of this one only, whatever its package raises
            bench.red(contender, job, f"training: {in_a_line(failure)}")
    return left, built


def _room(bench: Bench, first: Built) -> bool:
    """Whether one more like the first fits."""
    return first.peak is None or torch.cuda.memory_allocated() + 1.2 * first.peak < bench.memory


def _fit(contender: Contender, job: Job, size: Size, batches: Sequence[int]) -> Built:
    for batch in batches[:-1]:
        try:
            return build(contender, job, size, batch)
        except torch.cuda.OutOfMemoryError:
            pass  # what it held is freed once the exception is gone
        gc.collect()
        torch.cuda.empty_cache()
    return build(contender, job, size, batches[-1])


def _timed(bench: Bench, built: Sequence[Built], size: Size, deadline: float) -> list[Row]:
    """They take turns."""
    trainings = {f"{b.contender.name}, {b.job.form.name}": b for b in built}
    if not trainings:
        return []
    clock = Clock(Marks(bench.device))
    calls = {name: b.training for name, b in trainings.items()}
    try:
        times = turns(calls, clock, ROUNDS, max(0.0, min(20.0, deadline - time.monotonic())), warm=1)
    except Exception as failure:  # one of them failed: nobody's times are whole
        for b in built:
            bench.red(b.contender, b.job, f"while trainings were timed: {type(failure).__name__}: {str(failure)[:200]}")
        return []
    return [_row(bench.writer, name, b, size, times) for name, b in trainings.items()]


def _row(writer: Writer, name: str, built: Built, size: Size, times: Times) -> Row:
    samples, marks = times.samples[name], built.training.marks
    tokens = built.batch * size.sequence
    spans = built.training.spans[-STEPS * len(samples) :]
    inside = sum(marks.seconds(*span) for span in spans) / len(spans)
    whole = sum(s.device for s in samples) / len(samples)
    fields: dict[str, Any] = {
        "tokens_per_s": _rounded(spread([tokens / s.device for s in samples])),
        "step_ms": _rounded(spread([1e3 * s.device for s in samples])),
        "optimizer_share": round(inside / whole, 4), "peak_bytes": built.peak, "launches": built.launches,
        "batch": built.batch, "sequence": size.sequence, "vocabulary": size.vocabulary, "rounds": len(samples),
    }  # fmt: skip
    ours = f"{FUSEDOPT.name}, {built.job.form.name}"
    if ours in times.samples and name != ours:
        fields["ratio"] = _rounded(times.ratio(ours, name, "device"))
    row = writer.add("train", contender=built.contender.name, **built.job.identity(), **fields)
    print(line(row), flush=True)
    return row


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: rounded(value) for name, value in values.items()}


def line(row: Row) -> str:
    """A row for the terminal."""
    peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:8.2f} GiB at most"
    speed, share = row["tokens_per_s"]["median"], row["optimizer_share"]
    return f"{row['contender']:30}{row['format']:6}{speed:12,.0f} tokens/s, {share:.1%} in the optimizer{peak}"


@click.command("perf.stages.training_step", help=__doc__)
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--tiny", is_flag=True, help="A model of two layers, to see it work.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=120.0, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULTS / "training-step.jsonl")
def main(device: str, tiny: bool, seconds: float, out: Path) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("torch sees no GPU here; --device cpu --tiny")
    rows(Writer(out), device, time.monotonic() + seconds, TINY if tiny else FULL)


if __name__ == "__main__":
    main()
