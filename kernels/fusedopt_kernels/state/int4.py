"""int4: signed state in 4 bits, linear, with one fp32 scale per group: 0.5625 bytes per element.

``s`` is the group's largest magnitude (``groups.py``), the code −7…7 is x·(7/s) rounded to nearest even,
``x̂ = code·(s/7)``: within s/14 + 2⁻²¹·s of x. Codes are two's complement, eight to a word (``packed.py``). Rounded
stochastically, 15 random bits are added below the code's last.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..place import spread
from .format import StateFormat
from .groups import SEVENTH, load_scale, scale_eager, scale_of, steps_eager, steps_of, store_scale
from .int8 import rounded, rounded_eager
from .packed import load_packed, pack, store_packed, unpack

_SEVENTH = tl.constexpr(SEVENTH)


@triton.jit
def load_int4(values, scales, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    code = load_packed(values, at, FULL)
    scale = load_scale(scales, at, tl.float32, tl.float32, FULL) * _SEVENTH
    return ((code ^ 0x4B000008).to(tl.float32, bitcast=True) - 8388616.0) * spread(scale)


@triton.jit
def store_int4(values, scales, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    scale = scale_of(x, at, FULL)
    code = rounded(x * spread(steps_of(7.0, scale)), noise, RANDOM)
    store_packed(values, at, code, FULL)
    store_scale(scales, at, scale, tl.float32, FULL)


def codec(random: bool) -> tuple[Any, ...]:
    """The device codec."""
    return (load_int4, store_int4, tl.uint8, random)


def load_eager(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Eager twin of `load_int4`: (groups, GROUP/8) words and (groups,) scales to fp32 values."""
    code = (unpack(codes) ^ 8) - 8
    return code.to(torch.float32) * (scales * SEVENTH)[:, None]


def store_eager(x: torch.Tensor, noise: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager twin of `store_int4`: (groups, GROUP) fp32 values to words and scales; noise: int32, or None."""
    scale = scale_eager(x)
    code = rounded_eager(x * steps_eager(7.0, scale), noise)
    return pack(code), scale


INT4 = StateFormat("int4", torch.int32, torch.float32, codec, load_eager, store_eager, packed=8)
