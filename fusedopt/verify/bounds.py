"""Derived bounds on the error of one step, in ulps of the largest addend. One table; each entry says why.

How roundings are counted. Arithmetic of d digits rounds a result x by at most ½ ulp(x) = u·|x| with u = 2^−d.
S is the largest addend, so every term |x| ≤ S.
 * A relative error u carried by a term costs u·|x|, at most 1 ulp(S): x may lie just below a power of two.
 * The last rounding, of a sum of two terms of at most S each (so at most 2S), costs ½ ulp(2S) = 1 ulp(S).
 * Signs, maxima and exact zeros cost nothing. The sums on the way are rounded relative to themselves; each is an
   addend as well. A constant of the step (β, lr, √(1 − βᵗ) …) is rounded once from float64.

Bounds are worst cases and loose for most elements; the limit on the rms (1.25 × torch's) is what catches a bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .formats import DType
from .oracle import Configuration


@dataclass(frozen=True)
class Bound:
    """ulps: bound where storage is as long as arithmetic. extra64: added for float64. why: the derivation."""

    ulps: float
    why: str
    extra64: float = 0.0

    def of(self, dtype: DType) -> float:
        """The bound for a dtype, in ulps of its storage format."""
        if dtype.low:
            return LOW_STORAGE.ulps
        return self.ulps + (self.extra64 if dtype.compute.digits == 53 else 0.0)


LOW_STORAGE = Bound(
    2.0,
    "Arithmetic in fp32 is wrong by less than half a unit of bf16 or fp16, so its rounding and the reference's are "
    "equal or neighbours, one unit of the result apart. The result is at most 2S, where a unit is 2 ulp(S).",
)

MOMENT = Bound(
    4.4,
    "m + (1−β)(g − m) with β ≥ 0.9: constant, difference and product each err by u of (1−β)|g − m| ≤ (1−β)|g| + "
    "β|m|/9 ≤ 10/9·S, which is 3.34; the sum is at most 2S: 1.",
)
SQUARE = Bound(
    5.1,
    "v + (1−β)(g² − v), β ≥ 0.99: 1 for the square; constant, difference and product 3·(1 + 1/99) as both g² and v "
    "are positive; the sum 1.",
)
BIAS_64 = Bound(
    4.1,
    "float64 only: 1 − βᵗ by repeated squaring errs by 3e-16 = 2.7 u, once in A and half of it in C, 2.7 + 1.35. "
    "In fp32 this is 1e-8 of a unit.",
)
ADAM_STEP = Bound(
    15.0,
    "p − A·m/(√v·C + ε). In m 3.34 as for exp_avg, and its sum's u. In √v half of v's 5 u, and u of the root; C and "
    "its product 2 u, the sum with ε 1 u, division 1, A and its product 2: with m's sum 10.5 u of the update, which "
    "is an addend. The last sum 1. Together 14.9.",
    extra64=BIAS_64.ulps,
)
ADAMW_STEP = Bound(
    16.0,
    "As for Adam, 14.9, and one more rounding of the sum update + decay. The decay's own two roundings are 2 u of "
    "lr·λ·p, at most 1e-3 of p.",
    extra64=BIAS_64.ulps,
)
L2_MOMENT = Bound(7.4, "As exp_avg, 4.4; g + λ·p adds constant, product and sum at the weight (1−β): 3.")
L2_SQUARE = Bound(11.1, "As exp_avg_sq, 5.1; the square doubles the 3 roundings of g + λ·p: 6.")
L2_STEP = Bound(
    21.0,
    "As Adam, 15; g + λ·p adds 3 through m, and half of 6 through v, weighed by the share of its addends in v: 3.",
    extra64=BIAS_64.ulps,
)

SGD_PLAIN = Bound(3.0, "p − lr·g: lr and the product 2, the sum 1.")
SGD_L2 = Bound(6.0, "g + λ·p: constant, product and sum 3; lr and its product 2, the last sum 1.")
BUFFER = Bound(5.0, "μ·b + (1−τ)·g: two constants and two products 4, the sum 1.")
BUFFER_STEP = Bound(8.0, "p − lr·b: the buffer's 4 and 1 for its sum, lr and its product 2, the last sum 1.")
BUFFER_L2 = Bound(8.0, "As the buffer, 5, with 3 roundings of g + λ·p.")
NESTEROV_STEP = Bound(
    17.0, "d = g + μ·b: the buffer's 8, μ and its product 2, g + λ·p again 3, the sum 1; lr·d 2; the last sum 1."
)

NEAR_MOMENT = Bound(
    5.3,
    "β < 0.5: g − β(g − m). Constant, difference and product 3 of β(|g| + |m|), which at β = 0.3 is at most 1.43 of "
    "the largest addend, 4.3; the sum 1. At β = 0 the product vanishes.",
)
NEAR_STEP = Bound(16.0, "As Adam, 14.9, with 4.3 instead of 3.34 in m.", extra64=BIAS_64.ulps)

_ADAM = {"exp_avg": MOMENT, "exp_avg_sq": SQUARE, "max_exp_avg_sq": SQUARE, "param": ADAM_STEP}
_ADAMW = {**_ADAM, "param": ADAMW_STEP}

BOUNDS: Mapping[tuple[str, str], Mapping[str, Bound]] = {
    ("adam", "plain"): _ADAM,
    ("adam", "amsgrad"): _ADAM,
    ("adam", "maximize"): _ADAM,
    ("adam", "weight decay"): {"exp_avg": L2_MOMENT, "exp_avg_sq": L2_SQUARE, "param": L2_STEP},
    ("adam", "beta1 0"): {**_ADAM, "exp_avg": NEAR_MOMENT, "param": NEAR_STEP},
    ("adam", "beta1 0.3"): {**_ADAM, "exp_avg": NEAR_MOMENT, "param": NEAR_STEP},
    ("adamw", "plain"): _ADAMW,
    ("adamw", "amsgrad"): _ADAMW,
    ("sgd", "plain"): {"param": SGD_PLAIN},
    ("sgd", "weight decay"): {"param": SGD_L2},
    ("sgd", "momentum"): {"momentum_buffer": BUFFER, "param": BUFFER_STEP},
    ("sgd", "dampening"): {"momentum_buffer": BUFFER, "param": BUFFER_STEP},
    ("sgd", "nesterov"): {"momentum_buffer": BUFFER_L2, "param": NESTEROV_STEP},
}
"""(rule, configuration) → slot or ``"param"`` → bound."""


def bound(configuration: Configuration, slot: str, dtype: DType) -> float:
    """Derived bound in ulps of the largest addend, in the dtype's storage format."""
    return BOUNDS[configuration.rule, configuration.name][slot].of(dtype)
