"""Schedules made of torch's schedulers, which move one reference learning rate; the groups follow it in proportion.

The reference belongs to a stand-in optimizer with one group. So groups keep their ratios whatever a scheduler does,
min_lr is in proportion too, lr tensors are filled in place, momentum and betas stay, and torch's chainable schedulers,
which compute from the present lr, see theirs and not what a watched file put in its place.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as schedulers
from torch.optim.lr_scheduler import LRScheduler

from .checks import NOTHING, check
from .names import SCHEDULES, Run, decay_steps

Phases = list[tuple[int, LRScheduler]]
"""(first step, scheduler from there on), in order."""
Arguments = Mapping[str, Any]
RATES = ("lr", "initial_lr", "max_lr", "min_lr")
"""What torch's schedulers keep in a group; the last two are OneCycleLR's."""


@dataclass
class InverseTime:
    """1/(1 + k·t)"""

    k: float

    def __call__(self, t: int) -> float:
        return 1.0 / (1.0 + self.k * t)


@dataclass
class InverseSqrt:
    """√(τ/(τ + t))"""

    timescale: float

    def __call__(self, t: int) -> float:
        return math.sqrt(self.timescale / (self.timescale + t))


@dataclass
class SqrtDecay:
    """1 − (1 − final)·√(t/T)"""

    steps: int
    final: float

    def __call__(self, t: int) -> float:
        return 1.0 - (1.0 - self.final) * math.sqrt(min(1.0, t / self.steps))


def _constant(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    return [(0, schedulers.ConstantLR(reference, factor=1.0))]


def _step(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    return [(0, schedulers.StepLR(reference, **arguments))]


def _piecewise(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    factors = arguments["factors"]
    if arguments["values"] is not None:
        factors = [value / run.lr if run.lr > 0 else 1.0 for value in arguments["values"]]
    starts = [run.warmup_steps, *arguments["boundaries"]]
    constants = [schedulers.ConstantLR(reference, factor, total_iters=run.steps + 1) for factor in factors]
    return [(start - run.warmup_steps, constant) for start, constant in zip(starts, constants, strict=True)]


def _exponential(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    return [(0, schedulers.ExponentialLR(reference, math.exp(-arguments["k"] / run.epoch_steps)))]


def _inverse_time(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    return [(0, schedulers.LambdaLR(reference, InverseTime(arguments["k"] / run.epoch_steps)))]


def _linear(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    return [(0, schedulers.LinearLR(reference, 1.0, run.final, total_iters=run.length))]


def _polynomial(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    return [(0, schedulers.PolynomialLR(reference, run.length, arguments["power"]))]


def _cosine(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    return [(0, schedulers.CosineAnnealingLR(reference, T_max=run.length, eta_min=run.min_lr))]


def _cosine_restarts(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    first, multiplier = arguments["first_period"], arguments["multiplier"]
    return [(0, schedulers.CosineAnnealingWarmRestarts(reference, first, multiplier, eta_min=run.min_lr))]


def _one_cycle(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    """torch's phases end at pct_start·total − 1 and total − 1; as the others, it reaches min_lr after the last step."""
    rise = run.warmup_steps or max(1, round(0.3 * run.steps))
    total, div = run.steps + 1, float(arguments["div_factor"])
    scheduler = schedulers.OneCycleLR(
        reference,
        max_lr=run.lr,
        total_steps=total,
        pct_start=(rise + 1) / total,
        anneal_strategy=arguments["anneal"],
        cycle_momentum=False,
        div_factor=div,
        final_div_factor=run.lr / div / run.min_lr if run.min_lr > 0 else math.inf,
    )
    return [(0, scheduler)]


