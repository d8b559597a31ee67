"""Python time of a step over DTensors beside plain tensors, and its collectives: rows of kind sharded.

A process group of torch's own tests stands for the other ranks, its collectives do nothing; tensors are tiny and our
launches stubbed, as in ``perf/host.py``. Rows have case, tensors, world, work, contender, dtensor (whether parameters
are DTensors), host_us, ratio (of it to torch's fused step over plain tensors, in the same round), rounds, all_reduces
(of a step) and payload (bytes that each rank puts into them).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from perf.clock import turns
from perf.contenders import CONTENDERS, FUSEDOPT
from perf.contenders.ours import build
from perf.host import Case, Clock, Model, ours
from perf.results import Writer, rounded
from perf.work import WORKS

WORLD = 4
SHAPES = ((4,), (8, 2), (16,), (4, 4))
"""Of which every rank has one to four elements."""
BASE = "torch fused step"


class Job(NamedTuple):
    """What takes its turn."""

    contender: str
    work: str
    dtensor: bool

    @property
    def name(self) -> str:
        """Its turn's."""
        return f"{self.contender} {self.work}{', DTensor' if self.dtensor else ''}"


JOBS = tuple(
    Job(contender, work, dtensor)
    for dtensor in (False, True) for work in ("step", "clip") for contender in ("torch fused", FUSEDOPT.name)
)  # fmt: skip


class Sharded(Model):
    """Parameters and gradients shared out along dim 0, as `fully_shard` leaves them."""

    def __init__(self, count: int, mesh: Any, dtensor: bool) -> None:
        shapes = list(islice(cycle(SHAPES), count))
        if not dtensor:
            shapes = [(shape[0] // WORLD, *shape[1:]) for shape in shapes]

        def spread(shape: tuple[int, ...]) -> torch.Tensor:
            return distribute_tensor(torch.ones(shape), mesh, [Shard(0)]) if dtensor else torch.ones(shape)

        def gradient(p: Any) -> torch.Tensor:
            # `fully_shard` gives gradients the specification of their parameters, the very same object
            return (
                DTensor(torch.ones_like(p._local_tensor), p._spec, requires_grad=False)
                if dtensor
                else torch.ones_like(p)
            )

        self.params = [torch.nn.Parameter(spread(shape)) for shape in shapes]
        sets = [[gradient(p.detach()) for p in self.params] for _ in range(3)]
        self._sets: Iterator[list[torch.Tensor]] = cycle(sets)


class Collectives(TorchDispatchMode):
    """Counts all-reduces, and the bytes that this rank puts into them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.payload = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does to local tensors comes here again
        if func._opname.rstrip("_") in ("all_reduce", "allreduce"):
            sent = args[0] if isinstance(args[0], list | tuple) else args[:1]
            self.count += 1
            self.payload += sum(t.nbytes for t in sent)
        return func(*args, **(kwargs or {}))


@contextmanager
def other_ranks(world: int = WORLD, rank: int = 0) -> Iterator[None]:
    """As if there were others, in this process alone."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


def case(job: Job, count: int, mesh: Any) -> Case:
    """One contender over so many tiny tensors."""
    model = Sharded(count, mesh, job.dtensor)
    if job.contender == FUSEDOPT.name:
        return ours(model, build(model.setup(job.work), backend="triton"), WORKS[job.work].scaled)
    return Case(model, CONTENDERS[job.contender].make(model.setup(job.work)))


def collectives(made: Case) -> Collectives:
    """Of one step, after one that made what stays."""
    made.model.backward()
    made.step()
    made.model.backward()
    with Collectives() as seen:
        made.step()
    return seen


def rows(writer: Writer, name: str, count: int, rounds: int = 40, seconds: float = 20.0) -> None:
    """Everybody over as many tensors as a case has."""
    with other_ranks():
        mesh = init_device_mesh("cpu", (WORLD,))
        cases = {job.name: case(job, count, mesh) for job in JOBS}
        times = turns(cases, Clock(), rounds, seconds)
        for job in JOBS:
            seen = collectives(cases[job.name])
            micro = {key: rounded(1e6 * value, 4) for key, value in times.spread(job.name, "host").items()}
            ratio = {key: rounded(value, 4) for key, value in times.ratio(job.name, BASE, "host").items()}
            about = {"device": "cpu", "case": name, "tensors": count, "world": WORLD, "format": "fp32", **job._asdict()}
            measured = {"host_us": micro, "ratio": ratio, "rounds": len(times.samples[job.name])}
            writer.add("sharded", **about, **measured, all_reduces=seen.count, payload=seen.payload)
