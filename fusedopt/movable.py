"""Which parameters `flatten_` and `unflatten_` can move, and what to say of the others."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import buffers, layout


def named(params: Iterable[Any]) -> list[tuple[str, Tensor]]:
    """(name for messages, parameter) of every distinct parameter among what torch.optim takes."""
    if isinstance(params, Tensor):
        raise TypeError("flatten_ and unflatten_ take parameters as an iterable, such as module.parameters()")
    found: dict[int, tuple[str, Tensor]] = {}
    for item in params:
        entries, names = (item["params"], item.get("param_names")) if isinstance(item, dict) else ([item], None)
        for i, entry in enumerate([entries] if isinstance(entries, Tensor) else entries):
            name, p = entry if isinstance(entry, tuple) else (names[i] if names else None, entry)
            if not isinstance(p, Tensor):
                raise TypeError(f"flatten_ and unflatten_ take tensors, got {type(p).__name__}")
            found.setdefault(id(p), (f"parameter {len(found) if name is None else repr(name)}", p))
    return list(found.values())


def refuse(action: str, name: str, reason: str | None) -> None:
    """Raise if there is a reason."""
    if reason is not None:
        raise ValueError(f"cannot {action} {name}: it is {reason}")


def unmovable(p: Tensor) -> str | None:
    """Why a tensor of this kind has no memory that could be replaced."""
    if is_lazy(p):
        return "lazy and has no shape yet; run one forward pass first"
    if hasattr(p, "to_local"):
        return "a DTensor, whose memory belongs to FSDP or tensor parallelism; leave it out"
    if getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False):
        return "managed by FullyShardedDataParallel, which keeps a buffer of its own; leave it out"
    if is_traceable_wrapper_subclass(p):
        return f"a {type(p).__name__}, which wraps other tensors; leave it out"
    if p.is_meta:
        return "on the meta device; give the module memory with to_empty() first"
    if p.layout != torch.strided:
        return f"in layout {p.layout}; leave it out or make it dense"
    if p.is_inference():
        return "an inference tensor; make it outside of torch.inference_mode()"
    return None if p.is_leaf else "computed from other tensors; pass the leaves that it is computed from"


def is_whole(t: Tensor) -> bool:
    """The tensor is all of its storage."""
    return t.untyped_storage().nbytes() == t.numel() * t.itemsize


def is_interprocess(p: Tensor) -> str | None:
    """Why moving it would part this process from others."""
    if p.device.type == "cpu" and p.is_shared():
        return "in memory shared between processes, which would no longer see it; flatten before share_memory_()"
    return None


def shares_memory(p: Tensor) -> str | None:
    """Why moving it would leave something behind in the old memory."""
    if p.numel() and not buffers.is_placed(p):
        if layout.overlaps_itself(p):
            return "an expanded tensor, whose elements share memory; fusedopt.unflatten_([p]) first gives each its own"
        if not is_whole(p):
            return (
                "part of a larger tensor, which would keep its memory; leave it out or fusedopt.unflatten_([p]) first"
            )
    return is_interprocess(p)


def gradient_shares_memory(p: Tensor) -> str | None:
    """Why the gradient must stay where it is."""
    g = p.grad
    if g is None or g.layout != torch.strided or g.numel() == 0 or buffers.is_placed(g) or is_whole(g):
        return None
    return (
        "the owner of a gradient that is part of a larger tensor, such as a bucket of DistributedDataParallel("
        "gradient_as_bucket_view=True); do without that option or without flatten_(grads=True)"
    )


def check_overlaps(params: Sequence[tuple[str, Tensor]]) -> None:
    """Parameters may share all of their memory, in one dtype, or none of it."""
    spans = sorted(
        (str(p.device), p.data_ptr(), p.data_ptr() + p.numel() * p.itemsize, str(p.dtype), name)
        for name, p in params
        if p.numel()
    )
    for (device, start, end, dtype, name), (device2, start2, end2, dtype2, name2) in itertools.pairwise(spans):
        if device == device2 and start2 < end and (start, end, dtype) != (start2, end2, dtype2):
            raise ValueError(
                f"cannot flatten {name2}: it shares part of its memory, or all of it in another dtype, with {name}; "
                "fusedopt.unflatten_ gives each its own"
            )
