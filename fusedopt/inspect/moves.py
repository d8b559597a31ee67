"""Instructions of sm_80 to sm_100 that move numbers: between registers, from constants, to and from predicates."""

from __future__ import annotations

import numpy as np

from fusedopt.inspect.errors import CannotFollow
from fusedopt.inspect.registers import WARP, Registers
from fusedopt.inspect.sass import ZERO, Instruction, Operand
from fusedopt.inspect.words import Flag, Word, low, shift_right, signed, wide

BITS = np.uint64(32)


def permute(r: Registers, ins: Instruction) -> None:
    destination, a, s, b = ins.operands
    x, selector, y = r.read(a), r.read(s), r.read(b)
    if len(ins.modifiers) > 0:
        raise CannotFollow(f"unknown form of {ins.text!r}")
    both = wide(x) | wide(y) << BITS
    bits = np.zeros(r.threads, np.uint64)
    for i in range(4):
        code = wide(selector) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (code & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(code & np.uint64(8), np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        bits |= byte << np.uint64(8 * i)
    r.write(destination, Word(low(bits), x.known & selector.known & y.known))


def extend(r: Registers, ins: Instruction) -> None:
    destination, a, b = ins.operands
    x, n = r.read(a), r.read(b)
    by = BITS - np.clip(wide(n), 1, 32)
    top = Word(low(wide(x) << by), x.known & n.known)
    unsigned = "U32" in ins.modifiers
    bits = low(shift_right(wide(top) if unsigned else signed(top), by, arithmetic=not unsigned))
    r.write(destination, Word(bits, top.known))


def move(r: Registers, ins: Instruction) -> None:
    r.write(ins.operands[0], r.read(ins.operands[1]))


def constant(r: Registers, ins: Instruction) -> None:
    destination, source = ins.operands
    size = next((int(m) for m in ins.modifiers if m.isdigit()), 32)
    if source.kind != "constant" or any(m in ("U8", "S8", "U16", "S16") for m in ins.modifiers):
        r.forget(destination, size // 32)
        return
    for i in range(size // 32):
        r.write(destination, r.read(Operand("constant", source.value + 4 * i)), i)


def special(r: Registers, ins: Instruction) -> None:
    r.write(ins.operands[0], r.special(ins.operands[1].text))


def zero_pair(r: Registers, ins: Instruction) -> None:
    word = r.number(0) if ins.operands[1].text == "SRZ" else r.unknown
    for offset in range(1 if "32" in ins.modifiers else 2):
        r.write(ins.operands[0], word, offset)


def to_uniform(r: Registers, ins: Instruction) -> None:
    """A warp's first running thread gives the uniform register its value."""
    destination = next(o for o in ins.operands if o.kind == "UR")
    x = r.read(ins.operands[-1])
    first = r.run.reshape(-1, WARP).argmax(axis=1) + np.arange(0, r.threads, WARP)
    r.write(destination, Word(x.bits[first].repeat(WARP), x.known[first].repeat(WARP)))


def vote(r: Registers, ins: Instruction) -> None:
    """Whether any running thread of a warp has a predicate."""
    if "ANY" not in ins.modifiers or [o.kind for o in ins.operands] != ["UP", "P"]:
        raise CannotFollow(f"unknown form of {ins.text!r}")
    flag = r.flag(ins.operands[1])
    yes = (flag.bits & flag.known & r.run).reshape(-1, WARP).any(axis=1).repeat(WARP)
    unsure = (~flag.known & r.run).reshape(-1, WARP).any(axis=1).repeat(WARP)
    r.write_flag(ins.operands[0], Flag(yes, yes | ~unsure))


def predicates_to_register(r: Registers, ins: Instruction) -> None:
    destination, _, base, mask = ins.operands
    x = r.read(base)
    byte = next((int(m[1]) for m in ins.modifiers if m in ("B1", "B2", "B3")), 0)
    bits, known = x.bits & np.uint32(~(mask.value << 8 * byte) & 0xFFFFFFFF), x.known
    for n in range(7):
        if mask.value >> n & 1:
            flag = r.flag(Operand("P", n))
            bits = bits | flag.bits.astype(np.uint32) << np.uint32(n + 8 * byte)
            known = known & flag.known
    r.write(destination, Word(bits, known))


def register_to_predicates(r: Registers, ins: Instruction) -> None:
    _, source, mask = ins.operands
    x = r.read(source)
    byte = next((int(m[1]) for m in ins.modifiers if m in ("B1", "B2", "B3")), 0)
    for n in range(7):
        if mask.value >> n & 1:
            r.write_flag(Operand("P", n), Flag(x.bits >> np.uint32(n + 8 * byte) & np.uint32(1) != 0, x.known))


def packed_half(r: Registers, ins: Instruction) -> None:
    """HFMA2 is how the compiler writes down some constants: ``0·0 + (high, low)``; any other use is arithmetic."""
    destination, a, b, *halves = ins.operands
    zeros = all(o.kind == "R" and o.value == ZERO for o in (a, b))
    if not zeros or len(halves) != 2 or any(h.kind != "other" for h in halves):
        r.forget(destination)
        return
    upper, lower = (int(np.float16(h.text).view(np.uint16)) for h in halves)
    r.write(destination, r.number(upper << 16 | lower))
