"""uint4: nonnegative state in 4 bits, a small float without sign: 1 bit of mantissa, 8 octaves below the group's top.

``log.py`` with ``SHIFT = 22`` and codes 0…15, eight to a word (``packed.py``). Every element above 2⁻⁷ of its group's
largest is within 1/5 of its value; the floor is between 2⁻⁸ and 2⁻⁷ of the largest. ``base`` is an int16 per group:
0.53125 bytes per element.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..table import DITHERED, STOCHASTIC
from .format import StateFormat
from .log import decode, decode_eager, encode, encode_eager
from .packed import load_packed, pack, store_packed, unpack


@triton.jit
def load_uint4(values, scales, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    return decode(load_packed(values, at, FULL), scales, at, 22, FULL)


@triton.jit
def store_uint4(values, scales, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    store_packed(values, at, encode(scales, at, x, noise, 22, 15, RANDOM, FULL), FULL)


def codec(random: bool) -> tuple[Any, ...]:
    """The device codec."""
    return (load_uint4, store_uint4, tl.uint8, STOCHASTIC.value if random else DITHERED.value)


def load_eager(codes: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Eager twin of `load_uint4`: (groups, GROUP/8) words and (groups,) bases to fp32 values."""
    return decode_eager(unpack(codes), base, 22)


def store_eager(x: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager twin of `store_uint4`: (groups, GROUP) fp32 values to words and bases; noise: int32, or None."""
    code, base = encode_eager(x, noise, 22, 15)
    return pack(code), base


UINT4 = StateFormat("uint4", torch.int32, torch.int16, codec, load_eager, store_eager, packed=8, dithered=True)
