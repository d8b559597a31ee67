"""Gradient norm in eager PyTorch: fp64 sums per gradient, then over gradients in order."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import layout


def eager_norm(grads: Sequence[Tensor]) -> tuple[float, bool]:
    """(L2 norm of all gradients, whether every element is finite).

    Rounded to fp32 once, unless a gradient is fp64 or the norm lies beyond fp32's range; agrees with the kernels
    within one ulp.
    """
    total, finite, wide = 0.0, True, False
    for grad in grads:
        x = layout.flat(grad)
        wide = wide or x.dtype == torch.float64
        for block in x.split(65536):
            total += float(block.double().square().sum())
            finite = finite and bool(torch.isfinite(block).all())
    norm = math.sqrt(total) if total == total else math.nan
    narrow = float(torch.tensor(norm, dtype=torch.float64).float())
    return (norm if wide or narrow == math.inf else narrow), finite


def clip_coefficient(norm: float, limit: float) -> float:
    """min(1, limit / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_; no threshold is an infinite one."""
    ratio = limit / (norm + 1e-6)
    return 1.0 if ratio >= 1.0 or limit == math.inf else ratio
