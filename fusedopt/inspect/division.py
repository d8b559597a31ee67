"""Conversions and reciprocals, where their operands are known: what integer division is made of.

The code around them takes any reciprocal within a few ulp of the right one and corrects the quotient, so it is enough
that these are as exact.
"""

from __future__ import annotations

import numpy as np

from fusedopt.inspect.registers import Registers
from fusedopt.inspect.sass import Instruction
from fusedopt.inspect.words import Word


def _write(r: Registers, ins: Instruction, bits: np.ndarray, source: Word) -> None:
    r.write(ins.operands[0], Word(np.where(source.known, bits, np.uint32(0)).astype(np.uint32), source.known))


def to_float(r: Registers, ins: Instruction) -> None:
    """A 32-bit integer as fp32, rounded to nearest or, for reciprocals, up; of another width: unknown."""
    if not {"U64", "S64", "F64", "F16", "U8", "S8", "U16", "S16"}.isdisjoint(ins.modifiers):
        r.forget(ins.operands[0], 2 if "F64" in ins.modifiers else 1)
        return
    x = r.read(ins.operands[1])
    exact = (x.bits if "U32" in ins.modifiers else x.bits.view(np.int32)).astype(np.float64)
    rounded = exact.astype(np.float32)
    if "RP" in ins.modifiers:
        rounded = np.where(rounded < exact, np.nextafter(rounded, np.float32(np.inf)), rounded)
    _write(r, ins, rounded.view(np.uint32), x)


def to_integer(r: Registers, ins: Instruction) -> None:
    """fp32 as a 32-bit integer, cut off and clamped; of another width, or rounded otherwise: unknown."""
    if "TRUNC" not in ins.modifiers or not {"F64", "F16", "S64", "U64"}.isdisjoint(ins.modifiers):
        r.forget(ins.operands[0], 1 if {"S64", "U64"}.isdisjoint(ins.modifiers) else 2)
        return
    x = r.read(ins.operands[1])
    least, most = (0, 2**32 - 1) if "U32" in ins.modifiers else (-(2**31), 2**31 - 1)
    value = np.nan_to_num(x.bits.view(np.float32).astype(np.float64))
    _write(r, ins, np.clip(np.trunc(value), least, most).astype(np.int64).astype(np.uint32), x)


def special_function(r: Registers, ins: Instruction) -> None:
    """The reciprocal; other functions: unknown."""
    if ins.modifiers != ("RCP",):
        r.forget(ins.operands[0])
        return
    x = r.read(ins.operands[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        _write(r, ins, (np.float32(1.0) / x.bits.view(np.float32)).view(np.uint32), x)
