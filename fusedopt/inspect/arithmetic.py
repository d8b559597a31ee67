"""Integer arithmetic, comparisons and logic of sm_80 to sm_100, on the registers of a whole program.

What carries, truth tables and funnel shifts mean was read from compiled kernels; counts that depend on them are
checked against the interpreter's (`fusedopt inspect --check`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fusedopt.inspect.errors import CannotFollow
from fusedopt.inspect.registers import Registers
from fusedopt.inspect.sass import Instruction, Operand
from fusedopt.inspect.words import Flag, Wide, Word, high, low, shift_left, shift_right, signed, table, wide

BITS = np.uint64(32)


def leading(operands: tuple[Operand, ...]) -> tuple[Operand, ...]:
    """The predicates that an operand list begins with."""
    n = 0
    while n < len(operands) and operands[n].kind in ("P", "UP"):
        n += 1
    return operands[:n]


def _parts(ins: Instruction) -> tuple[Operand, tuple[Operand, ...], tuple[Operand, ...], tuple[Operand, ...]]:
    """``dst, carries out…, sources…, carries in…`` of an addition."""
    destination, *rest = ins.operands
    out = leading(tuple(rest))
    sources = tuple(o for o in rest[len(out) :] if o.kind not in ("P", "UP"))
    return destination, out, sources, tuple(rest[len(out) + len(sources) :])


def _carry_in(r: Registers, carries: tuple[Operand, ...]) -> tuple[np.ndarray, np.ndarray]:
    flags = [r.flag(o) for o in carries]
    total = sum((f.bits.astype(np.uint64) for f in flags), np.zeros(r.threads, np.uint64))
    return total, np.logical_and.reduce([r.yes, *(f.known for f in flags)])


def add(r: Registers, ins: Instruction) -> None:
    destination, out, sources, carries = _parts(ins)
    total, known = _carry_in(r, carries if "X" in ins.modifiers else ())
    overflows = []
    for source in sources:
        bits, bits_known = r.term(source)
        total, known = total + bits, known & bits_known
        overflows.append(total >> BITS)
        total = low(total).astype(np.uint64)
    carries_out = [sum(overflows)]
    if len(out) > 1:  # one belongs to the sum of the first two terms, the other to what the third one adds
        carries_out = [sum(overflows[:2]), sum(overflows[2:])]
    for operand, carry in zip(out, carries_out, strict=False):
        r.write_flag(operand, Flag(np.broadcast_to(np.asarray(carry) != 0, (r.threads,)), known))
    r.write(destination, Word(low(total), known))


def multiply_add(r: Registers, ins: Instruction) -> None:
    destination, out, (a, b, c), carries = _parts(ins)
    extend = wide if "U32" in ins.modifiers else signed
    x, y = r.read(a), r.read(b)
    product = extend(x) * extend(y)
    zero = (x.known & (x.bits == 0)) | (y.known & (y.bits == 0))
    known = (x.known & y.known) | zero
    carry, carry_known = _carry_in(r, carries if "X" in ins.modifiers else ())
    if "WIDE" in ins.modifiers or "HI" in ins.modifiers:
        if out or carries:
            raise CannotFollow(f"unknown form of {ins.text!r}")
        z = r.read_wide(c)
        total = Wide(np.where(zero, np.uint64(0), product) + z.bits, known & z.known)
        if "WIDE" in ins.modifiers:
            r.write_wide(destination, total)
        else:
            r.write(destination, Word(high(total.bits), total.known))
        return
    z32 = r.read(c)
    bits = low(np.where(zero, np.uint64(0), product) + wide(z32) + carry)
    r.write(destination, Word(bits, known & z32.known & carry_known))


def shifted_add(r: Registers, ins: Instruction) -> None:
    destination, out, sources, carries = _parts(ins)
    a, b = r.read(sources[0]), r.read(sources[1])
    by = np.uint64(sources[-1].value)
    known = a.known & b.known
    if "HI" not in ins.modifiers:
        shifted = wide(a) << by & np.uint64(0xFFFFFFFF)
    else:
        if "SX32" in ins.modifiers:
            both = signed(a)
        else:
            c = r.read(sources[2])
            both, known = wide(a) | wide(c) << BITS, known & c.known
        shifted = high(both << by).astype(np.uint64)
    carry, carry_known = _carry_in(r, carries if "X" in ins.modifiers else ())
    total = shifted + wide(b) + carry
    known = known & carry_known
    for operand in out[:1]:
        r.write_flag(operand, Flag(total >> BITS != 0, known))
    r.write(destination, Word(low(total), known))


def funnel_shift(r: Registers, ins: Instruction) -> None:
    destination, a, s, c = ins.operands
    x, by, y = r.read(a), r.read(s), r.read(c)
    both, n = wide(x) | wide(y) << BITS, wide(by)
    known = x.known & by.known & y.known
    arithmetic = any(m in ("S32", "S64") for m in ins.modifiers)
    if "W" in ins.modifiers:
        n = n & np.uint64(31)
    if ins.modifiers[0] == "L":
        result = shift_left(both, n)
        bits = high(result) if "HI" in ins.modifiers else low(result)
    elif "HI" in ins.modifiers:
        bits = low(shift_right(signed(y) if arithmetic else wide(y), n, arithmetic))
    else:
        bits = low(shift_right(both, n, arithmetic))
    r.write(destination, Word(bits, known))


_COMPARE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
}  # fmt: skip


def compare(r: Registers, ins: Instruction) -> None:
    first, second, a, b, other, *low_words = ins.operands
    x, y = r.read(a), r.read(b)
    left, right = (x.bits, y.bits) if "U32" in ins.modifiers else (x.bits.view(np.int32), y.bits.view(np.int32))
    known = x.known & y.known
    result = Flag(_COMPARE[ins.modifiers[0]](left, right), known)
    if "EX" in ins.modifiers:  # high words: equal ones leave it to the comparison of the low words
        below = r.flag(low_words[0])
        equal = Flag(left == right, known)
        strict = Flag(result.bits & ~equal.bits, known)
        result = result & below if ins.modifiers[0] == "EQ" else strict | (equal & below)
        if ins.modifiers[0] == "NE":
            result = strict | below
    combine = {"AND": Flag.__and__, "OR": Flag.__or__, "XOR": Flag.__xor__}
    combine_with, accumulated = next(combine[m] for m in ins.modifiers if m in combine), r.flag(other)
    r.write_flag(second, combine_with(~result, accumulated))
    r.write_flag(first, combine_with(result, accumulated))


def logic(r: Registers, ins: Instruction) -> None:
    out = leading(ins.operands)
    destination, a, b, c, code, *rest = ins.operands[len(out) :]
    x, y, z = r.read(a), r.read(b), r.read(c)
    result = Word(table(code.value, x.bits, y.bits, z.bits), x.known & y.known & z.known)
    r.write(destination, result)
    if out:
        nonzero, other = Flag(result.bits != 0, result.known), r.flag(rest[0])
        r.write_flag(out[0], nonzero & other if "PAND" in ins.modifiers else nonzero | other)


def predicate_logic(r: Registers, ins: Instruction) -> None:
    first, second, a, b, c, code, other_code = ins.operands
    flags = [r.flag(o) for o in (a, b, c)]
    for operand, truth in ((second, other_code.value), (first, code.value)):
        any_true, any_false = r.no, r.no
        for index in range(8):  # a result is known if every value of the unknown operands gives the same
            possible = r.yes
            for flag, bit in zip(flags, (4, 2, 1), strict=True):
                possible = possible & (~flag.known | (flag.bits == bool(index & bit)))
            if truth >> index & 1:
                any_true = any_true | possible
            else:
                any_false = any_false | possible
        r.write_flag(operand, Flag(any_true & ~any_false, any_true ^ any_false))


def select(r: Registers, ins: Instruction) -> None:
    destination, a, b, p = ins.operands
    x, y, flag = r.read(a), r.read(b), r.flag(p)
    r.write(destination, _choose(flag, x, y))


def _choose(flag: Flag, x: Word, y: Word) -> Word:
    return Word(np.where(flag.bits, x.bits, y.bits), flag.known & np.where(flag.bits, x.known, y.known))


def extremum(r: Registers, ins: Instruction) -> None:
    """Minimum or maximum, of three in VIMNMX3; VIADDMNMX adds its first two operands before."""
    destination, *rest = (ins.operands[0], *(o for o in ins.operands[1:-1] if o.kind not in ("P", "UP")))
    words = [r.read(o) for o in rest]
    if ins.opcode == "VIADDMNMX":
        words[:2] = [Word(words[0].bits + words[1].bits, words[0].known & words[1].known)]
    minimum = r.flag(ins.operands[-1])
    x, *others = words
    for y in others:
        less = x.bits < y.bits if "U32" in ins.modifiers else x.bits.view(np.int32) < y.bits.view(np.int32)
        chosen = _choose(Flag(less == minimum.bits, minimum.known), x, y)
        x = Word(chosen.bits, chosen.known & x.known & y.known)
    r.write(destination, x)
