"""Quantised state as tensors: codes and scales of a slot, made, recognised and converted.

``state[p]["exp_avg_q"]`` holds the codes, in the parameter's shape (4-bit ones as int32 words of eight, of shape
(shape[0], 8·groups)), ``state[p]["exp_avg_scale"]`` what each group has beside them, of shape (shape[0], groups); a
row's groups are runs of 64 of its elements, trailing dims flattened, the last one perhaps shorter.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedopt_kernels.state.format import StateFormat
from fusedopt_kernels.table import SCALE_GROUP as GROUP

from .formats import QUANTISED
from .rule import Slot


def keys(name: str) -> tuple[str, str]:
    """State keys of a slot's codes and scales."""
    return f"{name}_q", f"{name}_scale"


def row_of(shape: torch.Size) -> tuple[int, int, int]:
    """(rows, elements in one, groups in one) of a parameter's shape."""
    length = shape[1:].numel()
    return shape[0], length, -(-length // GROUP)


def shapes(form: StateFormat, shape: torch.Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales."""
    rows, _, groups = row_of(shape)
    codes = tuple(shape) if form.packed == 1 else (rows, groups * GROUP // form.packed)
    return codes, (rows, groups)


def zeros(form: StateFormat, like: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of zeros, which are zeros in every format."""
    codes, scales = shapes(form, like.shape)
    if form.packed == 1:
        made = torch.zeros_like(like.detach(), dtype=form.code, memory_format=torch.contiguous_format)
    else:
        made = torch.zeros(codes, dtype=form.code, device=like.device)
    return made, torch.zeros(scales, dtype=form.scale, device=like.device)


def encode(x: Tensor, form: StateFormat) -> tuple[Tensor, Tensor]:
    """Codes and scales of fp32 values, rounded to nearest."""
    rows, length, groups = row_of(x.shape)
    padded = F.pad(x.reshape(rows, length), (0, groups * GROUP - length)).view(-1, GROUP)
    codes, scales = form.store(padded, None)
    if form.packed == 1:
        codes = codes.view(rows, groups * GROUP)[:, :length].reshape(x.shape)
    else:
        codes = codes.view(rows, groups * GROUP // form.packed)
    return codes.contiguous(), scales.view(rows, groups)


def decode(codes: Tensor, scales: Tensor, form: StateFormat, shape: torch.Size) -> Tensor:
    """The fp32 values that codes and scales stand for."""
    rows, length, groups = row_of(shape)
    if form.packed == 1:
        padded = torch.zeros((rows, groups * GROUP), dtype=codes.dtype, device=codes.device)
        padded[:, :length] = codes.reshape(rows, length)
        codes = padded
    values = form.load(codes.reshape(-1, GROUP // form.packed), scales.reshape(-1))
    return values.view(rows, groups * GROUP)[:, :length].reshape(shape)


def recognise(state: Mapping[str, Any], slot: Slot, shape: torch.Size) -> StateFormat:
    """The format of a slot's codes and scales.

    Raises:
        RuntimeError: they are of none, or not of this parameter.
    """
    codes, scales = (state.get(key) for key in keys(slot.name))
    for form in QUANTISED.get(slot.kind, {}).values() if len(shape) else ():  # a number alone has no rows
        if isinstance(codes, Tensor) and isinstance(scales, Tensor):
            have = (tuple(codes.shape), codes.dtype), (tuple(scales.shape), scales.dtype)
            if have == tuple(zip(shapes(form, shape), (form.code, form.scale), strict=True)):
                return form
    described = " and ".join(
        f"{key!r} ({tuple(t.shape)}, {t.dtype})" if isinstance(t, Tensor) else f"no {key!r}"
        for key, t in zip(keys(slot.name), (codes, scales), strict=True)
    )
    raise RuntimeError(
        f"optimizer state {slot.name!r} of a parameter of shape {tuple(shape)} cannot be read: the state holds "
        f"{described}, which is no format of {slot.kind} state; load a "
        "checkpoint of this model or clear optimizer.state"
    )


def values(state: Mapping[str, Any], slot: Slot, shape: torch.Size) -> Tensor | None:
    """A slot's numbers as plain floating point, however they are kept; None if there are none."""
    if state.get(slot.name) is not None:
        return state[slot.name]
    if all(state.get(key) is None for key in keys(slot.name)):
        return None
    form = recognise(state, slot, shape)
    codes, scales = (state[key] for key in keys(slot.name))
    return decode(codes, scales, form, shape)
