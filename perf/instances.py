"""A contender over a case: parameters with gradients, and a call that makes one step."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from perf.cases import Fitted
from perf.contenders import Contender, Setup
from perf.work import Format, Work

MAX_COPIES = 8
MAX_TENSORS = 10_000
"""Of all copies together: with more it takes long to make them. Clocks overwrite the cache in any case."""
SLOW = 0.25
"""Seconds of a step above which it is not profiled: it launches so much that reading the profile takes long."""


@dataclass(frozen=True)
class Job:
    """What is measured. graph: replays of a captured step."""

    fitted: Fitted
    form: Format
    work: Work
    device: str
    graph: bool = False

    def identity(self) -> dict[str, Any]:
        """Fields of a row."""
        return {
            "device": self.device, "case": self.fitted.case.name, "part": self.fitted.part,
            "tensors": self.fitted.tensors, "elements": self.fitted.elements,
            "format": self.form.name, "work": self.work.name, "graph": self.graph,
        }  # fmt: skip


@dataclass
class Instance:
    """step: one step of one of its copies, each in its turn. held, peak: bytes that one copy takes between steps, and
    at most during one; None where nobody counts. launches: kernels and copies of a step, where the profiler tells.
    """

    contender: Contender
    step: Callable[[], object]
    held: int | None = None
    peak: int | None = None
    launches: int | None = None


def build(contender: Contender, job: Job, cache_bytes: int) -> Instance:
    """Make as many copies as it takes to fill several times the cache, at most `MAX_COPIES`, and warm them up."""
    size = job.fitted.elements * job.form.held
    most = min(MAX_COPIES, MAX_TENSORS // max(job.fitted.tensors, 1), int(4 * cache_bytes // max(size, 1)))
    copies = max(1, most)
    counts: dict[str, int | None] = {}
    turn = cycle([_one(contender, job, counts if i == 0 else None) for i in range(copies)])
    return Instance(contender, lambda: next(turn)(), **counts)


def parameters(shapes: Mapping[str, tuple[int, ...]], form: Format, device: str) -> list[torch.nn.Parameter]:
    """Random weights of 0.02 with random gradients: work on zeros may be faster."""
    made = []
    generator = torch.Generator(device).manual_seed(0)
    for shape in shapes.values():
        draw = {"generator": generator, "device": device, "dtype": form.dtype}
        p = torch.nn.Parameter(torch.randn(shape, **draw).mul_(0.02))
        p.grad = torch.randn(shape, **draw)
        made.append(p)
    return made


def _one(contender: Contender, job: Job, counts: dict[str, int | None] | None) -> Callable[[], object]:
    """A step that is warm, and captured if the job says so; ``counts`` gets what one of them took."""
    cuda, before = torch.cuda, torch.cuda.memory_allocated()
    params = parameters(job.fitted.shapes, job.form, job.device)
    step = contender.make(Setup(params, job.form, job.work, graph=job.graph))
    if job.device == "cpu":
        return step
    _on_side_stream(step, 3)
    cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    step()
    cuda.synchronize()
    slow = time.perf_counter() - begin > SLOW
    if counts is not None:
        held, peak = cuda.memory_allocated() - before, cuda.max_memory_allocated() - before
        counts.update(held=held, peak=peak, launches=None if slow else launches(step))
    if not job.graph:
        return step
    graph = cuda.CUDAGraph()
    with cuda.graph(graph):
        step()
    graph.replay()
    cuda.synchronize()
    return _Replay(graph, step, params)


@dataclass
class _Replay:
    """A captured step; what its kernels read is kept alive beside it."""

    graph: Any
    step: Callable[[], object]
    params: list[torch.nn.Parameter]

    def __call__(self) -> None:
        self.graph.replay()


def _on_side_stream(step: Callable[[], object], times: int) -> None:
    """Warm up as captures want it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(times):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()


def launches(step: Callable[[], object]) -> int | None:
    """Kernels, copies and fills that the profiler sees in one step; None where it sees nothing."""
    from torch.profiler import ProfilerActivity, profile

    try:
        for more in ([], [ProfilerActivity.CPU]):  # some versions see nothing of a GPU by itself
            with profile(activities=[ProfilerActivity.CUDA, *more]) as seen:
                step()
                torch.cuda.synchronize()
            if count := sum(map(_on_device, seen.events() or ())):
                return count
    except (RuntimeError, AssertionError):  # a machine whose profiler may not look
        pass
    return None


def _on_device(event: Any) -> bool:
    """Not the span that torch draws there for an optimizer's step."""
    return event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
