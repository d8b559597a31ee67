"""Adafactor: second moments of matrices kept as row and column averages, steps relative to the parameter's size.

    w ← t^τ                                 τ = beta2_decay
    R ← R + w·(mean of g² along rows − R)   of the last two dimensions, and so on
    C ← C + w·(mean of g² along columns − C)
    V ← R·C/max(mean of R, ε₁)              vectors and scalars keep V ← V + w·(g² − V) itself
    U ← g/√max(V, ε₁²)
    ρ ← min(lr, 1/√t)
    α ← max(ε₂, RMS(p))·ρ/max(1, RMS(U)/d)
    p ← p − (α·U + lr·weight_decay·p)

Source: Shazeer & Stern (2018), "Adafactor: Adaptive Learning Rates with Sublinear Memory Cost", Algorithms 4 and 5. As
torch.optim.Adafactor, lr stands for the paper's 10⁻² in ρ, means for sums, and ε₁ (by default the machine epsilon of
the parameter's dtype) bounds V and not each g². Differs from it: sums are fp64, and decay and update are summed before
the one rounding; V is R/mean·C, which overflows no sooner than g²; the default of ε₁ is that of each parameter's dtype,
where torch takes the first one's for its whole group.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
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
    maximum,
    power,
    power_eager,
    sqrt,
)  # fmt: skip

from .. import adafactor_eager, adafactor_step
from ..arguments import check_at_least, check_number
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from ..values import div_eager, maximum_eager, sqrt_eager, sqrt_scalar


def rows(p: torch.Tensor) -> tuple[int, ...] | None:
    """Shape of the row averages of a parameter of at least two dimensions."""
    return (*p.shape[:-1], 1) if p.dim() > 1 else None


def columns(p: torch.Tensor) -> tuple[int, ...] | None:
    """Shape of its column averages."""
    return (*p.shape[:-2], 1, p.shape[-1]) if p.dim() > 1 else None


def whole(p: torch.Tensor) -> tuple[int, ...] | None:
    """Shape of the variances of a vector or scalar."""
    return tuple(p.shape) if p.dim() <= 1 else None


STATE = (
    Slot("row_var", "nonnegative", shape=rows),
    Slot("col_var", "nonnegative", shape=columns),
    Slot("variance", "nonnegative", shape=whole),
)


@triton.jit
def scalars(hyper, t):
    lr, _, beta2_decay, eps1, eps2, d, floor = hyper
    w = average_weight(power(t, beta2_decay))
    relative = 1.0 / tl.sqrt(t)
    rho = tl.where(relative < lr, relative, lr)
    return w, eps1, floor, rho, eps2, d


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, beta2_decay, eps1, eps2, d, floor = hyper
    w = average_weight_eager(power_eager(t, beta2_decay))
    relative = 1.0 / sqrt_scalar(t)
    rho = relative if relative < lr else lr
    return w, eps1, floor, rho, eps2, d


@triton.jit
def direction(g, v, s, EXACT: tl.constexpr):
    return div(g, sqrt(maximum(v, s[2]), EXACT), EXACT)


def direction_eager(g, v, s):
    return div_eager(g, sqrt_eager(maximum_eager(v, s[2])))


@triton.jit
def step_size(s, EXACT: tl.constexpr):
    _, _, _, rho, eps2, d, p_norm, u_norm, n = s
    root = sqrt(n, EXACT)
    size, excess = div(p_norm, root, EXACT), div(div(u_norm, root, EXACT), d, EXACT)
    alpha = tl.where(size > eps2, size, eps2) * rho
    return tl.where(rho > 0.0, div(alpha, tl.where(excess > 1.0, excess, 1.0), EXACT), 0.0)


def step_size_eager(s):
    _, _, _, rho, eps2, d, p_norm, u_norm, n = s
    root = sqrt_eager(n)
    size, excess = div_eager(p_norm, root), div_eager(div_eager(u_norm, root), d)
    alpha = (size if size > eps2 else eps2) * rho
    return alpha / (excess if excess > 1.0 else 1.0) if rho > 0.0 else 0.0


@triton.jit
def measure(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    v = average(state[0], g * g, s[0])
    return p, direction(g, v, s, EXACT)


def measure_eager(g, p, state, s, VARIANT):
    v = average_eager(state[0], g * g, s[0])
    return p, direction_eager(g, v, s)


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    v = average(state[0], g * g, s[0])
    return step_size(s, EXACT) * direction(g, v, s, EXACT), (v,)


def update_eager(g, p, state, s, VARIANT):
    v = average_eager(state[0], g * g, s[0])
    return step_size_eager(s) * direction_eager(g, v, s), (v,)


VECTORS = Rule(
    name="adafactor_vectors",
    hyper=("beta2_decay", "eps.0", "eps.1", "d", "floor"),
    state=STATE,
    n_scalars=6,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="decoupled",
    n_norms=2,
    measure=measure,
    measure_eager=measure_eager,
)
"""The rule of vectors and scalars; ``floor`` is ε₁², see ``adafactor_step.py``."""


def matrix_measure_eager(g, p, state, s, VARIANT):
    return p, direction_eager(g, state[0], s)


def matrix_update_eager(g, p, state, s, VARIANT):
    return step_size_eager(s) * direction_eager(g, state[0], s), state


MATRICES = replace(
    VECTORS,
    name="adafactor",
    measure=direction,
    measure_eager=matrix_measure_eager,
    update=step_size,
    update_eager=matrix_update_eager,
)
"""The rule of matrices: its kernels (``factored.py``) take direction and step size, its twins see V as their state."""

RULE = replace(
    VECTORS,
    name="adafactor",
    hyper=("beta2_decay", "eps.0", "eps.1", "d"),
    measures=False,
    kernel_part=partial(adafactor_step.parts, (MATRICES, VECTORS)),
    eager_part=partial(adafactor_eager.parts, (MATRICES, VECTORS)),
    small=adafactor_step.small,
)


class Adafactor(FusedOptimizer):
    """Adafactor; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: largest relative step size, and factor of the decay; float or one-element tensor, default 1e-2.
        beta2_decay: τ ≤ 0, default −0.8. eps: (ε₁ or None, ε₂), default (None, 1e-3). d: threshold ≥ 1, default 1.
        weight_decay: decoupled, default 0. maximize: ascend.
        foreach: checked as torch does, then selects nothing.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, ε or weight_decay, a positive beta2_decay, d < 1.
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        check_at_least("Learning rate", lr)
        check_number("beta2_decay", beta2_decay)
        if not beta2_decay <= 0.0:
            raise ValueError(f"beta2_decay should be <= 0 but is: {beta2_decay}")
        if not isinstance(eps, tuple | list) or len(eps) != 2:
            raise ValueError(f"eps must be a pair (epsilon1 or None, epsilon2), got {eps!r}")
        if eps[0] is not None:
            check_at_least("epsilon1", eps[0])
        check_at_least("epsilon2", eps[1])
        check_at_least("Clipping threshold d", d, 1)
        check_at_least("weight_decay", weight_decay)
        defaults = dict(
            lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay, foreach=foreach, maximize=maximize
        )  # fmt: skip
        super().__init__(params, defaults, **options)
