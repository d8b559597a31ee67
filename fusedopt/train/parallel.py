"""Several processes that train one model: who they are, what they share out, and what they agree on.

`torchrun` starts the processes (ranks) and describes them in the environment. Ranks talk over gloo about numbers on the
host and over nccl about those on a GPU, so that agreeing on the host never waits for a device.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .errors import BadInput, Diverged, Lost, Reported
from .task import Batch

UNCHOSEN = "unchosen"
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

LOST = re.compile("closed by peer|reset by peer|Broken pipe|remote process exited")
"""What gloo and nccl say then."""

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, seen from one of them. `mode`: "ddp", "fsdp", UNCHOSEN, or "none": a process alone."""

    mode: str = "none"
    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.mode == "none"

    def __str__(self) -> str:
        return "1" if self.alone else f"{self.world} ({self.mode})"

    # ------------------------------------------------------------------------------------------------ agreement
    def gather(self, value: T) -> list[T]:
        """The value of every rank, by rank."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def check(self, error: BadInput | None) -> None:
        """Raise the first rank's error on all ranks, so that all of them end; only rank 0 is to print it.

        Raises:
            BadInput: on rank 0. Reported: on the others.
        """
        for rank, message in enumerate(self.gather(error and str(error))):
            if message is not None:
                where = f"rank {rank}: " if rank else ""
                raise (BadInput if self.first else Reported)(where + message) from error

    def together(self, action: Callable[[], T]) -> T:
        """The result of `action` here, once it has succeeded everywhere. Errors: as of `check`."""
        try:
            result, error = action(), None
        except BadInput as problem:
            result, error = None, problem
        self.check(error)
        return result  # pyright: ignore[reportReturnType] # None only when check has raised

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers."""
        if self.alone:
            return number
        everybodys = torch.tensor(number)
        dist.all_reduce(everybodys, dist.ReduceOp.MAX)
        return int(everybodys)

    def sum(self, values: Tensor) -> Tensor:
        """fp64 values added up over the ranks, in place: the same bits on each of them."""
        if not self.alone:
            dist.all_reduce(values)
        return values

    # ------------------------------------------------------------------------------------------------- work
    def rows(self, count: int) -> slice:
        """Which of a batch's rows are this rank's; as many for each rank as can be."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)

    def wrap(self, model: nn.Module, batch: Batch) -> nn.Module:
        """What to call for a training step, such that gradients are the mean over the ranks. batch: any.

        fsdp: changes `model` itself, whose parameters become DTensors, each rank with a part of every one. Under fp16
        the loss scale settles lower by the number of ranks: in each one's own mean a row weighs so many times more.
        """
        if self.mode == "fsdp":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            mesh = init_device_mesh(next(model.parameters()).device.type, (self.world,))
            for block in model.blocks:  # pyright: ignore[reportGeneralTypeIssues] # a task's model has them
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
        if self.mode != "ddp":
            return model
        wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        _settle_buckets(wrapped, batch)
        return wrapped

    def reshard(self, model: nn.Module) -> None:
        """After a pass without backward: fsdp would keep what it gathered of the root, and not see other weights."""
        if self.mode == "fsdp":
            model.reshard()  # pyright: ignore[reportCallIssue] # `fully_shard` makes the model a class that has it


ALONE = Ranks()


def from_environment(mode: str | None, environment: Mapping[str, str]) -> Ranks:
    """The ranks that torchrun has started, for `--parallel mode`; None: not given. BadInput where nothing has."""
    if not all(name in environment for name in VARIABLES):
        if mode is not None:
            raise BadInput(
                f"--parallel {mode} needs torchrun, which starts the ranks: "
                f"torchrun --nproc-per-node 2 -m fusedopt.cli train --parallel {mode} …"
            )
        return ALONE
    started = Ranks(mode or UNCHOSEN, *(int(environment[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    return ALONE if mode is None and started.world == 1 else started


@contextmanager
def connected(ranks: Ranks) -> Iterator[None]:
    """Inside, the ranks can talk."""
    if ranks.alone:
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    except Diverged as error:  # all have the same loss
        _disconnect(ranks)
        raise error if ranks.first else Reported(str(error), status=1) from None
    except (BadInput, Reported):
        _disconnect(ranks)
        raise
    except RuntimeError as error:
        if LOST.search(str(error)):
            raise Lost(f"rank {ranks.rank} has lost another rank, whose own message says why") from None
        raise
    _disconnect()


def _disconnect(reports: Ranks = ALONE) -> None:
    """Not after unexpected errors: then ranks may wait for this one, and it for them. reports: who waits for rank 0."""
    dist.destroy_process_group()
    time.sleep(0.05)  # for gloo's threads to let go of tensors: if the interpreter ends first, they abort the process
    if not reports.first:
        time.sleep(1.0)  # torchrun ends the other ranks once one has failed


def on_this_rank(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this rank holds; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _settle_buckets(model: nn.parallel.DistributedDataParallel, batch: Batch) -> None:
    """Let DDP see one backward pass: it then orders its buckets, and with them the sums over three or more ranks.

    Otherwise the first step after a resume would add in another order than the run without a break.
    """
    device = next(model.parameters()).device
    model(*(tensor[:1].to(device) for tensor in batch)).backward()
    model.zero_grad()
