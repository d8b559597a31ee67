"""Measure one job: check each contender, build as many as fit beside ours, let them take turns, write their rows."""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from perf import check
from perf.clock import CallFailed, Clock, CudaClock, HostClock, Times, turns
from perf.contenders import FUSEDOPT, Contender
from perf.instances import Instance, Job, build
from perf.results import Row, Writer, in_a_line, rounded


class GpuLost(RuntimeError):
    """To this process, for good."""


@dataclass
class Bench:
    """What measurements share. memory: bytes that contenders may fill together. rounds, seconds: of one batch.

    checked: (contender, format, work) → why it is not timed, or None.
    """

    writer: Writer
    device: str
    memory: float
    rounds: int = 30
    seconds: float = 4.0
    clock: Clock = field(default_factory=HostClock)
    cache_bytes: int = 0
    checked: dict[tuple[str, str, str], str | None] = field(default_factory=dict)

    @classmethod
    def on(cls, writer: Writer, device: str) -> "Bench":
        """For this machine's ``"cuda"`` or ``"cpu"``."""
        if device == "cpu":
            return cls(writer, device, memory=8e9, rounds=7)
        clock = CudaClock()
        free, _ = torch.cuda.mem_get_info()
        return cls(writer, device, memory=0.85 * free, clock=clock, cache_bytes=clock.cache_bytes)

    def verdict(self, contender: Contender, job: Job) -> str | None:
        """Why a contender is not timed; None if its results are right. Found once for each format and work."""
        key = (contender.name, job.form.name, job.work.name)
        if key not in self.checked:
            self.checked[key] = why = _check(contender, job)
            if why:
                self.red(contender, job, why, wrong=True)
                self.wait()
        return self.checked[key]

    def red(self, contender: Contender, job: Job, why: str, **more: Any) -> None:
        """Nothing was measured, and this is why. more: ``wrong=True`` if it is so for all cases."""
        self.writer.add("red", contender=contender.name, **job.identity(), why=why, **more)

    def wait(self) -> None:
        """Until the GPU is done.

        Raises:
            GpuLost: a kernel failed. All that this process did next would fail, too, and get the blame.
        """
        try:
            if self.device == "cuda":
                torch.cuda.synchronize()
        except Exception as failure:  # torch has a class of its own for it, which older versions lack
            raise GpuLost(in_a_line(failure)) from failure


def _check(contender: Contender, job: Job) -> str | None:
    try:
        error = check.error(contender, job.form, job.work, job.device)
    except Exception as failure:  # whatever another package raises is its result
        return in_a_line(failure)
    if not error <= contender.tolerance(job.form):
        return f"wrong result: off by {error:.3g} of the change, {contender.tolerance(job.form):g} allowed"
    return None


def measure(bench: Bench, job: Job, contenders: Sequence[Contender]) -> list[Row]:
    """Rows of a job. Ours is in every batch, so that each ratio is of times from the same rounds."""
    able = [c for c in contenders if c.takes(job.form, job.work, job.device, job.graph) and c.installed]
    for contender in [c for c in able if job.fitted.tensors > (c.most_tensors or job.fitted.tensors)]:
        able.remove(contender)
        bench.red(contender, job, f"left out: with more than {contender.most_tensors:,} tensors it takes minutes")
    able = [c for c in able if bench.verdict(c, job) is None]
    rows: list[Row] = []
    for batch in _batches(able, bench.memory / max(job.fitted.elements * job.form.held, 1)):
        rows += _batch(bench, job, batch, with_ours=not any(row["contender"] == FUSEDOPT.name for row in rows))
    return rows


def _batches(contenders: Sequence[Contender], room: float) -> Iterator[list[Contender]]:
    """Groups of at most so many, each beginning with ours if it takes part."""
    ours = [c for c in contenders if c is FUSEDOPT]
    others = [c for c in contenders if c is not FUSEDOPT]
    size = max(1, int(room) - len(ours))
    for start in range(0, max(len(others), len(ours)), size):
        yield ours + others[start : start + size]


