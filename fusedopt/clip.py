"""`clip_grad_norm_` and `get_total_norm`: torch.nn.utils' functions, in three launches for any number of tensors.

One pass per gradient dtype reads every gradient, one launch makes the norm of it, one pass per dtype multiplies in
place. The norm is that of a step with ``clip_grad_norm``, bit for bit.
"""

import types
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._foreach_utils import _device_has_foreach_support
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fusedopt_kernels import table
from fusedopt_kernels.numerics import FLOAT_TYPES, REAL_TYPE

from . import clip_tables, layout, shards
from .clip_parts import Part, coefficient, is_wide
from .compiled import TAGS
from .groups import KINDS
from .pieces import is_fragment
from .ranks import over_ranks


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """As `torch.nn.utils.clip_grad_norm_`: scale gradients in place so that their norm is at most ``max_norm``.

    Returns the norm before clipping: 0-dim, on the first gradient's device, a plain tensor also for DTensors. Gradients
    may differ in dtype, device, mesh and placement.

    Differences from torch: the norm of bf16 and fp16 gradients, and what they are multiplied with, are fp32; sums are
    fp64 and overflow no earlier than the norm does; an empty gradient has inf-norm 0; parts of complex numbers are
    multiplied one by one; gradients on a mesh and others are taken together, the latter as equal on all ranks.

    Args:
        parameters: a tensor or tensors; those without gradient are left out.
        max_norm: largest norm; a tensor is read, as with torch, which waits for its device.
        norm_type: 1, 2 or inf.
        error_if_nonfinite: raise if the norm is inf or NaN; waits for the device.
        foreach: checked as torch does, selects nothing.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite``; a gradient has elements that share memory;
            parameters of FSDP1, of which a rank has pieces.
        ValueError: another norm_type. TypeError, NotImplementedError: gradients that torch's function is for.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        is_generator = isinstance(parameters, types.GeneratorType)
        parameters = list(parameters)
        if is_generator and not parameters:
            warnings.warn("`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=2)
    _check_tensors("parameters", parameters)
    if any(map(is_fragment, parameters)):
        raise RuntimeError(
            "clip_grad_norm_: parameters of FullyShardedDataParallel are this rank's pieces, whose norm is not the "
            "model's: call model.clip_grad_norm_(max_norm), or give the optimizer clip_grad_norm and norm_group"
        )
    grads = [p.grad for p in parameters if p.grad is not None]
    max_norm = float(max_norm)
    with torch.no_grad():
        kind = _kind("clip_grad_norm_", norm_type)
        shares = _split(grads, kind, foreach, writes=True)
        norm = _norm(shares, kind)
        if error_if_nonfinite:
            _check_finite(norm, norm_type)
        for share in shares:
            here = norm.to(share.device)
            if _traced(grads):
                _scale_traced(share.grads, here, max_norm)
            else:
                (share.part or clip_tables.part_of(share.grads)).scale(share.grads, here, max_norm)
                torch.autograd.graph.increment_version(share.dtensors)
    return norm


def get_total_norm(
    tensors: Tensor | Iterable[Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """As `torch.nn.utils.get_total_norm`: norm of all tensors as of one vector; see `clip_grad_norm_`."""
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    _check_tensors("tensors", tensors)
    with torch.no_grad():
        kind = _kind("get_total_norm", norm_type)
        norm = _norm(_split(tensors, kind, foreach, writes=False), kind)
        if error_if_nonfinite:
            _check_finite(norm, norm_type)
    return norm


class _Share(NamedTuple):
    """Gradients on one device, in sets.

    measured: what the norm is taken of, the gradients themselves or temporaries. sizes: gradients in every set; ranks:
    over which its sum is added up. wide: a gradient is fp64. dtensors: those that hold local gradients of this list.
    part: of all, if they need no preparation.
    """

    device: torch.device
    grads: list[Tensor]
    measured: list[Tensor]
    sizes: tuple[int, ...]
    ranks: tuple[shards.Ranks, ...]
    wide: bool
    dtensors: Sequence[Tensor] = ()
    part: Part | None = None


def _split(grads: list[Tensor], kind: int, foreach: bool | None, writes: bool) -> list[_Share]:
    """Gradients by device, then by ranks, in order; checked, unless they look like those of a call before."""
    if foreach:
        for device in {g.device for g in grads}:
            if not _device_has_foreach_support(device):
                raise RuntimeError(f"foreach=True was passed, but can't use the foreach API on {device.type} tensors")
    known = None if _traced(grads) or not grads else clip_tables.find(grads)
    if known is not None and not known.special:
        return [_Share(known.device, grads, grads, (len(grads),), (None,), known.wide, (), known)]
    found: dict[torch.device, dict[shards.Ranks, list[tuple[Tensor, Tensor, Tensor]]]] = {}
    for grad in grads:
        here, measured, ranks = shards.on_this_rank(grad) if shards.is_dtensor(grad) else (grad, grad, None)
        _check(here, writes)
        if here.is_complex() and kind != table.NORM_TWO.value:
            measured = _magnitudes(measured)
        found.setdefault(here.device, {}).setdefault(ranks, []).append((grad, here, measured))
    shares = []
    for device, sets in found.items():
        members = [member for of_ranks in sets.values() for member in of_ranks]
        own, measured = [here for _, here, _ in members], [m for _, _, m in members]
        dtensors = [grad for grad, here, _ in members if grad is not here]
        sizes = tuple(len(of_ranks) for of_ranks in sets.values())
        shares.append(_Share(device, own, measured, sizes, tuple(sets), is_wide(own), dtensors))
    return shares


def _norm(shares: Sequence[_Share], kind: int) -> Tensor:
    """The norm of all gradients, 0-dim on the first one's device: fp32, or fp64 if one is."""
    if not shares:
        return torch.tensor(0.0)
    first, wide = shares[0], any(share.wide for share in shares)
    traced = _traced(first.grads)
    if not traced and len(shares) == 1 and first.ranks == (None,):
        return (first.part or clip_tables.part_of(first.measured)).norm(first.measured, kind, wide)
    totals: list[Tensor] = []
    for share in shares:
        if traced:
            sums = _sums_op(share.measured, list(share.sizes), kind)
        else:
            sums = clip_tables.part_of(share.measured).sums(share.measured, share.sizes, kind)
        totals.extend(sums.unbind())
    totals = over_ranks(totals, [ranks for share in shares for ranks in share.ranks], kind)
    together = torch.stack([total.to(first.device) for total in totals])
    total = together.amax() if kind == table.NORM_INF.value else together.sum()
    norm = total.sqrt() if kind == table.NORM_TWO.value else total
    return norm if wide else norm.to(torch.float32)


