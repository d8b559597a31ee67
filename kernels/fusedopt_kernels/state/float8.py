"""float8_e4m3 and float8_e5m2: state as 8-bit floating point with one fp32 scale per group: 1.0625 bytes per element.

``s`` is the group's largest magnitude (``groups.py``), the code is y = x·(M/s) rounded to nearest even, M = 448 (e4m3)
or 57344 (e5m2) the format's largest number; ``x̂ = ŷ·(s/M)``. Codes are those of ``torch.float8_e4m3fn`` and
``torch.float8_e5m2``, subnormal ones too; those of inf and NaN have no use. Integers do what casts would: not every
device knows these types, and those that do disagree beyond M.

Nonnegative state is held at the smallest code above zero, 2⁻⁹/M or 2⁻¹⁶/M of s, so that none becomes a zero that
something is divided by; a group of zeros stays zero. Rounded stochastically, y is first rounded to 2⁻¹⁶ of the distance
between two codes, then 16 random bits decide.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..place import spread
from .format import StateFormat
from .groups import SEVENTH, load_scale, scale_eager, scale_of, steps_eager, steps_of, store_scale

_SEVENTH = tl.constexpr(SEVENTH)


@triton.jit
def encode(y, noise, MANTISSA: tl.constexpr, RANDOM: tl.constexpr):
    """Codes of |y| ≤ M, int32.

    Adding 2ᵏ times the power of two below |y| (at least the smallest normal number) rounds |y| to where a code ends.
    """
    LEAST: tl.constexpr = (121 if MANTISSA == 3 else 113) << 23
    ABOVE: tl.constexpr = (7 if RANDOM else 23) - MANTISSA << 23
    b = y.to(tl.int32, bitcast=True)
    size = b & 0x7FFFFFFF
    power = tl.maximum(size, LEAST) & 0x7F800000
    anchor = power + ABOVE
    sum = size.to(tl.float32, bitcast=True) + anchor.to(tl.float32, bitcast=True)
    whole = sum.to(tl.int32, bitcast=True) - anchor
    if RANDOM:
        whole = (whole + noise.to(tl.int32)) >> 16
    return (b >> 24 & 0x80) | ((power - LEAST >> (23 - MANTISSA)) + whole)


@triton.jit
def decode(code, MANTISSA: tl.constexpr):
    """fp32 values of codes, int32: their bits in fp32's place, times the power of two between both exponents."""
    b = (code & 0x80) << 24 | (code & 0x7F) << (23 - MANTISSA)
    return b.to(tl.float32, bitcast=True) * (2.0**120 if MANTISSA == 3 else 2.0**112)


@triton.jit
def load_float8(values, scales, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    MANTISSA: tl.constexpr = 3 if T == tl.float8e4nv else 2
    MOST: tl.constexpr = 448.0 if T == tl.float8e4nv else 57344.0
    scale = load_scale(scales, at, tl.float32, tl.float32, FULL) * (_SEVENTH * (7.0 / MOST))
    return decode(memory.load(values, at, tl.uint8, tl.int32, FULL), MANTISSA) * spread(scale)


@triton.jit
def _codes(scale, x, noise, T: tl.constexpr, RANDOM: tl.constexpr):
    MANTISSA: tl.constexpr = 3 if T == tl.float8e4nv else 2
    MOST: tl.constexpr = 448.0 if T == tl.float8e4nv else 57344.0
    return encode(x * spread(steps_of(MOST, scale)), noise, MANTISSA, RANDOM)


@triton.jit
def store_float8(values, scales, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    scale = scale_of(x, at, FULL)
    memory.store(values, at, _codes(scale, x, noise, T, RANDOM), tl.uint8, FULL)
    store_scale(scales, at, scale, tl.float32, FULL)


@triton.jit
def store_nonnegative(values, scales, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    scale = scale_of(x, at, FULL)
    code = tl.maximum(_codes(scale, x, noise, T, RANDOM) & 0x7F, spread((scale != 0.0).to(tl.int32)))
    memory.store(values, at, code, tl.uint8, FULL)
    store_scale(scales, at, scale, tl.float32, FULL)


_TYPES = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


def codec(dtype: torch.dtype, nonnegative: bool, random: bool) -> tuple[Any, ...]:
    """The device codec."""
    return (load_float8, store_nonnegative if nonnegative else store_float8, _TYPES[dtype], random)


def _layout(dtype: torch.dtype) -> tuple[int, float]:
    """(bits of mantissa, largest number)."""
    return (3, 448.0) if dtype == torch.float8_e4m3fn else (2, 57344.0)


def encode_eager(y: torch.Tensor, noise: torch.Tensor | None, mantissa: int) -> torch.Tensor:
    """Eager twin of `encode`; noise: int32, or None."""
    least = (121 if mantissa == 3 else 113) << 23
    above = (23 if noise is None else 7) - mantissa << 23
    b = y.view(torch.int32)
    size = b & 0x7FFFFFFF
    power = size.clamp(min=least) & 0x7F800000
    anchor = power + above
    whole = (size.view(torch.float32) + anchor.view(torch.float32)).view(torch.int32) - anchor
    if noise is not None:
        whole = (whole + noise) >> 16
    return (b >> 24 & 0x80) | ((power - least >> (23 - mantissa)) + whole)


def decode_eager(code: torch.Tensor, mantissa: int) -> torch.Tensor:
    """Eager twin of `decode`."""
    b = (code & 0x80) << 24 | (code & 0x7F) << (23 - mantissa)
    return b.view(torch.float32) * (2.0**120 if mantissa == 3 else 2.0**112)


def load_eager(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Eager twin of `load_float8`: (groups, GROUP) codes and (groups,) scales to fp32 values."""
    mantissa, most = _layout(codes.dtype)
    scale = scales.to(torch.float32) * (SEVENTH * (7.0 / most))
    return decode_eager(codes.view(torch.uint8).to(torch.int32), mantissa) * scale[:, None]


def store_eager(
    dtype: torch.dtype, nonnegative: bool, x: torch.Tensor, noise: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager twin of `store_float8` and `store_nonnegative`: (groups, GROUP) fp32 values to codes and scales; noise:
    int32, or None.
    """
    mantissa, most = _layout(dtype)
    scale = scale_eager(x)
    code = encode_eager(x * steps_eager(most, scale), noise, mantissa)
    if nonnegative:
        code = torch.maximum(code & 0x7F, (scale != 0.0).to(torch.int32)[:, None])
    return (code & 0xFF).to(torch.uint8).view(dtype), scale


def _format(name: str, dtype: torch.dtype, nonnegative: bool) -> StateFormat:
    device, store = partial(codec, dtype, nonnegative), partial(store_eager, dtype, nonnegative)
    return StateFormat(name, dtype, torch.float32, device, load_eager, store)


E4M3 = _format("float8_e4m3", torch.float8_e4m3fn, False)
E5M2 = _format("float8_e5m2", torch.float8_e5m2, False)
E4M3_NONNEGATIVE = _format("float8_e4m3", torch.float8_e4m3fn, True)
E5M2_NONNEGATIVE = _format("float8_e5m2", torch.float8_e5m2, True)
