"""Coupled weight decay (L2 penalty): g + l2·p, before the rule. Without a penalty g is left as it is."""

import triton
import triton.language as tl


@triton.jit
def apply(g, p, flags, e):
    return tl.where(e[1] != 0.0, g + e[1] * p, g)


def apply_eager(g, p, flags, e):
    return g + e[1] * p if e[1] != 0.0 else g