# ------------------------------------------------------------------------------------------------------------ checks
def _kind(function: str, norm_type: Any) -> int:
    """One of table's ``NORM_…``."""
    value = float(norm_type)
    if value not in KINDS:
        raise ValueError(
            f"norm_type must be 1, 2 or inf, got {norm_type!r}; torch.nn.utils.{function} takes every other"
        )
    return KINDS[value]


def _check_tensors(name: str, tensors: Sequence[Any]) -> None:
    for t in tensors:
        if not isinstance(t, Tensor):
            raise TypeError(f"{name} must be a tensor or an iterable of tensors, got one of {type(t).__name__}")


def _check(grad: Tensor, writes: bool) -> None:
    """Refuse a gradient that cannot be measured or, ``writes``, multiplied in place."""
    if grad.layout != torch.strided:
        raise NotImplementedError(
            f"a gradient of layout {grad.layout} cannot be clipped, as with torch; make it dense, or clip it by value"
        )
    if grad.dtype not in (*FLOAT_TYPES, *REAL_TYPE):
        raise TypeError(f"gradients must be fp64, fp32, bf16, fp16, complex64 or complex128 to clip, got {grad.dtype}")
    if is_traceable_wrapper_subclass(grad):
        raise TypeError(
            f"a gradient of class {type(grad).__name__} has no memory of its own: clip with torch.nn.utils, which asks "
            "the class"
        )
    if writes and layout.overlaps_itself(grad):
        raise RuntimeError(
            f"a gradient of shape {tuple(grad.shape)} and strides {grad.stride()} has elements that share memory (an "
            "expanded tensor), so it cannot be clipped in place; clone() it first"
        )


def _check_finite(norm: Tensor, norm_type: float) -> None:
    if torch.logical_or(norm.isnan(), norm.isinf()):
        raise RuntimeError(
            f"The total norm of order {float(norm_type)} for gradients from `parameters` is non-finite, so it cannot "
            "be clipped. To disable this error and scale the gradients by the non-finite norm anyway, set "
            "`error_if_nonfinite=False`"
        )


def _magnitudes(t: Tensor) -> Tensor:
    """Magnitudes of complex numbers, whose real and imaginary parts only a 2-norm may take apart."""
    if not torch.compiler.is_compiling():
        layout.warn_once(
            "magnitudes",
            "the 1-norm or inf-norm of a complex gradient takes a temporary of its magnitudes; norm_type=2 takes none",
        )
    return t.abs()


# ---------------------------------------------------------------------------------------------- under torch.compile
def _traced(grads: Sequence[Tensor]) -> bool:
    """Whether only the look of tensors is known: under torch.compile, as fake tensors, on meta."""
    if torch.compiler.is_compiling():
        return True
    return bool(grads) and (grads[0].is_meta or isinstance(grads[0], FakeTensor))


def _scale_traced(grads: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
    """Every gradient times its coefficient; complex ones by torch, for inductor cannot let an op change them."""
    real = [g for g in grads if not g.is_complex()]
    if real:
        _scale_op(real, norm, max_norm)
    for g in grads:
        if g.is_complex():
            g.mul_(coefficient(norm, max_norm))


@torch.library.custom_op("fusedopt::norm_sums", mutates_args=(), tags=TAGS)
def _sums_op(grads: list[Tensor], sizes: list[int], kind: int) -> Tensor:
    return clip_tables.part_of(grads).sums(grads, tuple(sizes), kind)


@_sums_op.register_fake
def _(grads: list[Tensor], sizes: list[int], kind: int) -> Tensor:
    return grads[0].new_empty(len(sizes), dtype=torch.float64)


@torch.library.custom_op("fusedopt::scale_", mutates_args=("grads",), tags=TAGS)
def _scale_op(grads: list[Tensor], norm: Tensor, max_norm: float) -> None:
    clip_tables.part_of(grads).scale(grads, norm, max_norm)


@_scale_op.register_fake
def _(grads: list[Tensor], norm: Tensor, max_norm: float) -> None:
    return None
