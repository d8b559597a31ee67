"""What the schedule-free optimizers share: the weights of their average, and switching between two sets of weights.

A parameter holds y, where gradients are taken, while training, and x, the average that is evaluated, otherwise:

    γ ← lr·min(t/warmup_steps, 1)
    c ← w/Σw,  w = tʳ·(largest γ so far)^weight_lr_power     0 where Σw is 0
    z ← z − γ·d
    y ← y + c·(z₋₁ − y) − γ·(1 − β·(1 − c))·d                x = (y − (1 − β)·z)/β is not stored

Source: Defazio, Yang, Mehta, Mishchenko, Khaled, Cutkosky (2024), "The Road Less Scheduled", eqs. 2–4 and Algorithm 1,
with the weights of its authors' package schedulefree 1.4.1. There t, Σw and the largest γ belong to a group; here each
parameter has its own, which differ only if some steps leave it without a gradient.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedopt_kernels.numerics import power, power_eager

from .average import refuse_swapped
from .masters import has_more, move_towards
from .optimizer import FusedOptimizer
from .rule import Slot, lookup
from .state import MASK

Z = Slot("z", "weight", "param")
SUMS = (Slot("weight_sum", "scalar", 0.0, wide=True), Slot("lr_max", "scalar", -1.0, wide=True))


@triton.jit
def weights(lr, beta, r, lr_power, warmup, t, state):
    """γ, c, γ·(1 − β·(1 − c)) and the new sums."""
    rate = tl.where(t < warmup, lr * (t / warmup), lr)
    lr_max = tl.where(rate > state[1], rate, state[1])
    weight = power(t, r) * power(lr_max, lr_power)
    weight_sum = state[0] + weight
    c = tl.where(weight_sum != 0.0, weight / weight_sum, 0.0)
    return rate, c, rate * (1.0 - beta * (1.0 - c)), (weight_sum, lr_max)


def weights_eager(lr: float, beta: float, r: float, lr_power: float, warmup: float, t: float, state: Any) -> Any:
    """Eager twin of `weights`."""
    rate = lr * (t / warmup) if t < warmup else lr
    lr_max = rate if rate > state[1] else state[1]
    weight = power_eager(t, r) * power_eager(lr_max, lr_power)
    weight_sum = state[0] + weight
    c = weight / weight_sum if weight_sum != 0.0 else 0.0
    return rate, c, rate * (1.0 - beta * (1.0 - c)), (weight_sum, lr_max)


@triton.jit
def move(y, z, d, rate, c, pull):
    """Descent of y, and new z."""
    toward = tl.where(c != 0.0, c * (z - y), 0.0)
    return pull * d - toward, z - rate * d


def move_eager(y: Any, z: Any, d: Any, rate: Any, c: Any, pull: Any) -> Any:
    """Eager twin of `move`."""
    toward = c * (z - y) if c != 0.0 else 0.0
    return pull * d - toward, z - rate * d


class ScheduleFree(FusedOptimizer):
    """Base of the schedule-free optimizers: `train` and `eval` choose which weights the parameters hold."""

    _beta: str
    """Group key of β, an entry of it or itself, as `Rule.hyper` writes it."""

    def step(self, closure: Callable[[], Any] | None = None, *, total_norm: float | Tensor | None = None) -> Any:
        """As `FusedOptimizer.step`.

        Raises:
            RuntimeError: a group is not in train mode. Optimizers begin in it, the authors' outside: there y = x still.
        """
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__}.step() needs train mode, in which parameters hold the weights that gradients "
                "are taken at: call optimizer.train() before training, and optimizer.eval() before evaluating or saving"
            )
        return super().step(closure, total_norm=total_norm)

    def train(self) -> None:
        """Let the parameters hold y, for training. Does nothing where they do."""
        self._switch(True)

    def eval(self) -> None:
        """Let the parameters hold the average x, to evaluate or save. Does nothing where they do."""
        self._switch(False)

    @torch.no_grad()
    def _switch(self, training: bool) -> None:
        refuse_swapped(self, "train()" if training else "eval()")
        for group in self.param_groups:
            if bool(group["train_mode"]) == training:
                continue
            beta = float(lookup(group, self._beta))
            weight = 1.0 - beta if training else 1.0 - 1.0 / beta
            averaged = [p for p in group["params"] if "z" in self.state.get(p, {})]
            params = [p for p in averaged if not has_more(p, group)]
            masks = [(p, m, p.clone()) for p in params if (m := self.state[p].get(MASK)) is not None]
            if params:
                ends = [self.state[p]["z"].to(p) for p in params]
                torch._foreach_lerp_(params, ends, weight)  # pyright: ignore[reportPrivateImportUsage] # has no other name
            for p, mask, before in masks:
                p.copy_(torch.where(mask, p, before))
            for p in averaged:
                if has_more(p, group):
                    move_towards(self, p, self.state[p]["z"], weight, group)
            group["train_mode"] = training
