"""``maximize=True``: ascend. ``0 − g`` rather than ``−g``, so that a zero gradient leaves −0.0 weights alone."""

import triton
import triton.language as tl

from ..table import MAXIMIZE


@triton.jit
def apply(g, p, flags, e):
    return tl.where((flags & MAXIMIZE) != 0, 0.0 - g, g)


def apply_eager(g, p, flags, e):
    return 0.0 - g if flags & MAXIMIZE.value else g
