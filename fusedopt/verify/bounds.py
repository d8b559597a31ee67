"""Derived bounds on the error of one step, in ulps of the largest addend: what they are, how roundings are counted,
and those that several rules share. The others stand beside the oracle that needs them; each says why.

How roundings are counted. Arithmetic of d digits rounds a result x by at most ½ ulp(x) = u·|x| with u = 2^−d.
S is the largest addend, so every term |x| ≤ S.
 * A relative error u carried by a term costs u·|x|, at most 1 ulp(S): x may lie just below a power of two.
 * The last rounding, of a sum of two terms of at most S each (so at most 2S), costs ½ ulp(2S) = 1 ulp(S).
 * Signs, maxima and exact zeros cost nothing. The sums on the way are rounded relative to themselves; each is an
   addend as well. A constant of the step (β, lr, √(1 − βᵗ) …) is rounded once from float64.

Bounds are worst cases and loose for most elements; the limit on the rms (1.25 × torch's) is what catches a bias.
"""

from __future__ import annotations

from dataclasses import dataclass

from .formats import DType


@dataclass(frozen=True)
class Bound:
    """ulps: bound where storage is as long as arithmetic. extra64: added for float64. why: the derivation. share: what
    a step inside loses in every dtype, as a share of the largest addend.
    """

    ulps: float
    why: str
    extra64: float = 0.0
    share: float = 0.0

    def of(self, dtype: DType) -> float:
        """The bound for a dtype, in ulps of its storage format."""
        lost = self.share * 2.0**dtype.store.digits  # a number is less than so many ulps of itself
        if dtype.low:
            return LOW_STORAGE.ulps + lost
        return self.ulps + (self.extra64 if dtype.compute.digits == 53 else 0.0) + lost


LOW_STORAGE = Bound(
    2.0,
    "Arithmetic in fp32 is wrong by less than half a unit of bf16 or fp16, so its rounding and the reference's are "
    "equal or neighbours, one unit of the result apart. The result is at most 2S, where a unit is 2 ulp(S).",
)

SCALAR_SLOT = Bound(
    LOW_STORAGE.ulps,
    "One number for the parameter, computed in float64 and rounded once to fp32: as low storage, of fp32 in float64.",
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
L2_MOMENT = Bound(7.4, "As exp_avg, 4.4; g + λ·p adds constant, product and sum at the weight (1−β): 3.")
L2_SQUARE = Bound(11.1, "As exp_avg_sq, 5.1; the square doubles the 3 roundings of g + λ·p: 6.")
