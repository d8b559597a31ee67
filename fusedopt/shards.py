"""DTensors, one at a time: what of them lies on this rank, where that lies in the whole, and state like them.

Kernels and twins see local tensors alone. ``state[p]`` of a DTensor holds DTensors of its mesh and placements, so that
`torch.distributed.checkpoint` finds every shard; `LocalState` is the same dict with the local tensors in it.
"""

from collections.abc import Iterator, MutableMapping
from functools import cache
from itertools import product
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedopt_kernels.state.format import StateFormat
from fusedopt_kernels.table import SCALE_GROUP as GROUP

from . import layout
from .encoded import row_of, shapes

Ranks = tuple[Any, tuple[int, ...]] | None
"""(mesh, dims over which a tensor's elements are shared out); None: this rank has all of them."""


class Span(NamedTuple):
    """Where a local tensor's stored numbers lie in the whole one: rows of ``length`` that begin every ``stride``
    numbers from ``offset`` on, in row-major order."""

    length: int
    stride: int
    offset: int


def is_dtensor(t: Any) -> bool:
    """Whether a tensor is spread over a mesh."""
    return type(t) is not Tensor and hasattr(t, "device_mesh")


def here(t: Any) -> Any:
    """What of a tensor lies on this rank, without autograd; anything else as it is. A pending collective is waited
    for."""
    return arrived(t._local_tensor) if is_dtensor(t) else t


def arrived(t: Any) -> Tensor:
    """The tensor, once a collective that is under way has filled it."""
    return t.wait() if type(t).__name__ == "AsyncCollectiveTensor" else t


def on_this_rank(t: Any) -> tuple[Tensor, Tensor, Ranks]:
    """(local tensor, the same with partial sums added up, ranks that hold the other elements) of a DTensor."""
    partial = any(place.is_partial() for place in t.placements)
    whole = _reduced(t) if partial else t
    local = arrived(t.to_local())
    return local, arrived(whole.to_local()) if partial else local, ranks_of(whole)


def ranks_of(t: Any) -> Ranks:
    """Ranks that hold the other elements of a tensor."""
    dims = tuple(i for i, place in enumerate(t.placements) if not place.is_replicate()) if is_dtensor(t) else ()
    return (t.device_mesh, dims) if dims else None


def mesh_of(t: Any) -> tuple[Any, tuple[Any, ...]] | None:
    """(mesh, placements) of a DTensor."""
    return (t.device_mesh, tuple(t.placements)) if is_dtensor(t) else None


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


def gradient(p: Any, grad: Any) -> Tensor:
    """What of a DTensor parameter's gradient belongs to what lies here of the parameter.

    A gradient of other placements (partial sums of the ranks, say) is redistributed, a collective for each.
    """
    if grad.placements != p.placements:
        layout.warn_once(
            "redistributed",
            f"a gradient with placements {grad.placements} is redistributed to those of its parameter, {p.placements}, "
            "at every step, a collective for each; give both the same placements to save it",
        )
        grad = grad.redistribute(placements=p.placements)
    return here(grad)


# ------------------------------------------------------------------------------------------------------------ places
def span_of(p: Any) -> Span | None:
    """Where what lies here of a parameter lies in the whole; None: not in such rows, or p is no DTensor."""
    if not is_dtensor(p):
        return None
    shape, whole, parts = here(p).shape, p.shape, 2 if p.is_complex() else 1
    dims = [d for d, place in _sharded(p) if d > 0]
    if len(set(dims)) > 1 or _is_scattered(p):
        return None
    d = dims[0] if dims else 1
    first = _local(tuple(whole), p.device_mesh, tuple(p.placements), None)[1]
    strides = [prod(whole[i + 1 :]) for i in range(len(whole))]
    offset = sum(a * b for a, b in zip(first, strides, strict=True))
    if len(shape) < 2:
        return Span(parts * max(1, prod(shape)), parts * max(1, prod(shape)), parts * offset)
    length, stride = prod(shape[d:]), prod(whole[d:])
    rows = prod(shape[:d])
    return Span(parts * length, parts * (stride if rows > 1 else length), parts * offset)


def _sharded(p: Any) -> list[tuple[int, Any]]:
    """(dim of the tensor, placement) of every dim of the mesh that shares it out."""
    return [(place.dim, place) for place in p.placements if hasattr(place, "dim")]


def _is_scattered(p: Any) -> bool:
    """Whether a dim is shared out in turns that do not divide it, so that a rank's part may lie in several pieces."""
    for d, place in _sharded(p):
        if type(place).__name__ == "_StridedShard":
            ways = prod(n for n, other in zip(p.device_mesh.shape, p.placements, strict=True) if _dim(other) == d)
            if p.shape[d] % ways:
                return True
    return False


def _dim(place: Any) -> int | None:
    return getattr(place, "dim", None)


