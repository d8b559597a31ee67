"""Rules as a user writes them, for `fusedopt verify --rule`: a good one, and one whose kernel is off by a bit.

m ← m + (1 − μ)·(g − m)
n ← n + t                                a number for the whole parameter
p ← p − lr·(m, or the sign of m)
"""

import triton
import triton.language as tl

import fusedopt
from fusedopt_kernels.numerics import sign


@triton.jit
def scalars(hyper, t, state):
    lr, _, mu = hyper
    return (lr, 1.0 - mu), (state[0] + t,)


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    lr, q = s
    m = state[0] + q * (g - state[0])
    return lr * (sign(m) if VARIANT[0] else m), (m,)


@triton.jit
def another_order(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    lr, q = s
    m = (1.0 - q) * state[0] + q * g
    return lr * (sign(m) if VARIANT[0] else m), (m,)


def reference(g, p, state, s, VARIANT):
    lr, q = s
    m = state[0] + q * (g - state[0])
    return lr * (m.sign() if VARIANT[0] else m), (m,)


def refuses(g, p, state, s, VARIANT):
    raise ArithmeticError("no update today")


PARTS = dict(
    hyper={"mu": 0.9},
    state=(fusedopt.Slot("mean", "signed"), fusedopt.Slot("total", "scalar")),
    structure=("signed",),
    defaults={"signed": False},
)
GOOD = fusedopt.make_rule("good", scalars, update, reference, **PARTS)
WRONG = fusedopt.make_rule("wrong", scalars, another_order, reference, **PARTS)
REFUSES = fusedopt.make_rule("refuses", scalars, update, refuses, **PARTS)
