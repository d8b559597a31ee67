"""AdamW: Adam with decoupled weight decay.

    m, v, v̂  as in adam.py
    p ← p − lr·weight_decay·p − lr/(1 − β₁ᵗ) · m / (√v̂/√(1 − β₂ᵗ) + ε)

Source: Loshchilov & Hutter (2019), "Decoupled Weight Decay Regularization", Algorithm 2, with the decay multiplied
by lr as torch.optim.AdamW does. torch first rounds p·(1 − lr·weight_decay), which loses all decay in bf16 below
lr·weight_decay ≈ 2e-3 and biases it in fp32; here decay and update are summed in fp32 and rounded once.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Unpack

import torch

from ..options import Options
from . import adam

RULE = replace(adam.RULE, name="adamw", decay="decoupled")


class AdamW(adam.Adam):
    """AdamW; the maths stand at the top of this file.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        betas: decay rates (β₁, β₂) of the moments, floats or one-element tensors, default (0.9, 0.999).
        eps: ε added to the root, default 1e-8. weight_decay: multiplied by lr, default 1e-2.
        amsgrad: use the largest second moment so far. maximize: ascend.
        foreach, capturable, fused: checked as torch does, then select nothing (every step is capturable).
        differentiable: refused when True.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, eps or weight_decay, a beta outside [0, 1).
    """

    rule = RULE

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        betas: tuple[float | torch.Tensor, float | torch.Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, foreach=foreach, maximize=maximize,
            capturable=capturable, differentiable=differentiable, fused=fused, decoupled_weight_decay=True,
            **options,
        )  # fmt: skip
