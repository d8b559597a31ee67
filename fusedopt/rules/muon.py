"""Muon for matrices, with AdamW for everything else in the same optimizer.

    b ← b + (1 − μ)·(g − b)                momentum buffer
    u ← g + μ·(b − g)   if nesterov, else b
    x ← u/max(‖u‖, ε)                      in bf16 from here to o
    A ← x·xᵀ;   x ← a·x + (b'·A + c·A²)·x   ns_steps times, (a, b', c) = ns_coefficients
    o ← x                                  near the orthogonal matrix closest to u
    p ← p − (lr·r·o + lr·weight_decay·p)

r is √max(1, rows/columns), or 0.2·√max(rows, columns) with ``adjust_lr_fn="match_rms_adamw"``.

Source: Jordan et al. (2024), "Muon: An optimizer for hidden layers in neural networks", Algorithms 1 and 2; the second
r: Liu et al. (2025), "Muon is Scalable for LLM Training", eq. 4. As torch.optim.Muon, whose buffer is an average where
the first source has a sum, which leaves o as it is. Differs from it by rounding: decay and update are summed before
the one rounding, products of equal shapes are batched. And where torch 2.13 overwrites the momentum buffer of bf16
parameters by its normalised copy under ``nesterov=False``, here the buffer stays what it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
import triton
import triton.language as tl

from fusedopt_kernels.numerics import average, average_eager, average_weight, average_weight_eager

from ..arguments import check_at_least
from ..muon_eager import MuonEager
from ..muon_step import MuonTables
from ..optimizer import FusedOptimizer
from ..options import Options
from ..rule import Rule, Slot
from .adamw import RULE as ADAMW
from .adamw import AdamW

STATE = (Slot("momentum_buffer", "signed"),)


@triton.jit
def scalars(hyper, t):
    _, _, mu = hyper
    return average_weight(1.0 - mu), average_weight(mu)


def scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    _, _, mu = hyper
    return average_weight_eager(1.0 - mu), average_weight_eager(mu)


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    w, ahead = s
    b = average(state[0], g, w)
    u = average(g, b, ahead) if VARIANT[0] else b
    return 0.0 - u, (b,)


def update_eager(g, p, state, s, VARIANT):
    w, ahead = s
    b = average_eager(state[0], g, w)
    u = average_eager(g, b, ahead) if VARIANT[0] else b
    return 0.0 - u, (b,)


MOMENTUM = Rule(
    name="muon_momentum",
    hyper=("momentum",),
    state=STATE,
    n_scalars=2,
    scalars=scalars,
    scalars_eager=scalars_eager,
    update=update,
    update_eager=update_eager,
    structure=("nesterov",),
    decay="own",
    counts_in_state=False,
    cautious=False,
)
"""The first pass: its "new parameter" is u, see ``muon_step.py``."""


@triton.jit
def apply_scalars(hyper, t):
    lr, _, ratio = hyper
    return (lr * ratio,)


def apply_scalars_eager(hyper: tuple[float, ...], t: float) -> tuple[float, ...]:
    lr, _, ratio = hyper
    return (lr * ratio,)


@triton.jit
def apply_update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    return s[0] * g, state


def apply_update_eager(g, p, state, s, VARIANT):
    return s[0] * g, state


APPLY = Rule(
    name="muon_apply",
    hyper=("ratio",),
    state=(),
    n_scalars=1,
    scalars=apply_scalars,
    scalars_eager=apply_scalars_eager,
    update=apply_update,
    update_eager=apply_update_eager,
    decay="decoupled",
    counts_in_state=False,
)
"""The last pass: its "gradient" is o."""

RULE = replace(
    MOMENTUM,
    name="muon",
    decay="decoupled",
    kernel_part=partial(MuonTables, (MOMENTUM, APPLY)),
    eager_part=partial(MuonEager, (MOMENTUM, APPLY)),
)


class Muon(FusedOptimizer):
    """Muon; the maths stand at the top of this file.

    A list that mixes matrices and other parameters becomes two groups, matrices first. Embeddings and output layers,
    matrices that Muon is not meant for, go into groups of their own with ``"use_muon": False``, as do mixed groups
    that set options.

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        lr: learning rate per step, float or one-element tensor; default 1e-3.
        weight_decay: decoupled, default 0.1. momentum: μ in [0, 1), default 0.95. nesterov: look ahead; default True.
        ns_coefficients: (a, b', c), default (3.4445, −4.775, 2.0315). eps: ε, default 1e-7.
        ns_steps: iterations, default 5. adjust_lr_fn: None or "original", or "match_rms_adamw".
        adamw: options of AdamW (lr, betas, eps, weight_decay, amsgrad, maximize) by which it updates parameters with
            another number of dimensions than two and groups with ``"use_muon": False``; {} for its defaults. None,
            the default: only matrices are taken, as by torch.optim.Muon.
        options: what every optimizer here takes, see `fusedopt.Options`.

    Raises:
        ValueError: a negative lr, momentum or weight_decay, momentum ≥ 1, an unknown adjust_lr_fn; parameters that are
            no matrices without ``adamw``; a mixed group that sets options.
    """

    rule = RULE
    _adamw: dict[str, Any] | None = None

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        adamw: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> None:
        if isinstance(lr, torch.Tensor) and lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
        check_at_least("Learning rate", lr)
        check_at_least("momentum", momentum)
        if not momentum < 1.0:
            raise ValueError(f"momentum should be < 1 but is: {momentum}; the buffer would never see a gradient")
        check_at_least("weight decay", weight_decay)
        if adjust_lr_fn not in (None, "original", "match_rms_adamw"):
            raise ValueError(f"Adjust learning rate function {adjust_lr_fn} is not supported")
        defaults = dict(
            lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_coefficients=ns_coefficients,
            eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
        self._adamw = None if adamw is None else _adamw_defaults(adamw)
        super().__init__(params, defaults, **options)

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """AdamW's rule for groups with ``"use_muon": False``."""
        return self.rule if group.get("use_muon", True) else ADAMW

    def defaults_of(self, group: dict[str, Any]) -> dict[str, Any]:
        """Group keys of the rule that updates a group, with their defaults."""
        return self.defaults if group.get("use_muon", True) else self._adamw or {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or two where a group without options mixes matrices and other parameters.

        Raises:
            ValueError: see `Muon`; nothing is added then.
        """
        before, muon = len(self.param_groups), self.defaults
        try:
            for group in _split(param_group, muon, self._adamw):
                self.defaults = self.defaults_of(group) if isinstance(group, dict) else muon
                super().add_param_group(group)
                self.defaults = muon
        except Exception:
            self.defaults = muon
            del self.param_groups[before:]
            raise

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_adamw": self._adamw}


def _adamw_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """All group keys of AdamW with these options, checked as `AdamW` checks them."""
    known = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize")
    if unknown := set(options) - set(known):
        raise TypeError(f"adamw takes {', '.join(known)}; got {', '.join(map(repr, sorted(unknown)))}")
    return AdamW([torch.empty(0)], **options).defaults


def _split(group: Any, muon: Mapping[str, Any], adamw: Mapping[str, Any] | None) -> list[Any]:
    """The groups, each of one rule, that a group given by the user becomes; what torch refuses is left to it."""
    if not isinstance(group, dict) or isinstance(group["params"], set):
        return [group]
    params = [group["params"]] if isinstance(group["params"], torch.Tensor) else list(group["params"])
    group["params"] = params
    others = [p for p in params if _dims(p) != 2]
    choice = group.get("use_muon")
    if choice is None and others and adamw is not None:
        if len(others) == len(params):
            group["use_muon"] = False
            return [group]
        if clash := sorted((muon.keys() | adamw.keys()) & group.keys()):
            raise ValueError(
                f"a group that mixes matrices and other parameters sets {', '.join(clash)}: for which of them? Give "
                "matrices and others in groups of their own, those for AdamW with 'use_muon': False"
            )
        keys = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        if "param_names" in group:
            params = list(zip(group["param_names"], params, strict=True))
        return [
            {**keys, "params": [p for p in params if _dims(p) == 2]},
            {**keys, "params": [p for p in params if _dims(p) != 2], "use_muon": False},
        ]
    if choice is not None and not choice:
        if adamw is None:
            raise ValueError("a group with 'use_muon': False needs options for AdamW: pass adamw={...} to Muon")
    elif others:
        size = (others[0][1] if isinstance(others[0], tuple) else others[0]).size()
        raise ValueError(
            f"Muon only supports 2D parameters whereas we found a parameter with size: {size}; with adamw={{...}} "
            "AdamW updates those in the same optimizer"
        )
    return [group]


def _dims(p: Any) -> int:
    """Dimensions of a parameter or named parameter; of anything else two, so that torch refuses it."""
    p = p[1] if isinstance(p, tuple) else p
    return p.dim() if isinstance(p, torch.Tensor) else 2
