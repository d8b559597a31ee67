"""Buffers that hold many tensors: where each lies, and who lies in one.

What is in a buffer is read off a tensor's storage and never remembered by parameter: one that something moved
(``module.to``, ``p.data = …``) is an ordinary tensor again, and keeps no buffer alive.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 128
"""Bytes: every tensor starts at a multiple, the size of a GPU's cache line."""

_parts: "weakref.WeakKeyDictionary[torch.UntypedStorage, set[tuple[int, int]]]" = weakref.WeakKeyDictionary()
"""Every buffer's storage, with (offset, numel) of what was laid there. PyTorch keeps one Python object for a storage,
as long as any tensor uses it."""


def place(like: Sequence[Tensor], keys: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
    """Zeroed places in one new buffer, in the order, shapes and strides of ``like``; equal keys share a place."""
    unit = ALIGNMENT // dtype.itemsize
    starts: dict[int, int] = {}
    end = 0
    for t, key in zip(like, keys, strict=True):
        if starts.setdefault(key, end) == end:
            end += -(-t.numel() // unit) * unit
    buffer = torch.zeros(end + unit, dtype=dtype, device=like[0].device)
    first = -buffer.data_ptr() % ALIGNMENT // dtype.itemsize  # the CPU's allocator aligns to 64 bytes only
    views = [buffer.as_strided(t.shape, t.stride(), first + starts[key]) for t, key in zip(like, keys, strict=True)]
    _parts[buffer.untyped_storage()] = parts(views)
    return views


def parts(tensors: Sequence[Tensor]) -> set[tuple[int, int]]:
    """(offset, numel) of every tensor that is not empty."""
    return {(int(t.storage_offset()), t.numel()) for t in tensors if t.numel()}


def is_placed(t: Tensor) -> bool:
    """The tensor is all of a place in a buffer."""
    return (t.storage_offset(), t.numel()) in _parts.get(t.untyped_storage(), ())


def fill(tensors: Sequence[Tensor]) -> bool:
    """The tensors are in one buffer, and nothing else is."""
    storages = {id(t.untyped_storage()) for t in tensors}
    return len(storages) == 1 and _parts.get(tensors[0].untyped_storage()) == parts(tensors)


def base(t: Tensor) -> Tensor:
    """All of a tensor's storage, as a 1-D tensor."""
    storage = t.untyped_storage()
    return torch.empty(0, dtype=t.dtype, device=t.device).set_(storage, 0, [storage.nbytes() // t.itemsize], [1])


def move(moves: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Give every tensor the memory of its partner, or none."""
    before: list[tuple[Tensor, Tensor]] = []
    try:
        for t, new in moves:
            before.append((t, t.data))
            t.data = new
    except BaseException:
        for t, old in before:
            t.data = old
        raise
