"""The only home of division, square root, casts, rounding to nearest and the FMA policy; random numbers: ``rng.py``.

Every function stands twice: ``@triton.jit`` for kernels and, right below, its eager twin with the same lines.
FMA policy: every kernel is compiled with ``enable_fp_fusion=False`` (see ``launch.py``), and the twins use only
mul, add, div and sqrt, so both round at the same places and agree bit for bit.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = bool(knobs.runtime.interpret)
"""True when this process decorates kernels for the interpreter (TRITON_INTERPRET=1 at import)."""
_INTERPRETED = tl.constexpr(INTERPRETED)


# --------------------------------------------------------------------------------------- division and square root
@triton.jit
def div(a, b, EXACT: tl.constexpr):
    """a / b, correctly rounded when EXACT (always so for fp64), else for b > 0 by its inverse root squared (4 ulp).

    The hardware's fast division spends five instructions more on denominators beyond 2¹²⁶.
    """
    if a.dtype == tl.float64 or (_INTERPRETED and not EXACT):
        return a / b
    elif not EXACT:
        r = tl.rsqrt(b)
        return a * r * r
    else:
        return tl.div_rn(a, b)


@triton.jit
def sqrt(x, EXACT: tl.constexpr):
    """Square root, correctly rounded when EXACT (always so for fp64), else ``sqrt.approx`` (1 ulp)."""
    if x.dtype == tl.float64 or not EXACT:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def maximum(a, b):
    """Larger of a and b; NaN if either is NaN, as ``torch.maximum``."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    """−1, 0 or 1; 0 for NaN, as ``torch.sign``."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


# ------------------------------------------------------------------------------------------------ running averages
@triton.jit
def average_weight(q):
    """Weight for `average` from 0 ≤ q = 1 − β ≤ 1, in float64; 0 stands for q = 1, 2⁻¹⁴⁹ for q = 0."""
    return tl.where(q < 0.5, tl.maximum(q, 2.0**-149), q - 1.0)


def average_weight_eager(q: float) -> float:
    """Eager twin of `average_weight`."""
    return max(q, 2.0**-149) if q < 0.5 else q - 1.0


@triton.jit
def average(old, new, w):
    """old + q·(new − old), written from the nearer end: from ``new`` when q ≥ 0.5, or small q's form cancels."""
    return tl.where(w <= 0.0, new, old) + w * (new - old)


def average_eager(old: Any, new: Any, w: float) -> Any:
    """Eager twin of `average` (works on anything with arithmetic)."""
    return (new if w <= 0.0 else old) + w * (new - old)


# ------------------------------------------------------------------------------------------------- bias correction
@triton.jit
def one_minus_power(q, t):
    """1 − (1 − q)ᵗ in float64 for integer t < 2³¹, by repeated squaring of q: relative error 3e-16.

    No cancellation, no exp or log: the same bits in every mode. With q = 1 − β this is 1 − βᵗ.
    """
    t = t.to(tl.int64)
    r = q * 0.0
    for i in tl.static_range(31):
        r = tl.where(((t >> i) & 1) != 0, r + q * (1.0 - r), r)
        q = q * (2.0 - q)
    return r


def one_minus_power_eager(q: float, t: float) -> float:
    """Eager twin of `one_minus_power` on Python floats (trailing squarings that cannot matter are left out)."""
    r, n = q * 0.0, int(t)
    while n:
        r = r + q * (1.0 - r) if n & 1 else r
        q = q * (2.0 - q)
        n >>= 1
    return r


# ---------------------------------------------------------------------- exponential, logarithm and power in float64
# For scalars only: add, mul and div, so that every mode has the same bits, which no library's exp and log promise.
_LN2_HIGH = tl.constexpr(6.93147180369123816490e-01)  # 33 bits of ln 2, so that k times it is exact
_LN2_LOW = tl.constexpr(1.90821492927058770002e-10)
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp(x):
    """eˣ in float64, within 2 ulp (0 below −708, inf above 709): Taylor of degree 14 on |r| ≤ ½ln 2, times 2ᵏ."""
    y = tl.minimum(tl.maximum(x, -708.0), 709.0)
    k = tl.floor(y * _LOG2_E + 0.5)
    r = (y - k * _LN2_HIGH) - k * _LN2_LOW
    p = r * 0.0 + 1.0
    for i in tl.static_range(14):
        p = 1.0 + p * (r / (14.0 - i))
    two_k = ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(x < -708.0, 0.0, tl.where(x > 709.0, float("inf"), p * two_k))


