"""Every tolerance of the tests, each with its derivation. What is not listed here is compared bit for bit.

The bounds on one step against the oracle are needed by `fusedopt verify` at run time and stand in
`fusedopt/verify/bounds.py`; they are part of this table.
"""

from dataclasses import dataclass

from fusedopt.verify.bounds import BOUNDS, Bound
from fusedopt.verify.check import RMS_FACTOR

__all__ = ["BOUNDS", "RMS_FACTOR", "TOLERANCES", "Bound", "Tolerance"]


@dataclass(frozen=True)
class Tolerance:
    """value: the tolerance. unit: what it is in. why: its derivation."""

    value: float
    unit: str
    why: str


TOLERANCES = {
    "oracle, torch in float64": Tolerance(
        2e-12,
        "share of the largest value",
        "torch computes 1 − β₂ᵗ as a difference of floats: 1.1e-16/0.001 = 1.1e-13 relative at small t, half of it "
        "in the root; four steps, and 9 for roundings of the moments.",
    ),
    "oracle, 40 digits": Tolerance(
        1e-17,
        "relative",
        "About 25 longdouble operations of 5.4e-20 each (64-bit mantissa), times the error growth t = 1000 of the "
        "exponent in βᵗ, which is weighed by βᵗ/(1 − βᵗ) ≤ 0.6: 3e-18.",
    ),
    "torch.optim": Tolerance(
        8.0,
        "ulp of the largest addend, per step",
        "A step rounds at most 8 times in torch (decay 2, average 3, update 3) and as often here, by half an ulp "
        "each; errors of the moments reach the parameter times lr/√v̂ · |g| ≤ lr·√t < 1 in the few steps tested.",
    ),
    "long run": Tolerance(
        RMS_FACTOR,
        "× torch's largest rms",
        "Errors of single steps have at most this ratio (DESIGN §7), and both runs pass them on by the same factors.",
    ),
}
"""Name → tolerance."""