@cache
def _local(shape: tuple[int, ...], p_mesh: Any, placements: tuple[Any, ...], rank: tuple[int, ...] | None) -> Any:
    """(shape, offset) of what lies at a place of the mesh, None: this rank's."""
    from torch.distributed.tensor import _utils

    if rank is None:
        return _utils.compute_local_shape_and_global_offset(shape, p_mesh, placements)
    return _utils._compute_local_shape_and_global_offset(shape, p_mesh.shape, list(rank), placements)


def keeps_groups(p: Any, form: StateFormat) -> bool:
    """Whether no rank's part of a parameter cuts a group of quantised state; the same answer on every rank."""
    dims = {d for d, _ in _sharded(p)} if is_dtensor(p) else set()
    if dims <= {0}:
        return True
    if not dims <= {0, 1} or _is_scattered(p):
        return False
    whole, inner = tuple(p.shape), prod(p.shape[2:])
    coded = shapes(form, p.shape)
    for rank in product(*map(range, p.device_mesh.shape)):
        shape, first = _local(whole, p.device_mesh, tuple(p.placements), rank)
        spread = [_local(tuple(x), p.device_mesh, tuple(p.placements), rank)[0] for x in coded]
        if first[1] * inner % GROUP or [tuple(x) for x in spread] != list(shapes(form, torch.Size(shape))):
            return False
    return True


# ------------------------------------------------------------------------------------------------------------- state
State = MutableMapping[str, Any]
"""``optimizer.state[p]``, or that of a DTensor with local tensors in it."""


class LocalState(State):
    """State of a DTensor as if what lies here were all: tensors are local ones; those put in are spread like it."""

    def __init__(self, state: State, p: Any) -> None:
        self._state, self._param = state, p

    def __getitem__(self, key: str) -> Any:
        return here(self._state[key])

    def __setitem__(self, key: str, value: Any) -> None:
        have: Any = self._state.get(key)
        if not (is_dtensor(have) and have._local_tensor is value):
            self._state[key] = spread(value, self._param, key) if isinstance(value, Tensor) else value

    def __delitem__(self, key: str) -> None:
        del self._state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def local_state(state: State, p: Any) -> Any:
    """State of a parameter with local tensors in it; writing to it writes to the state."""
    return LocalState(state, p) if is_dtensor(p) else state


def spread(local: Tensor, p: Any, key: str = "") -> Any:
    """A local tensor of state as part of a DTensor of the parameter's mesh and placements; numbers as they are."""
    if not local.dim() or is_dtensor(local):
        return local
    from torch.distributed.tensor import DTensor

    shape, stride = whole_shape(p, local.dtype, key), p.stride()
    if shape != p.shape:
        stride = (shape[1], 1)
    return DTensor.from_local(
        local.detach(), p.device_mesh, p.placements, run_check=False, shape=torch.Size(shape), stride=stride
    )


def whole_shape(p: Tensor, dtype: torch.dtype, key: str) -> torch.Size:
    """Shape over all ranks of what a state key of a parameter holds: scales and 4-bit codes have their own."""
    if p.dim() < 2 or not (key.endswith("_scale") or (key.endswith("_q") and dtype == torch.int32)):
        return p.shape
    rows, _, groups = row_of(p.shape)
    return torch.Size((rows, groups if key.endswith("_scale") else groups * GROUP // 8))


MOVED = {torch.int16: torch.int32, torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.float16}
"""Dtypes that NCCL (16-bit integers) or gloo (8-bit floating point too) does not move, and those that hold their
values and stand for nothing else in the same place."""


def take(value: Any, p: Any, key: str) -> Any:
    """Loaded state as a parameter's: for a DTensor what is whole is cut, what is placed otherwise redistributed.

    Raises:
        RuntimeError: a tensor that is neither whole nor spread over the parameter's mesh.
    """
    if not isinstance(value, Tensor) or not value.dim():
        return value
    whole, dtype = tuple(whole_shape(p, value.dtype, key)), value.dtype
    if is_dtensor(value):
        placed: Any = value
        if is_dtensor(p) and placed.device_mesh == p.device_mesh:
            if placed.placements == p.placements:
                return placed
            return placed.to(MOVED.get(dtype, dtype)).redistribute(placements=p.placements).to(dtype)
        value = placed.to(MOVED.get(dtype, dtype)).full_tensor().to(dtype)
    if not is_dtensor(p):
        return value
    if tuple(value.shape) != whole:
        raise RuntimeError(
            f"optimizer state {key!r} of shape {tuple(value.shape)} is not the whole of a parameter of shape "
            f"{tuple(p.shape)}, of which this would be {whole}, and no DTensor: load what get_optimizer_state_dict of "
            "torch.distributed.checkpoint gives, or a state dict of unsharded parameters"
        )
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(here(p).device), p.device_mesh, p.placements, src_data_rank=None)
