"""Coupled L1 penalty: g + l1·sign(p), before the rule; where p is 0 nothing is added, as autograd of ``abs`` has it."""

import triton
import triton.language as tl  # noqa: F401  (the interpreter demands it in the globals of every jit function)

from ..numerics import sign


@triton.jit
def apply(g, p, flags, e):
    return g + e[3] * sign(p)


def apply_eager(g, p, flags, e):
    return g + e[3] * p.sign()
