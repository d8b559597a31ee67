"""Unscaling and norm clipping: every gradient element times one number, computed by the scalars kernel.

The contract of a gradient transform: ``apply(g, p, flags, e)`` takes and returns a block in the compute type;
``flags`` are the bits of the segment's row (``table.py``), ``e`` its engine scalars ``(coefficient, l2, decay, l1,
limit)``. Beside it stands the eager twin.
"""

import triton
import triton.language as tl  # noqa: F401  (the interpreter demands it in the globals of every jit function)


@triton.jit
def apply(g, p, flags, e):
    return g * e[0]


def apply_eager(g, p, flags, e):
    return g * e[0]
