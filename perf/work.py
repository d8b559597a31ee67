"""What is done to the parameters, and what they are kept in. Everybody's AdamW has the same hyper-parameters."""

from dataclasses import dataclass
from typing import Any

import torch

ADAMW: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
MAX_NORM = 1.0


@dataclass(frozen=True)
class Work:
    """clip: gradients are clipped to `MAX_NORM`. scaled: they carry a loss scale, which a GradScaler removes; a step
    with what is not finite is skipped.
    """

    name: str
    title: str
    clip: bool = False
    scaled: bool = False


WORKS = {
    work.name: work
    for work in (
        Work("step", "step"),
        Work("clip", "clip + step", clip=True),
        Work("amp", "unscale + clip + step", clip=True, scaled=True),
    )
}


@dataclass(frozen=True)
class Format:
    """dtype: of parameters and gradients. held: bytes per parameter that a contender holds at most, gradient included.
    tolerance: largest error of the change of the weights, ‖p − p*‖ / ‖p* − p₀‖ against float64 steps.
    """

    name: str
    title: str
    dtype: torch.dtype
    held: float
    tolerance: float


FORMATS = {
    form.name: form
    for form in (
        Format("fp32", "fp32 throughout", torch.float32, 20, 2e-5),
        Format("bf16", "bf16 weights that lose nothing, fp32 moments", torch.bfloat16, 22, 2.5e-3),
        Format("half", "bf16 weights that lose nothing, bf16 moments", torch.bfloat16, 14, 5e-3),
        Format("int8", "bf16 weights, low-bit moments", torch.bfloat16, 10, 5e-2),
    )
}
"""Tolerances: three steps of lr 0.01 on weights of 0.02. fp32: 3·2⁻²⁴ of sums up to 0.1 beside changes of 0.03, ten
times over. bf16: weights of float64 rounded once are found again but for gradients that are clipped in place, in bf16,
1.7e-3; weights rounded in every step are 4e-3 off. half: rounding to 8 bits, an rms of 2⁻⁸/√12 of weights up to 0.05
beside changes of 0.03, three times over. int8: a 128th of a group's largest moment, in both of them."""
