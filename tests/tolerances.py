"""Every tolerance of the tests, each with its derivation. What is not listed here is compared bit for bit.

The bounds on one step against the oracle are needed by `fusedopt verify` at run time and stand beside each oracle in
`fusedopt/verify/oracles/` and, where rules share them, in `fusedopt/verify/bounds.py`; they are part of this table.
"""

from dataclasses import dataclass

from fusedopt.verify.bounds import Bound
from fusedopt.verify.check import RMS_FACTOR
from fusedopt.verify.oracles import ORACLES

__all__ = ["BOUNDS", "RMS_FACTOR", "TOLERANCES", "Bound", "Tolerance"]


BOUNDS = {(rule, name): slots for rule, oracle in ORACLES.items() for name, slots in oracle.bounds.items()}
"""(rule, configuration) → slot or ``"param"`` → bound on one step."""


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
        "in the root; eight steps, and 7 for roundings of the moments.",
    ),
    "oracle, plain float64": Tolerance(
        2e-12,
        "share of the largest value",
        "1 − βᵗ as a difference of floats: 1.1e-16/0.001 = 1.1e-13 relative at small t, half of it in the root, for "
        "ten steps or so; 50 steps of about 15 roundings.",
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
    "packages": Tolerance(
        1e-12,
        "share of the largest value, or of 1",
        "Up to 20 roundings in a step of either side, of 1.1e-16, over 50 steps: 2.2e-13; 1 − βᵗ as a difference of "
        "floats adds 1.1e-16/(1 − β) ≤ 1.1e-13 of a step, for β₃ = 0.9999 1.1e-12 of one of lr = 0.01.",
    ),
    "bf16, one step": Tolerance(
        4e-6,
        "of the largest value, or of 1; beside half an ulp of bf16",
        "At most 30 roundings in fp32 of 6e-8 each of terms at most twice the largest value.",
    ),
    "Adafactor, bf16": Tolerance(
        1e-2,
        "share of lr, one step",
        "Row and column averages are rounded to bf16 before the step uses them: 2⁻⁹ each in R, C and their mean, "
        "half of it in the root, of a step of at most lr·RMS(p)·|U| ≤ 3 lr.",
    ),
    "Muon": Tolerance(
        0.05,
        "share of lr·√(longer side), per step",
        "Newton–Schulz runs in bf16: an input that rounds to the other side differs by 2⁻⁸, and two iterations stretch "
        "small singular values 3.44 times each.",
    ),
    "float32 factors": Tolerance(
        4e-7,
        "share of lr, per step, under float64 parameters",
        "NAdam: torch rounds μ and Πμ to fp32 before it uses them, we use them as computed: 1.2e-7 relative in Π, "
        "passed on to 1/(1 − Π) by Π/(1 − Π) ≤ 1.3 (μ ≤ 0.56), of a step of at most 2.5 lr. ASGD: η is kept in "
        "fp32, but in fp64 once torch has loaded it: 6e-8 of a step of at most 2 lr.",
    ),
    "fp64 norm": Tolerance(
        64.0,
        "ulp of the larger of 1 and the value",
        "Kernels and twins sum squares in another order: norms of fp64 gradients agree within 4 ulp (DESIGN §4); a "
        "ratio of two of them 8; times lr up to 10 in the rows tried, at each of up to three steps: below 3·8·2.",
    ),
    "long run": Tolerance(
        RMS_FACTOR,
        "× torch's largest rms",
        "Errors of single steps have at most this ratio (DESIGN §7), and both runs pass them on by the same factors.",
    ),
    "trainers": Tolerance(
        1e-8,
        "losses up to 200, norms of their gradients up to 100; weights",
        "Float64: clipped gradients (at most 0.5, or 2) differ by 20 roundings of 1.1e-16, a step multiplies that by "
        "lr = 0.01 and divides it by √v̂ ≥ 1e-5: 4e-12, at each of six steps. A loss passes it on by the gradient's "
        "norm, its norm by a second derivative: below 400 here.",
    ),
    "trainers, float32": Tolerance(
        1e-3,
        "relative, of norms of gradients",
        "As above with roundings of 6e-8 and √v̂ ≥ 1e-2: 6e-6 in the weights after five steps, times 400 by the second "
        "derivative, of norms above 5.",
    ),
    "trainers, bf16": Tolerance(
        2e-2,
        "relative, of losses",
        "Weights that differ by roundings may round to neighbours in a bf16 or fp16 forward pass, 2⁻⁸ apart: up to 2⁻⁷ "
        "of the output, twice that of its square.",
    ),
}
"""Name → tolerance."""
