"""Codes for optimizer state that `perf.studies.state_formats` compares: what comes back of a tensor that was coded.

A code maps groups (n, G) and dither, None for nearest rounding or uniform in [0, 1) of the same shape, to what is
decoded. Most are `relative`: a curve of the share of the group's largest magnitude, times that scale.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Dither = Tensor | None
Code = Callable[[Tensor, Dither], Tensor]


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int32)


def _float(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def _round(x: Tensor, u: Dither) -> Tensor:
    return torch.floor(x + (0.5 if u is None else u))


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "fp32": lambda s: s,
    "bf16, up": lambda s: _float((_bits(s) + 0xFFFF) & ~0xFFFF),
    "bf16, nearest": lambda s: s.bfloat16().float(),
    "fp16": lambda s: s.half().float(),
    "power of two": lambda s: _float((_bits(s) + 0x7FFFFF) & ~0x7FFFFF),
}
"""What is stored of a group's largest magnitude."""


def relative(curve: Code, scale: Callable[[Tensor], Tensor]) -> Code:
    """Code x / scale by ``curve``; where the scale is 0 (nothing there, or underflow) everything is."""

    def code(x: Tensor, u: Dither) -> Tensor:
        s = scale(x.abs().amax(1, keepdim=True))
        return torch.where(s > 0, curve(torch.where(s > 0, x / s, 0.0), u) * s, 0.0)

    return code


def root(power: float, top: int) -> Code:
    """sign · (c / top)^power with c in 0…top: rounded in the power-th root; 1 is linear, 2 the signed square root."""

    def curve(y: Tensor, u: Dither) -> Tensor:
        c = _round(y.abs() ** (1 / power) * top, u).clamp(0, top) / top
        return c**power * y.sign()

    return curve


def zero_free(power: float, levels: int) -> Code:
    """(c / levels)^power with c in 1…levels, for nonnegative numbers."""
    return lambda y, u: (_round(y ** (1 / power) * levels, u).clamp(1, levels) / levels) ** power


def softsign(top: int) -> Code:
    """Rounded in 2y / (1 + |y|): twice as fine at 0 as at 1, as FlashOptim has it."""

    def curve(y: Tensor, u: Dither) -> Tensor:
        c = _round(2 * y / (1 + y.abs()) * top, u).clamp(-top, top) / top
        return c / (2 - c.abs())

    return curve


def minifloat(exponent: int, mantissa: int, zero: bool = True) -> Code:
    """Sign, exponent and mantissa, with subnormals; 1 is the largest. zero: False for at least the smallest above 0."""
    largest = (2 - 2.0**-mantissa) * 2.0 ** (2**exponent - 1)

    def curve(y: Tensor, u: Dither) -> Tensor:
        z = y.abs().double() * largest
        step = torch.exp2(torch.floor(torch.log2(z.clamp_min(2.0))) - mantissa)
        rounded = (_round(z / step, u) * step).clamp(0.0 if zero else 2.0 ** (1 - mantissa), largest)
        return (rounded / largest).float() * y.sign()

    return curve


def float8(dtype: torch.dtype, zero: bool = True) -> Code:
    """One of torch's 8-bit floats, nearest only; 1 is its largest. zero: False for at least the smallest above 0."""
    info = torch.finfo(dtype)
    least = -info.max if zero else info.smallest_normal * info.eps
    return lambda y, u: (y * info.max).to(dtype).float().clamp_min(least) / info.max


def _logarithmic(x: Tensor, u: Dither, mantissa: int) -> Tensor:
    """The leading bits of |x| down to ``mantissa`` bits of fraction: integers that grow with log |x|."""
    dropped = 23 - mantissa
    dither = 1 << (dropped - 1) if u is None else (u * (1 << dropped)).to(torch.int32)
    return (_bits(x.abs()) + dither) >> dropped


def log_share(exponent: int, mantissa: int) -> Code:
    """Leading bits of y ≤ 1, which has the highest code; the lowest stands for all that is less, so nothing is 0."""
    top, one = (1 << (exponent + mantissa)) - 1, 127 << mantissa

    def curve(y: Tensor, u: Dither) -> Tensor:
        c = (_logarithmic(y, u, mantissa) - one).clamp(-top, 0)
        return _float((c + one) << (23 - mantissa))

    return curve


