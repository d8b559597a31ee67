"""Eight 4-bit codes in an int32, the first in its lowest bits: what one thread loads, unpacks, packs and stores.

A row of codes is filled up to whole groups with zeros.
"""

import torch
import triton
import triton.language as tl

from .. import memory
from ..table import SCALE_GROUP as GROUP
from .groups import inside

_OCTETS = tl.constexpr(GROUP // 8)


@triton.jit
def _words(at):
    """``at`` of the octets' words."""
    octet = tl.arange(0, at[4].shape[0]) % _OCTETS
    return (at[3] * _OCTETS, at[4] * _OCTETS + octet, at[5])


@triton.jit
def load_packed(address, at, FULL: tl.constexpr):
    """(N,) int32: codes 0…15."""
    word = memory.load(address, _words(at), tl.int32, tl.int32, FULL)
    return tl.reshape((word[:, None] >> (4 * tl.arange(0, 8))[None, :]) & 15, at[1].shape)


@triton.jit
def store_packed(address, at, code, FULL: tl.constexpr):
    """(N,) int32, of which the last 4 bits are stored."""
    n: tl.constexpr = code.shape[0] // 8
    eight = tl.reshape(inside(code & 15, at, FULL), (n, 8)) << (4 * tl.arange(0, 8))[None, :]
    memory.store(address, _words(at), tl.sum(eight, axis=1), tl.int32, FULL)


def unpack(codes: torch.Tensor) -> torch.Tensor:
    """Eager twin of `load_packed`: (groups, GROUP/8) words to (groups, GROUP) int32."""
    both = codes.contiguous().view(torch.uint8).to(torch.int32)
    return torch.stack((both & 15, both >> 4), dim=2).flatten(1)


def pack(code: torch.Tensor) -> torch.Tensor:
    """Eager twin of `store_packed`: (groups, GROUP) int32 to (groups, GROUP/8) words."""
    return ((code[:, ::2] & 15) | (code[:, 1::2] & 15) << 4).to(torch.uint8).view(torch.int32)
