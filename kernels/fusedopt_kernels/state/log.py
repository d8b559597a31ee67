"""Nonnegative state as a small float without sign or zero point: ``SHIFT`` bits of fp32's mantissa are dropped.

With ``k(x) = bits(x) >> SHIFT`` (fp32 bits rounded to the kept mantissa bits first) and the group's
``base = max(top − MOST, 0)``, top its largest k and MOST the largest code, the code is ``max(k(x) − base, 0)`` and
``x̂ = bits⁻¹((code + base) << SHIFT)``. What is within ``MOST`` codes of the group's largest is as exact as the mantissa
is long, whatever its size; smaller elements are held at that floor, so that none becomes a zero that something is
divided by; a group of zeros stays zero. Nothing is multiplied or rounded twice, so every mode has the same bits.

Rounding is never to nearest while a run goes on: a running average changes by less than half a code in a step, and
would stand still. Bits of a sequence that covers the unit evenly over the steps (`place.noise`) take the place of the
half below the kept mantissa, so that E[x̂] = x over the steps of an element; √v is then 1.00 ± 0.06 of what it should be
at β₂ = 0.999, where nearest gives 0.69 (``perf/notes/formats.md``). Only values that are loaded from other formats are
rounded to nearest.

Rounded stochastically, random bits take the place of the half below the kept mantissa: E[x̂] = x above the floor,
exactly where x has no bits below the random ones. A group that holds NaN becomes NaN; one that holds inf keeps it and
loses its other elements.
"""

import torch
import triton
import triton.language as tl

from ..place import spread
from ..table import STOCHASTIC
from .groups import inside, largest, load_scale, store_scale

NAN = 0xFFC00000
"""Bits of a NaN above every number, so that all codes of a group with this base are 0."""
_NAN = tl.constexpr(NAN)


@triton.jit
def decode(code, scales, at, SHIFT: tl.constexpr, FULL: tl.constexpr):
    """Values of (N,) int32 codes; scales: address of the bases."""
    base = load_scale(scales, at, tl.int16, tl.int32, FULL) << SHIFT
    return ((code << SHIFT) + spread(base)).to(tl.float32, bitcast=True)


@triton.jit
def encode(scales, at, x, noise, SHIFT: tl.constexpr, MOST: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    """Stores the bases and returns the codes, (N,) int32."""
    b = x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    b = b + (noise << (SHIFT - 16) if RANDOM == STOCHASTIC else noise >> (32 - SHIFT))
    k = inside((b >> SHIFT).to(tl.int32), at, FULL)
    top = largest(k)
    base = tl.where(top > (0x7F800000 >> SHIFT), _NAN >> SHIFT, tl.maximum(top - MOST, 0))
    store_scale(scales, at, base, tl.int16, FULL)
    return tl.maximum(k - spread(base), 0)


def decode_eager(code: torch.Tensor, base: torch.Tensor, shift: int) -> torch.Tensor:
    """Eager twin of `decode`: (groups, GROUP) int32 codes and (groups,) bases to fp32 values."""
    return ((code + base.to(torch.int32)[:, None]) << shift).view(torch.float32)


def encode_eager(
    x: torch.Tensor, noise: torch.Tensor | None, shift: int, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Eager twin of `encode`: (groups, GROUP) fp32 values to int32 codes and int16 bases; noise: see `StateFormat`."""
    b = (x.view(torch.int32) & 0x7FFFFFFF).clamp_(max=0x7FC00000)  # no carry into the sign
    if noise is None:
        b = b + (1 << (shift - 1))
    else:  # 32 dithered bits, or 16 random ones
        b = b + (noise >> (32 - shift) if noise.dtype == torch.int64 else noise << (shift - 16)).to(torch.int32)
    k = b >> shift
    top = k.amax(1)
    base = (top - most).clamp_(min=0).masked_fill_(top > (0x7F800000 >> shift), NAN >> shift)
    return (k - base[:, None]).clamp_(min=0), base.to(torch.int16)