def log_integer(exponent: int, mantissa: int, zero: bool = False) -> Code:
    """Leading bits of x itself, counted from the group's highest: no multiplication. zero: the lowest code is 0."""
    top = (1 << (exponent + mantissa)) - 1

    def code(x: Tensor, u: Dither) -> Tensor:
        highest = _logarithmic(x.abs().amax(1, keepdim=True), None if u is None else torch.tensor(1 - 2**-16), mantissa)
        base = (highest - top).clamp_min(0)
        c = (_logarithmic(x, u, mantissa) - base).clamp(0, top)
        decoded = _float((c + base) << (23 - mantissa))
        return torch.where(c == 0, 0.0, decoded) * x.sign() if zero else decoded

    return code


def dynamic_map(bits: int, signed: bool) -> Code:
    """bitsandbytes' map, nearest only: decades, each cut into linear steps, finer in the highest; 0 and 1 are in it."""
    decades = 7 if bits == 8 else 3
    levels = [0.0, 1.0]
    for decade in range(decades):
        count = 2 ** (decade + bits - 1 - decades + (0 if signed else 1))
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        levels += ((edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - decades + 1)).tolist()
    table = torch.tensor(sorted({*levels, *(-x for x in levels if signed and x < 1)}), dtype=torch.float32)
    middles = (table[1:] + table[:-1]) / 2
    return lambda y, u: table[torch.bucketize(y.contiguous(), middles)]


CURVES: dict[tuple[int, str], dict[str, Code]] = {
    (8, "signed"): {
        "linear": root(1, 127), "square root": root(2, 127), "power 1.5": root(1.5, 127), "softsign": softsign(127),
        "float e2m5": minifloat(2, 5), "float e3m4": minifloat(3, 4), "float e4m3": minifloat(4, 3),
        "fp8 e4m3": float8(torch.float8_e4m3fn), "fp8 e5m2": float8(torch.float8_e5m2),
        "dynamic map": dynamic_map(8, True),
    },
    (8, "nonnegative"): {
        "linear": root(1, 255), "square root": root(2, 255), "square root, no 0": zero_free(2, 256),
        "cube root, no 0": zero_free(3, 256), "4th root": root(4, 255), "4th root, no 0": zero_free(4, 256),
        "log e4m4": log_share(4, 4), "log e3m5": log_share(3, 5), "log e5m3": log_share(5, 3),
        "float e4m3, no 0": minifloat(4, 3, zero=False),
        "fp8 e4m3": float8(torch.float8_e4m3fn), "fp8 e4m3, no 0": float8(torch.float8_e4m3fn, zero=False),
        "fp8 e5m2, no 0": float8(torch.float8_e5m2, zero=False), "dynamic map": dynamic_map(8, False),
    },
    (4, "signed"): {
        "linear": root(1, 7), "square root": root(2, 7), "power 1.5": root(1.5, 7), "softsign": softsign(7),
        "float e2m1": minifloat(2, 1), "dynamic map": dynamic_map(4, True),
    },
    (4, "nonnegative"): {
        "linear, no 0": zero_free(1, 16), "square root": root(2, 15), "square root, no 0": zero_free(2, 16),
        "cube root, no 0": zero_free(3, 16), "4th root, no 0": zero_free(4, 16), "log e3m1": log_share(3, 1),
        "log e4m0": log_share(4, 0), "dynamic map": dynamic_map(4, False),
    },
}  # fmt: skip
"""Curves by bits and kind of slot, then name."""
INTEGER: dict[tuple[int, str], dict[str, Code]] = {
    (8, "signed"): {"integer log e3m4": log_integer(3, 4, zero=True)},
    (8, "nonnegative"): {"integer log e4m4": log_integer(4, 4)},
    (4, "signed"): {"integer log e2m1": log_integer(2, 1, zero=True), "integer log e3m0": log_integer(3, 0, zero=True)},
    (4, "nonnegative"): {"integer log e3m1": log_integer(3, 1), "integer log e4m0": log_integer(4, 0)},
}
"""Codes that are no curves of a share."""
FORMATS = tuple(CURVES)


class Format(NamedTuple):
    """A code by name, so that it can be sent to another process."""

    bits: int
    kind: str
    name: str
    scale: str = "fp32"
    group: int = 64

    def coded(self, x: Tensor, u: Dither = None) -> Tensor:
        """What comes back of x (rows, row length), coded in groups inside a row."""
        codes = INTEGER[self.bits, self.kind]
        if self.name in codes:
            code = codes[self.name]
        else:
            code = relative(CURVES[self.bits, self.kind][self.name], SCALES[self.scale])
        grouped = x.reshape(-1, self.group)
        return code(grouped, None if u is None else u.reshape(grouped.shape)).reshape(x.shape)


def formats(bits: int, kind: str) -> list[Format]:
    """All codes for this kind of slot."""
    return [Format(bits, kind, name) for name in (*CURVES[bits, kind], *INTEGER[bits, kind])]
