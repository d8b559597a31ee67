"""Tensors that are DTensors: what lies on this rank, and sums over the ranks that hold the rest."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt_kernels import table

from . import layout

Ranks = tuple[Any, tuple[int, ...]] | None
"""(mesh, dims over which a tensor's elements are shared out); None: this rank has all of them."""


def is_dtensor(t: Tensor) -> bool:
    """Whether a tensor is spread over a mesh."""
    return type(t) is not Tensor and hasattr(t, "device_mesh")


def on_this_rank(t: Any) -> tuple[Tensor, Tensor, Ranks]:
    """(local tensor, the same with partial sums added up, ranks that hold the other elements) of a DTensor."""
    partial = any(place.is_partial() for place in t.placements)
    whole = _reduced(t) if partial else t
    dims = tuple(i for i, place in enumerate(whole.placements) if not place.is_replicate())
    here = _arrived(t.to_local())
    return here, _arrived(whole.to_local()) if partial else here, (t.device_mesh, dims) if dims else None


def _reduced(t: Any) -> Any:
    """Partial sums of the ranks added up, in a temporary."""
    from torch.distributed.tensor import Replicate

    if not torch.compiler.is_compiling():
        layout.warn_once(
            "partial",
            "the norm of a DTensor gradient with a Partial placement needs its sum over the ranks, a temporary of its "
            "size; redistribute such gradients before clipping to save it",
        )
    return t.redistribute(placements=[Replicate() if place.is_partial() else place for place in t.placements])


def over_ranks(totals: Sequence[Tensor], ranks: Sequence[Ranks], kind: int) -> list[Tensor]:
    """Each 0-dim fp64 total added up (of kind inf: the largest) over its ranks: a collective per mesh and dim."""
    out = list(totals)
    axes = dict.fromkeys(
        (r[0], dim, total.device) for total, r in zip(totals, ranks, strict=True) if r is not None for dim in r[1]
    )
    for mesh, dim, device in axes:
        which = [
            i for i, r in enumerate(ranks)
            if r is not None and r[0] == mesh and dim in r[1] and totals[i].device == device
        ]  # fmt: skip
        together = _over_axis(torch.stack([out[i] for i in which]), mesh, dim, kind)
        for place, total in zip(which, together.unbind(), strict=True):
            out[place] = total
    return out


def _over_axis(totals: Tensor, mesh: Any, dim: int, kind: int) -> Tensor:
    from torch.distributed import _functional_collectives as functional

    if kind != table.NORM_INF.value:
        return _arrived(functional.all_reduce(totals, "sum", (mesh, dim)))
    # as integers, numbers of at least 0 keep their order and NaN is above all; libraries lose NaN in a maximum
    bits = totals.abs().view(torch.int64)
    return _arrived(functional.all_reduce(bits, "max", (mesh, dim))).view(torch.float64)


def _arrived(t: Any) -> Tensor:
    """The tensor, once a collective that is under way has filled it."""
    return t.wait() if type(t).__name__ == "AsyncCollectiveTensor" else t
