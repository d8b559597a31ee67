"""Launches of a step, derived for everybody but us: what contenders sweep over, and how multi-tensor calls are cut.

Sources: ATen's ``MultiTensorApply.cuh`` and its CUDA kernels as of 2026, torch 2.13's Python; apex, Transformer Engine
and DeepSpeed carry the same table. Small operations are those that torch's dispatcher showed on the CPU.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import NamedTuple

from perf.contenders import Contender
from perf.contenders.torch_optim import COPIED
from perf.work import FORMATS, WORKS

CHUNK = 65536
"""Elements of a block."""


class Arguments(NamedTuple):
    """What one launch has room for. blocks; tensors: by the number of lists that are walked together, from 1 on."""

    name: str
    blocks: int
    tensors: tuple[int, ...]


NARROW = Arguments("4 KB", 320, (110, 64, 48, 36, 30))
WIDE = Arguments("32 KB", 2240, (770, 448, 336, 252, 210))
"""torch built for CUDA 13 and newer, from pull request 178641 on (March 2026)."""


@lru_cache(maxsize=4096)
def multi_tensor(sizes: tuple[int, ...], lists: int, arguments: Arguments) -> tuple[int, ...]:
    """Blocks of each launch of a call over tensors of so many elements. Empty ones are left out."""
    found: list[int] = []
    blocks = tensors = 0
    for size in filter(None, sizes):
        left = -(-size // CHUNK)
        tensors += 1
        while left:
            taken = min(left, arguments.blocks - blocks)
            blocks, left = blocks + taken, left - taken
            if blocks == arguments.blocks or (tensors == arguments.tensors[lists - 1] and not left):
                found.append(blocks)
                blocks, tensors = 0, 1 if left else 0  # the tensor goes on in the next launch
    return (*found, blocks) if blocks else tuple(found)


class Sweep(NamedTuple):
    """One pass over all elements. bytes: per parameter. lists: of a multi-tensor call, 0 for another kind of kernel.

    resident: blocks that a multiprocessor holds at once.
    """

    bytes: float
    lists: int = 0
    resident: int = 4


@dataclass(frozen=True)
class Plan:
    """A step. few: launches that do not grow; counters: lists of multi-tensor calls over single numbers, such as step
    counts; per_tensor: kernels for each tensor; joined: tensors whose updates share a compiled kernel.

    own: arguments of its calls, where they do not depend on torch.
    """

    sweeps: tuple[Sweep, ...]
    few: int = 0
    counters: tuple[int, ...] = ()
    per_tensor: int = 0
    joined: int = 0
    own: Arguments | None = field(default=None)

    def count(self, sizes: Sequence[int], arguments: Arguments) -> int:
        """Launches of a step over tensors of so many elements."""
        arguments, n = self.own or arguments, len(sizes)
        calls = sum(len(multi_tensor(tuple(sizes), sweep.lists, arguments)) for sweep in self.sweeps if sweep.lists)
        counters = sum(len(multi_tensor((1,) * n, lists, arguments)) for lists in self.counters)
        return calls + counters + self.few + self.per_tensor * n + (-(-n // self.joined) if self.joined else 0)


FUSED = 2
"""Blocks of 512 threads with 58 registers that fit a multiprocessor (pytorch#123566)."""
FOREACH = (
    Sweep(8, 1), Sweep(12, 2), Sweep(8, 1), Sweep(12, 3), Sweep(8, 2), Sweep(8, 1), Sweep(8, 1), Sweep(16, 3)
)  # fmt: skip
"""Decay, lerp, mul, addcmul, sqrt, div, add, addcdiv."""
COMPILED = 27
"""Tensors to a kernel: Inductor gives it at most 250 arguments, of which AdamW takes 9 for a tensor."""
BY_GRAD_SCALE = "torch fused, clipping by grad_scale"
MULTI_TENSOR = ("apex", "Transformer Engine", "DeepSpeed")
ONE_BY_ONE = ("bitsandbytes", "torchao", "optimi", "FlashOptim")
"""A kernel for each tensor. bitsandbytes waits for the device after each, too, which no plan knows."""


def plan(contender: Contender, form: str, work: str) -> Plan | None:
    """What a contender does for this work; None where nobody told its traffic or its kernels."""
    alone, whole = contender.traffic(form, "step"), contender.traffic(form, work)
    if whole is None:
        return None
    if contender.name == BY_GRAD_SCALE:
        return _by_grad_scale(work)
    copied = contender.formats.get(form) == COPIED.get("bf16")
    step = None if alone is None else _step(contender.name, alone[0] - (12 if copied else 0))
    if step is None:
        return None
    step = replace(step, sweeps=(*step.sweeps, *([Sweep(6, 2)] * 2 if copied else [])))
    return _around(step, work, 4 if copied else FORMATS[form].dtype.itemsize)


def _step(name: str, moved: float) -> Plan | None:
    """The step by itself, which moves so many bytes."""
    if name == "torch for-loop":
        return Plan((Sweep(moved),), per_tensor=8)
    if name == "torch foreach":
        return Plan(FOREACH)
    if name == "torch fused":
        return Plan((Sweep(moved, 4, FUSED),), counters=(1,))
    if name == "torch.compile of the step":
        return Plan((Sweep(moved),), joined=COMPILED)
    if name.startswith(MULTI_TENSOR):
        return Plan((Sweep(moved, 4, FUSED),), own=NARROW)
    return Plan((Sweep(moved),), per_tensor=1) if name.startswith(ONE_BY_ONE) else None


def _around(step: Plan, work: str, grad: int) -> Plan:
    """With torch's clipping and scaler, on gradients of so many bytes.

    Norm: fill, cleanup, stack and the norm of norms. Clipping: four operations on one number. Scaler: its inverse in
    three, found_inf, the update; the fused step adds found_inf up and takes back step counts.
    """
    if WORKS[work].clip:
        step = replace(step, sweeps=(*step.sweeps, Sweep(grad, 1), Sweep(2 * grad, 1)), few=step.few + 8)
    if WORKS[work].scaled:
        step = replace(step, sweeps=(*step.sweeps, Sweep(2 * grad, 1)), few=step.few + 5)
        if step.counters:
            step = replace(step, counters=(*step.counters, 2), few=step.few + 1)
    return step


def _by_grad_scale(work: str) -> Plan:
    """The fused kernel writes the gradients that it divided. found_inf is set, so step counts are taken back."""
    few = 14 if WORKS[work].scaled else 6
    return Plan((Sweep(4, 1), Sweep(32, 4, FUSED)), few=few, counters=(1, 2))