def _batch(bench: Bench, job: Job, contenders: Sequence[Contender], with_ours: bool) -> list[Row]:
    """One whose step fails is red, and the others begin again without it.

    What was built is gone afterwards: it is only in `_timed`'s variables, and in cycles.
    """
    try:
        return _timed(bench, job, contenders, with_ours)
    except CallFailed as failure:
        name, why = str(failure), f"while it was timed: {in_a_line(failure.__cause__ or failure)}"
    except GpuLost:
        raise
    except Exception as failure:  # no memory for the copy, …: nobody's fault, and the next batch may do
        name, why = COPY, f"while the batch was timed: {in_a_line(failure)}"
    finally:
        _forget()
    bench.wait()
    others = [c for c in contenders if c.name != name]
    for contender in contenders if len(others) == len(contenders) else [c for c in contenders if c.name == name]:
        bench.red(contender, job, why)
    return _batch(bench, job, others, with_ours) if 0 < len(others) < len(contenders) else []


def _timed(bench: Bench, job: Job, contenders: Sequence[Contender], with_ours: bool) -> list[Row]:
    instances = {c.name: instance for c in contenders if (instance := _built(bench, job, c))}
    if not instances:
        return []
    copy = Copy(bench)
    calls = {name: instance.step for name, instance in instances.items()} | {COPY: copy}
    times = turns(calls, bench.clock, bench.rounds, bench.seconds)
    ceiling = copy.bytes / times.spread(COPY, "device")["median"]
    kept = [i for name, i in instances.items() if with_ours or name != FUSEDOPT.name]
    return [bench.writer.add("measured", **row(job, i, times, ceiling)) for i in kept]


def _built(bench: Bench, job: Job, contender: Contender) -> Instance | None:
    try:
        return build(contender, job, bench.cache_bytes)
    except Exception as failure:  # out of memory, a capture that is refused, …: of this one only
        bench.red(contender, job, in_a_line(failure))
    gc.collect()  # what it had made, the next one needs
    bench.wait()
    return None


def _forget() -> None:
    """Free what nobody uses any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def row(job: Job, instance: Instance, times: Times, ceiling: float) -> dict[str, Any]:
    """Fields of a measured row; ceiling: bytes per second of a copy in the same rounds."""
    name, contender = instance.contender.name, instance.contender
    device = times.spread(name, "device")
    moved = contender.traffic(job.form.name, job.work.name) if job.device == "cuda" else None  # of GPU kernels
    fields: dict[str, Any] = {"contender": name, **job.identity()}
    fields |= {
        "device_ms": _times(device, 1e3), "host_us": _times(times.spread(name, "host"), 1e6),
        "wall_ms": _times(times.spread(name, "wall"), 1e3), "rounds": len(times.samples[name]),
        "launches": instance.launches, "held_bytes": instance.held, "peak_bytes": instance.peak,
        "ceiling_gb_s": rounded(ceiling / 1e9),
    }  # fmt: skip
    if moved is not None:
        rate = moved[0] * job.fitted.elements / device["median"]
        fields |= {
            "bytes": moved[0],
            "bytes_from": moved[1],
            "gb_s": rounded(rate / 1e9),
            "share": rounded(rate / ceiling),
        }
    if FUSEDOPT.name in times.samples and name != FUSEDOPT.name:
        fields["ratio"] = _times(times.ratio(FUSEDOPT.name, name, "device"), 1)
        fields["ratio_wall"] = _times(times.ratio(FUSEDOPT.name, name, "wall"), 1)
    return fields


COPY = "copy"


class Copy:
    """A plain copy of memory, the ceiling of whatever moves bytes: of 2 GiB on a GPU, of 256 MiB elsewhere."""

    def __init__(self, bench: Bench) -> None:
        size = max(2**12, min(2**31 if bench.device == "cuda" else 2**28, int(bench.memory / 8)))
        self.source = torch.ones(size // 4, device=bench.device)
        self.target = torch.empty_like(self.source)
        self.bytes = 2 * self.source.nbytes

    def __call__(self) -> None:
        self.target.copy_(self.source)


def _times(values: dict[str, float], unit: float) -> dict[str, float]:
    return {name: rounded(unit * value) for name, value in values.items()}
