"""uint8: nonnegative state in 8 bits, a small float without sign: 4 bits of mantissa, 16 octaves below the group's top.

``log.py`` with ``SHIFT = 19`` and codes 0…255. Every element above 2⁻¹⁵ of its group's largest is within 1/32 of its
value; the floor is between 2⁻¹⁶ and 2⁻¹⁵ of the largest. ``base`` is an int16 per group: 1.03125 bytes per element.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from .. import memory
from ..table import DITHERED, STOCHASTIC
from .format import StateFormat
from .log import decode, decode_eager, encode, encode_eager


@triton.jit
def load_uint8(values, scales, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    return decode(memory.load(values, at, tl.uint8, tl.int32, FULL), scales, at, 19, FULL)


@triton.jit
def store_uint8(values, scales, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    memory.store(values, at, encode(scales, at, x, noise, 19, 255, RANDOM, FULL), tl.uint8, FULL)


def codec(random: bool) -> tuple[Any, ...]:
    """The device codec."""
    return (load_uint8, store_uint8, tl.uint8, STOCHASTIC.value if random else DITHERED.value)


def load_eager(codes: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Eager twin of `load_uint8`: (groups, GROUP) codes and (groups,) bases to fp32 values."""
    return decode_eager(codes.to(torch.int32), base, 19)


def store_eager(x: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager twin of `store_uint8`: (groups, GROUP) fp32 values to codes and bases; noise: int32, or None."""
    codes, base = encode_eager(x, noise, 19, 255)
    return codes.to(torch.uint8), base


UINT8 = StateFormat("uint8", torch.uint8, torch.int16, codec, load_eager, store_eager, dithered=True)