def _wsd(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    steps = decay_steps(run, arguments["decay"])
    decays: dict[str, Callable[[], LRScheduler]] = {
        "linear": lambda: schedulers.LinearLR(reference, 1.0, run.final, total_iters=steps),
        "cosine": lambda: schedulers.CosineAnnealingLR(reference, T_max=steps, eta_min=run.min_lr),
        "sqrt": lambda: schedulers.LambdaLR(reference, SqrtDecay(steps, run.final)),
    }
    stable = run.length - steps
    phases = _constant(reference, run, arguments) if stable > 0 else []
    return [*phases, (stable, decays[arguments["shape"]]())]


def _inverse_sqrt(reference: Optimizer, run: Run, arguments: Arguments) -> Phases:
    return [(0, schedulers.LambdaLR(reference, InverseSqrt(arguments["timescale"])))]


BUILDERS: dict[str, Callable[[Optimizer, Run, Arguments], Phases]] = {
    "constant": _constant, "step": _step, "piecewise": _piecewise, "exponential": _exponential,
    "inverse_time": _inverse_time, "linear": _linear, "polynomial": _polynomial, "cosine": _cosine,
    "cosine_restarts": _cosine_restarts, "warmup_cosine": _cosine, "one_cycle": _one_cycle, "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt, "plateau": _constant,
}  # fmt: skip


def _warmup(name: str, reference: Optimizer, run: Run) -> LRScheduler:
    """From lr/(W + 1), which is not 0, or from min_lr: LinearLR cannot start at 0, the rising half of a cycle can."""
    if name == "warmup_cosine":
        return schedulers.CyclicLR(reference, run.min_lr, run.lr, run.warmup_steps, cycle_momentum=False)
    start = 1.0 / (run.warmup_steps + 1)
    return schedulers.LinearLR(reference, start_factor=start, total_iters=run.warmup_steps)


def _build(name: str, reference: Optimizer, run: Run, arguments: Arguments) -> LRScheduler:
    """Warm-up and phases as one scheduler."""
    phases = BUILDERS[name](reference, run, arguments)
    if run.warmup_steps > 0 and name != "one_cycle":
        phases = [(0, _warmup(name, reference, run)), *((run.warmup_steps + at, phase) for at, phase in phases)]
    parts = [phase for _, phase in phases]
    if len(parts) == 1:
        return parts[0]
    return schedulers.SequentialLR(reference, parts, milestones=[at for at, _ in phases[1:]])


def initial_lrs(optimizer: Optimizer) -> list[float]:
    """Each group's lr before any schedule, which is noted in the groups as torch's schedulers do."""
    for group in optimizer.param_groups:
        lr = group["lr"]
        group.setdefault("initial_lr", lr.clone() if isinstance(lr, Tensor) else lr)
    return [float(group["initial_lr"]) for group in optimizer.param_groups]


def in_proportion(initial: Sequence[float], lr: float) -> list[float]:
    """One lr per group: `lr` for the largest `initial` one, for others as much less as they were less."""
    largest = max(initial)
    return [lr if own == largest else own * (lr / largest) for own in initial]


def set_lr(group: dict[str, Any], lr: float | Tensor) -> None:
    """Give a group its lr; a tensor stays the same tensor, which a captured CUDA graph reads."""
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(lr) if isinstance(lr, Tensor) else group["lr"].fill_(lr)
    else:
        group["lr"] = lr


class Schedule:
    """Moves the learning rates of all groups of `optimizer`; see `make`. Used like one of torch's schedulers."""

    def __init__(self, name: str, optimizer: Optimizer, run: Run, arguments: Arguments) -> None:
        self.name, self.optimizer = name, optimizer
        self.initial = initial_lrs(optimizer)
        self._begin(run, arguments)
        self._apply()

    def _begin(self, run: Run, arguments: Arguments) -> None:
        """Make torch's schedulers, which move `self._group["lr"]`."""
        self.run, self.arguments, self.steps_done = run, dict(arguments), 0
        reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=run.lr)
        self._group = reference.param_groups[0]
        self._group["initial_lr"] = run.lr
        settled = SCHEDULES[self.name].settle(run, arguments)
        self._scheduler = _build(self.name, reference, run, settled)
        self._plateau: schedulers.ReduceLROnPlateau | None = None
        if self.name == "plateau":
            self._plateau = schedulers.ReduceLROnPlateau(reference, min_lr=run.min_lr, eps=0.0, **settled)
        reference.step()  # else torch's schedulers warn that it never did

    @property
    def lr(self) -> float:
        """Of the groups with the largest initial lr; the others follow in proportion."""
        lr, run, end = self._group["lr"], self.run, SCHEDULES[self.name].end
        if self.steps_done < run.warmup_steps or run.lr == 0 or end not in ("floor", "lift"):
            return lr
        return max(lr, run.min_lr) if end == "floor" else lr + run.min_lr * (1.0 - lr / run.lr)

    def step(self) -> None:
        """After each optimizer step. Past the last step of the run the lr stays as it is."""
        if self.steps_done < self.run.steps:
            self._scheduler.step()
            self.steps_done += 1
        self._apply()

    def validated(self, loss: float) -> None:
        """After each validation: plateau looks at the loss, from the end of its warm-up on; others do nothing."""
        if self._plateau is not None and self.steps_done >= self.run.warmup_steps:
            self._plateau.step(float(loss))
            self._apply()

    def get_last_lr(self) -> list[float]:
        """The lr of each group."""
        return in_proportion(self.initial, self.lr)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, which torch.load(weights_only=True) reads."""
        return {
            "name": self.name,
            "run": asdict(self.run),
            "arguments": self.arguments,
            "steps_done": self.steps_done,
            "initial": self.initial,
            "reference": {key: self._group[key] for key in RATES if key in self._group},
            "scheduler": self._scheduler.state_dict(),
            "plateau": self._plateau and self._plateau.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was taken, with its settings; the groups get their lr at once.

        It may be that of a `Watched` schedule: what its file said no longer counts.

        Raises:
            ValueError: it is another schedule's, or of another number of groups.
        """
        if "entry" in state:
            state = state["schedule"]
        if state["name"] != self.name:
            raise ValueError(f"the state is that of a schedule {state['name']}, not {self.name}")
        if len(state["initial"]) != len(self.initial):
            raise ValueError(f"the state is of {len(state['initial'])} parameter groups, not {len(self.initial)}")
        state = copy.deepcopy(dict(state))  # torch's CyclicLR takes keys out of what it loads
        self._begin(Run(**state["run"]), state["arguments"])
        self.steps_done, self.initial = state["steps_done"], state["initial"]
        self._group.update(state["reference"])
        self._scheduler.load_state_dict(state["scheduler"])
        if self._plateau is not None:
            self._plateau.load_state_dict(state["plateau"])
        self._apply()

    def _apply(self) -> None:
        for group, lr in zip(self.optimizer.param_groups, self.get_last_lr(), strict=True):
            set_lr(group, lr)


def make(
    name: str,
    optimizer: Optimizer,
    *,
    steps: int,
    warmup_steps: int = 0,
    min_lr: float = 0.0,
    epoch_steps: float = 1.0,
    arguments: Arguments = NOTHING,
) -> Schedule:
    """The schedule `name` for the learning rates of any torch optimizer, over a run of `steps` optimizer steps.

    warmup_steps: of linear warm-up in front. min_lr: for the groups with the largest lr, for others in proportion.
    epoch_steps: optimizer steps in an epoch, for what decays by the epoch. arguments: `SCHEDULES[name].arguments`.

    Raises:
        ValueError: of one line, for what cannot be; see `check`.
    """
    run = Run(steps, warmup_steps, max(initial_lrs(optimizer)), min_lr, epoch_steps)
    check(name, steps, warmup_steps, run.lr, min_lr, epoch_steps, arguments)
    return Schedule(name, optimizer, run, arguments)
