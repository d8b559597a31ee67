"""What a step can take: parameters and gradients are checked when a plan is made, before anything is changed."""

from itertools import pairwise
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusedopt_kernels.numerics import FLOAT_TYPES, REAL_TYPE
from fusedopt_kernels.state.format import StateFormat
from fusedopt_kernels.table import SCALE_GROUP as GROUP

from . import layout, shards
from .formats import REAL, is_quantised, is_random, slot_storage
from .groups import GroupOptions
from .rule import switched_on

if TYPE_CHECKING:
    from .stepper import Stepper


def check_supported(optimizer: "Stepper", p: Tensor, options: GroupOptions) -> None:
    """Refuse a parameter or gradient that a step cannot take."""
    name = type(optimizer).__name__
    if (grad := p.grad) is not None:
        if grad.layout == torch.sparse_coo:
            _check_sparse(name, p, options)
        elif grad.layout != torch.strided:
            raise RuntimeError(f"{name} does not support gradients of layout {grad.layout}")
        elif options.rule.sparse == "only":
            raise RuntimeError(f"{name} does not support dense gradients, please consider Adam instead")
        if grad.device != p.device or grad.shape != p.shape or grad.is_complex() != p.is_complex():
            raise RuntimeError(
                f"a gradient of shape {tuple(grad.shape)} and dtype {grad.dtype} on {grad.device} does not fit its "
                f"parameter of shape {tuple(p.shape)} and dtype {p.dtype} on {p.device}"
            )
        if grad.dtype not in (*FLOAT_TYPES, *REAL_TYPE):
            raise TypeError(f"{name} needs fp64, fp32, bf16, fp16 or complex gradients, got {grad.dtype}")
    if shards.is_dtensor(p) or shards.is_dtensor(p.grad):
        _check_sharded(optimizer, name, p, options)
    if not (p.is_floating_point() or p.is_complex()) or p.dtype.itemsize < 2 or p.dtype == torch.complex32:
        raise TypeError(f"{name} needs fp64, fp32, bf16, fp16 or complex parameters, got {p.dtype}")
    if layout.needs_resolving(p):
        raise RuntimeError(
            f"{name} cannot update a lazily conjugated or negated parameter in place; make it from "
            ".resolve_conj().resolve_neg()"
        )


def _check_sharded(optimizer: "Stepper", name: str, p: Any, options: GroupOptions) -> None:
    """Refuse a DTensor that a step cannot take; the same on every rank."""
    rule, chosen = options.rule, options.options
    if not shards.is_dtensor(p):
        raise RuntimeError(f"{name}: a gradient is a DTensor, its parameter of shape {tuple(p.shape)} is none")
    if p.grad is not None and (not shards.is_dtensor(p.grad) or p.grad.device_mesh != p.device_mesh):
        raise RuntimeError(
            f"{name}: the gradient of a DTensor parameter of shape {tuple(p.shape)} must be a DTensor on its mesh, got "
            f"{f'one on {p.grad.device_mesh}' if shards.is_dtensor(p.grad) else type(p.grad).__name__}"
        )
    if is_traceable_wrapper_subclass(local := shards.here(p)):
        raise NotImplementedError(
            f"{name}: local tensors of type {type(local).__name__} keep their numbers in other tensors; give the "
            "optimizer the parameters before they are wrapped"
        )
    if any(place.is_partial() for place in p.placements):
        raise RuntimeError(f"{name}: a parameter cannot have the placement Partial; redistribute it before training")
    if rule.kernel_part is not None or rule.eager_part is not None:
        raise NotImplementedError(
            f"{name} works on whole matrices and does not take DTensor parameters, of which a rank holds rows: use an "
            "element-wise rule such as AdamW for them, or replicate them as plain tensors"
        )
    for option, on in (("offload_state", optimizer._offload_state), ("norm_at_backward", optimizer._norm_at_backward)):
        if on:
            raise NotImplementedError(
                f"{option} does not take DTensor parameters: leave it out (FSDP2 offloads with CPUOffloadPolicy)"
            )
    forms = [slot_storage(slot, p, chosen) for slot in options.slots if slot.shape is None]
    quantised = [form for form in forms if isinstance(form, StateFormat)]
    for form in quantised:
        if not shards.keeps_groups(p, form):
            raise RuntimeError(
                f"{name}: quantised state of a parameter of shape {tuple(p.shape)} is kept in groups of {GROUP} "
                f"neighbours in a row, which the placements {tuple(p.placements)} on a mesh of "
                f"{tuple(p.device_mesh.shape)} would cut: shard it along dim 0, or so that every rank's part of a row "
                f"is a multiple of {GROUP} elements, or give it state_dtype='float32'"
            )
    draws = is_random(chosen) or any(form.dithered for form in quantised)
    if draws and p.dtype in REAL and shards.span_of(p) is None:
        raise RuntimeError(
            f"{name}: random rounding goes by the index in the whole tensor, which placements {tuple(p.placements)} "
            f"of a parameter of shape {tuple(p.shape)} break into pieces: shard at most one dim besides dim 0, evenly"
        )


def _check_sparse(name: str, p: Tensor, options: GroupOptions) -> None:
    """Refuse a sparse gradient that a rule cannot take, with torch's words where torch raises."""
    rule, lazy = options.rule, options.options.get("sparse") == "lazy"
    if rule.sparse in (None, "lazy") and not lazy:
        remedy = ", or pass sparse='lazy' to update touched rows only" if rule.sparse else ""
        raise RuntimeError(f"{name} does not support sparse gradients, please consider SparseAdam instead{remedy}")
    if not lazy and switched_on(options.hypers[1]):
        raise RuntimeError(
            f"weight_decay option is not compatible with sparse gradients: {name} would have to decay every row; use "
            "weight_decay=0, or sparse='lazy' where the rule has it"
        )
    if options.cautious:
        raise RuntimeError(f"{name}: cautious updates do not take sparse gradients yet")
    if p.grad is not None and p.grad.sparse_dim() > 1 and is_quantised(p, options.options, rule):
        raise RuntimeError(
            f"{name}: a gradient with {p.grad.sparse_dim()} sparse dimensions touches parts of rows, whose quantised "
            "state shares its scales with the rest; give that state state_dtype='float32', or the gradient one sparse "
            "dimension"
        )
    if not p.is_contiguous():
        raise RuntimeError(f"{name}: a parameter with sparse gradients must be contiguous, got strides {p.stride()}")


def check_distinct(params: list[Tensor], addresses: list[int]) -> None:
    """All segments are updated at once, so none may share memory with another."""
    seen: dict[int, Tensor] = {}
    for p, address in zip(params, addresses, strict=True):
        if p.numel() and address in seen:
            how = "a parameter is listed twice" if seen[address] is p else "two parameters share memory"
            raise ValueError(
                f"{how} in param_groups (shape {tuple(p.shape)}): it would be updated twice at once; list it once"
            )
        seen[address] = p
    ranges = [(a, a + p.nbytes, p.shape) for p, a in zip(params, addresses, strict=True) if layout.is_dense(p)]
    ranges.sort(key=itemgetter(0, 1))
    for (_, end, shape), (start, _, other) in pairwise(r for r in ranges if r[0] < r[1]):
        if start < end:
            raise ValueError(
                f"parameters of shapes {tuple(shape)} and {tuple(other)} in param_groups share memory: their common "
                "elements would be updated twice at once"
            )
