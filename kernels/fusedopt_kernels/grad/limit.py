"""Value clipping: every gradient element to at most a magnitude; NaN stays NaN, as ``torch.clamp``."""

import triton
import triton.language as tl


@triton.jit
def apply(g, p, flags, e):
    return tl.where(g > e[4], e[4], tl.where(g < -e[4], -e[4], g))


def apply_eager(g, p, flags, e):
    g = (g > e[4]).where(e[4], g)
    return (g < -e[4]).where(-e[4], g)
