"""A weight that is only written: an update goes to memory of its own, rounded to bf16. 2 bytes per element.

For steps that need the whole update before the parameter can change (Muon). The parameter is neither read nor written:
a rule sees zeros in its place, and the "new weight" x = 0 − descent goes to the residual's address.
"""

from typing import Any

import triton
import triton.language as tl

from .. import memory


@triton.jit
def load_scratch(param, residual, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    return tl.zeros(at[1].shape, COMPUTE)


@triton.jit
def store_scratch(param, residual, at, x, noise, T: tl.constexpr, RANDOM: tl.constexpr, FULL: tl.constexpr):
    return memory.store(residual, at, x, T, FULL)


def codec() -> tuple[Any, ...]:
    """The device codec."""
    return (load_scratch, store_scratch, tl.bfloat16, False)
