"""SparseAdam: Adam on the rows that a sparse gradient touches; the others keep parameter and moments as they are.

    m ← m + (1 − β₁)·(g − m)               first moment
    v ← v + (1 − β₂)·(g² − v)              second moment
    p ← p − lr·√(1 − β₂ᵗ)/(1 − β₁ᵗ) · m/(√v + ε)

Source: Kingma & Ba (2015), "Adam: A Method for Stochastic Optimization", section 2 (the reordered form at its end),
restricted to rows as in torch.optim.SparseAdam; t counts the steps of the parameter, not of a row. No weight decay.
Differs from torch by rounding only: averages are written from the nearer end, and the step count is a tensor, but
in `state_dict`.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from fusedopt_kernels.numerics import (
    average,
    average_eager,
    average_weight,
    average_weight_eager,
    div,
    one_minus_power,
    one_minus_power_eager,
    sqrt,
)  # fmt: skip

from ..arguments import check_beta_range, check_lr, check_positive
from ..optimizer import FusedOptimizer
from ..options import Options
from ..values import div_eager, sqrt_eager, sqrt_scalar
from . import adam

STATE = adam.STATE[:2]


@triton.jit
def scalars(hyper, t):
    lr, _, beta1, beta2, eps = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t.to(tl.int64)
    step_size = lr * tl.sqrt(one_minus_power(q2, n)) / one_minus_power(q1, n)
    w1, w2 = average_weight(q1), average_weight(q2)
    return w1, w2, step_size, eps


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, beta1, beta2, eps = hyper
    q1, q2 = 1.0 - beta1, 1.0 - beta2
    n = t
    step_size = lr * sqrt_scalar(one_minus_power_eager(q2, n)) / one_minus_power_eager(q1, n)
    w1, w2 = average_weight_eager(q1), average_weight_eager(q2)
    return w1, w2, step_size, eps


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w1, w2, step_size, eps = s
    m = average(state[0], g, w1)
    v = average(state[1], g * g, w2)
    return step_size * div(m, sqrt(v, EXACT) + eps, EXACT), (m, v)


def update_eager(g, p, state, s, VARIANT):
    w1, w2, step_size, eps = s
    m = average_eager(state[0], g, w1)
    v = average_eager(state[1], g * g, w2)
    return step_size * div_eager(m, sqrt_eager(v) + eps), (m, v)


RULE = replace(
    adam.RULE,
    name="sparse_adam",
    state=STATE,
    n_scalars=4,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    structure=(),
    sparse="only",
)


class SparseAdam(FusedOptimizer):
    """Adam for sparse gradients; the maths stand at the top of this file.

    Args:
        params: dense, real parameters, named parameters or groups, whose gradients are sparse (COO).
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂) of the moments, default (0.9, 0.999). eps: ε added to the root, default 1e-8.
        maximize: ascend.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: an lr or eps that is not above 0, a beta outside [0, 1), a sparse or complex parameter.
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        check_lr(lr, positive=True)
        check_positive("epsilon", eps)
        check_beta_range(betas)
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, maximize=maximize), **options)
        places = [(p, [i, j]) for i, group in enumerate(self.param_groups) for j, p in enumerate(group["params"])]
        sparse = [at for p, at in places if p.is_sparse]
        if sparse:
            raise ValueError(f"Sparse params at indices {sparse}: SparseAdam requires dense parameter tensors")
        complex_ = [at for p, at in places if p.is_complex()]
        if complex_:
            raise ValueError(f"Complex params at indices {complex_}: SparseAdam does not support complex parameters")

    def state_dict(self) -> dict[str, Any]:
        """As torch's, whose step count is a Python number in this class: from a tensor it computes in fp32."""
        found = super().state_dict()
        for key, state in found["state"].items():
            if isinstance(step := state.get("step") if isinstance(state, dict) else None, torch.Tensor):
                found["state"][key] = {**state, "step": int(step)}
        return found
