"""Rounding at random: the only home of random numbers, of the sequence that dithers, and of what is rounded by them.

Every function stands twice: ``@triton.jit`` for kernels and, below, its eager twin with the same lines.
"""

import hashlib

import numpy as np
import torch
import triton
import triton.language as tl

from .numerics import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)

PHILOX_ROUNDS = 7
_ROUNDS = tl.constexpr(PHILOX_ROUNDS)


@triton.jit
def quiet_bits(x):
    """Bits of fp32 x; NaN is 0x7FC00000, so that adding to it does not carry into the sign.

    Compiled, NaN comes from arithmetic, which gives positive ones: a minimum takes the place of compare and select.
    """
    if _INTERPRETED:
        return tl.where(x != x, 0x7FC00000, x.to(tl.int32, bitcast=True))
    else:
        return tl.minimum(x.to(tl.int32, bitcast=True), 0x7FC00000)


# --------------------------------------------------------------------------------------------- stochastic rounding
@triton.jit
def stochastic(x, noise, T: tl.constexpr):
    """fp32 x rounded up or down to a number of type T (bf16, fp16) at random, E = x; noise: 16 random bits, uint32.

    Random bits are added below the last one kept, the rest is cut off. Below fp16's normal numbers, whose spacing
    is 2⁻²⁴, E = x within 2⁻³⁷. NaN and ±inf stay; beyond the largest number the result may be inf.
    """
    b = x.to(tl.uint32, bitcast=True)
    if T == tl.bfloat16:
        y = ((b + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    else:
        y = ((b + (noise >> 3)) & 0xFFFFE000).to(tl.float32, bitcast=True)
        small = tl.floor(x * 16777216.0 + (noise >> 3).to(tl.float32) * 0.0001220703125) * 5.9604644775390625e-08
        y = tl.where((tl.abs(x) < 6.103515625e-05) & (x != 0.0), small, y)  # -0.0 stays
    return tl.where(tl.abs(x) < float("inf"), y, x)


def stochastic_eager(x: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Eager twin of `stochastic`; noise: int32."""
    b = x.view(torch.int32)
    if dtype == torch.bfloat16:
        y = ((b + noise) & -0x10000).view(torch.float32)
    else:
        bits = noise >> 3
        y = ((b + bits) & -0x2000).view(torch.float32)
        small = torch.floor(x * 16777216.0 + bits.to(torch.float32) * 0.0001220703125) * 5.9604644775390625e-08
        y = torch.where((x.abs() < 6.103515625e-05) & (x != 0.0), small, y)
    return torch.where(x.abs() < torch.inf, y, x)


# -------------------------------------------------------------------------------------------------- random numbers
@triton.jit
def philox_words(key, index, step):
    """Philox4x32-7 words for elements ``8·(index >> 3) … + 7``; see `philox_words_eager` for the definition."""
    group = index >> 3
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    t = step.to(tl.uint32) + low * 0
    return tl.philox(key, low, high, t, low * 0, _ROUNDS)


@triton.jit
def random16(key, index, step):
    """16 uniform random bits per element, one Philox call each (the path for shards off a multiple of 8)."""
    a, b, c, d = philox_words(key, index, step)
    word = (index & 7) >> 1
    x = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d)))
    return tl.where((index & 1) == 0, x & 0xFFFF, x >> 16)


@triton.jit
def random16_by_eight(key, start, step, BLOCK: tl.constexpr):
    """Same bits as `random16` for ``start … start + BLOCK``, one call per eight neighbours; start % 8 == 0."""
    index = start + tl.arange(0, BLOCK // 8).to(tl.int64) * 8
    a, b, c, d = philox_words(key, index, step)
    x = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (BLOCK // 2,))
    return tl.reshape(tl.join(x & 0xFFFF, x >> 16), (BLOCK,))


WEYL_INDEX, WEYL_STEP = 0x5E2D58D9, 0x9E3779B9
"""2³²/e and 2³² times the golden section, odd: what `dither` moves on by from element to element and step to step."""
_WEYL_INDEX, _WEYL_STEP = tl.constexpr(WEYL_INDEX), tl.constexpr(WEYL_STEP)


@triton.jit
def dither(index, step):
    """A Weyl sequence, uint32: as even as can be over the steps of an element and over neighbours; int64 operands."""
    return (index * _WEYL_INDEX + step * _WEYL_STEP).to(tl.uint32)


def dither_eager(index: np.ndarray, step: int) -> np.ndarray:
    """Eager twin of `dither`, int64; index int64."""
    x = index.astype(np.uint64) * np.uint64(WEYL_INDEX) + np.uint64(step * WEYL_STEP & 0xFFFFFFFFFFFFFFFF)
    return (x & np.uint64(0xFFFFFFFF)).astype(np.int64)


def random16_range(key: int, start: int, n: int, step: int) -> np.ndarray:
    """`random16_eager` of the n elements from ``start`` on, int32."""
    first = start >> 3
    groups = np.arange(first, ((start + n + 7) >> 3), dtype=np.int64) << 3
    words = np.stack(philox_words_eager(key, groups, step), axis=1)  # little-endian: low half first, as defined
    return words.view(np.uint16).reshape(-1)[start - 8 * first :][:n].astype(np.int32)


def stream_key(seed: int, stream: int, purpose: str) -> int:
    """Key of a random stream: the first 64 bits of BLAKE2b(seed, stream id, purpose), as a signed int64."""
    text = f"{seed}:{stream}:{purpose}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def philox_words_eager(key: int, index: np.ndarray, step: int) -> tuple[np.ndarray, ...]:
    """The stream's definition (Salmon et al. 2011, Philox4x32 with 7 rounds).

    Key: 64 bits, low word first. Counter: (low 32, high 32 bits of ``index >> 3``, step, 0), index being the
    row-major element index in the *global* tensor. Returns the four uint32 words of each counter.
    """
    group = index.astype(np.uint64) >> np.uint64(3)
    mask = np.uint64(0xFFFFFFFF)
    c0, c1 = group & mask, group >> np.uint64(32)
    c2, c3 = np.full_like(c0, step & 0xFFFFFFFF), np.zeros_like(c0)
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(PHILOX_ROUNDS):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (p1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            p1 & mask,
            ((p0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1)),
            p0 & mask,
        )
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return tuple(c.astype(np.uint32) for c in (c0, c1, c2, c3))


def random16_eager(key: int, index: np.ndarray, step: int) -> np.ndarray:
    """Element e takes the low (e even) or high (e odd) 16 bits of word ``(e & 7) >> 1``; twin of `random16`."""
    words = np.stack(philox_words_eager(key, index, step))
    x = np.take_along_axis(words, ((index & 7) >> 1)[None], axis=0)[0]
    return np.where((index & 1) == 0, x & 0xFFFF, x >> 16).astype(np.uint32)