def exp_eager(x: float) -> float:
    """Eager twin of `exp`."""
    y = min(max(x, -708.0), 709.0)
    k = math.floor(y * _LOG2_E.value + 0.5)
    r = (y - k * _LN2_HIGH.value) - k * _LN2_LOW.value
    p = r * 0.0 + 1.0
    for i in range(14):
        p = 1.0 + p * (r / (14.0 - i))
    return 0.0 if x < -708.0 else math.inf if x > 709.0 else p * math.ldexp(1.0, k)


@triton.jit
def log(x):
    """ln x in float64 for normal x > 0, within 2 ulp (absolute 2e-16 near 1); −inf for anything smaller.

    x = m·2ᵏ with m in [√½, √2); ln m = 2·artanh((m − 1)/(m + 1)) by its series.
    """
    bits = x.to(tl.int64, bitcast=True)
    k = ((bits >> 52) - 1023).to(tl.float64)
    m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    k = tl.where(m > 1.4142135623730951, k + 1.0, k)
    m = tl.where(m > 1.4142135623730951, m * 0.5, m)
    u = (m - 1.0) / (m + 1.0)
    p = u * 0.0
    for i in tl.static_range(11):
        p = p * (u * u) + 1.0 / (23.0 - 2.0 * i)
    p = p * (u * u)
    y = k * _LN2_HIGH + (k * _LN2_LOW + 2.0 * (u + u * p))
    return tl.where(x < 2.2250738585072014e-308, float("-inf"), y)


def log_eager(x: float) -> float:
    """Eager twin of `log`."""
    if x < 2.2250738585072014e-308:
        return -math.inf
    m, exponent = math.frexp(x)
    m, k = m * 2.0, exponent - 1.0
    if m > 1.4142135623730951:
        m, k = m * 0.5, k + 1.0
    u = (m - 1.0) / (m + 1.0)
    p = u * 0.0
    for i in range(11):
        p = p * (u * u) + 1.0 / (23.0 - 2.0 * i)
    p = p * (u * u)
    return k * _LN2_HIGH.value + (k * _LN2_LOW.value + 2.0 * (u + u * p))


@triton.jit
def power(x, y):
    """xʸ in float64 for x ≥ 0: exp(y·ln x), relative error (2 + |y·ln x|)·2e-16; exact for y = 0, 1 and 2."""
    z = exp(y * log(x))
    z = tl.where(x == 0.0, tl.where(y > 0.0, 0.0, float("inf")), z)
    return tl.where(y == 0.0, 1.0, tl.where(y == 1.0, x, tl.where(y == 2.0, x * x, z)))


def power_eager(x: float, y: float) -> float:
    """Eager twin of `power`."""
    if y in (0.0, 1.0, 2.0):
        return (1.0, x, x * x)[int(y)]
    if x == 0.0:
        return 0.0 if y > 0.0 else math.inf
    return exp_eager(y * log_eager(x))


# ------------------------------------------------------------------------------------------------ bf16, by its bits
@triton.jit
def widen(x, T: tl.constexpr, COMPUTE: tl.constexpr):
    """Stored value of type T as COMPUTE. bf16 arrives as its 16 bits (see `memory.py`)."""
    if T == tl.bfloat16:
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(COMPUTE)
    else:
        return x.to(COMPUTE)


@triton.jit
def narrow(x, T: tl.constexpr):
    """Round x once, to nearest even, to type T; bf16 leaves as its 16 bits. NaN stays NaN, ±inf stay."""
    if T == tl.bfloat16:
        x = x.to(tl.float32)
        if _INTERPRETED:
            b = x.to(tl.uint32, bitcast=True)
            r = (b + 0x7FFF + ((b >> 16) & 1)) >> 16
            return tl.where(x != x, 0x7FFF, r).to(tl.uint16)
        else:
            return x.to(tl.bfloat16).to(tl.uint16, bitcast=True)
    else:
        return x.to(T)


# ---------------------------------------------------------------------------------------------------------- dtypes
_TRITON_TYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
    torch.int16: tl.int16,
}
REAL_TYPE = {torch.complex64: torch.float32, torch.complex128: torch.float64}
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def triton_type(dtype: torch.dtype) -> Any:
    """Triton type of one stored number of a torch dtype (complex numbers are pairs of their real type)."""
    return _TRITON_TYPES[REAL_TYPE.get(dtype, dtype)]


def compute_type(dtype: torch.dtype) -> torch.dtype:
    """Arithmetic for parameters of a dtype: fp64 for fp64 and complex128, else fp32."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
