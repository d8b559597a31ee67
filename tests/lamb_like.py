"""A two-pass rule for tests: LAMB's shape (direction, then a trust ratio of two norms), not a public rule.

Source: You et al. (2020), "Large Batch Optimization for Deep Learning", Algorithm 2, without its bias correction.
"""

from collections.abc import Iterable
from typing import Any

import triton
import triton.language as tl

from fusedopt.optimizer import FusedOptimizer
from fusedopt.rule import Rule, Slot
from fusedopt.values import div_eager, sqrt_eager
from fusedopt_kernels.numerics import div, sqrt


@triton.jit
def scalars(hyper, t):
    lr, wd, q1, q2 = hyper
    return lr, wd, q1, q2


def scalars_eager(hyper, t):
    lr, wd, q1, q2 = hyper
    return lr, wd, q1, q2


@triton.jit
def direction(g, p, state, s, EXACT: tl.constexpr):
    m = state[0] + s[2] * (g - state[0])
    v = state[1] + s[3] * (g * g - state[1])
    return div(m, sqrt(v, EXACT) + 1e-6, EXACT) + s[1] * p, (m, v)


def direction_eager(g, p, state, s):
    m = state[0] + s[2] * (g - state[0])
    v = state[1] + s[3] * (g * g - state[1])
    return div_eager(m, sqrt_eager(v) + 1e-6) + s[1] * p, (m, v)


@triton.jit
def measure(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    d, _ = direction(g, p, state, s, EXACT)
    return p, d


def measure_eager(g, p, state, s, VARIANT):
    d, _ = direction_eager(g, p, state, s)
    return p, d


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    d, new = direction(g, p, state, s, EXACT)
    ratio = tl.where((s[4] > 0.0) & (s[5] > 0.0), div(s[4], tl.where(s[5] > 0.0, s[5], 1.0), EXACT), 1.0)
    return (s[0] * ratio) * d, new


def update_eager(g, p, state, s, VARIANT):
    d, new = direction_eager(g, p, state, s)
    ratio = div_eager(s[4], s[5]) if s[4] > 0.0 and s[5] > 0.0 else 1.0
    return (s[0] * ratio) * d, new


RULE = Rule(
    name="lamb_like",
    hyper=("q1", "q2"),
    state=(Slot("exp_avg", "signed"), Slot("exp_avg_sq", "nonnegative")),
    n_scalars=4,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    decay="own",
    n_norms=2,
    measure=measure,
    measure_eager=measure_eager,
)


class LambLike(FusedOptimizer):
    rule = RULE

    def __init__(self, params: Iterable[Any], lr: float = 0.1, backend: str = "auto") -> None:
        super().__init__(params, dict(lr=lr, weight_decay=0.01, q1=0.1, q2=0.01), backend=backend)
