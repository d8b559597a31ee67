"""Which instructions the emulator knows, and what becomes of the others.

Enough of sm_80 to sm_100 to follow addresses, loops and branches. Floating point is not computed, but for what
integer division needs: its results are unknown. An instruction that stands nowhere here is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Callable

from fusedopt.inspect import arithmetic, division, moves
from fusedopt.inspect.arithmetic import leading
from fusedopt.inspect.errors import CannotFollow
from fusedopt.inspect.registers import Registers
from fusedopt.inspect.sass import Instruction


def execute(registers: Registers, ins: Instruction) -> None:
    """Carry out an instruction that is neither a branch nor a memory access.

    Raises:
        CannotFollow: its meaning is not known here.
    """
    if ins.opcode in WITHOUT_EFFECT:
        return
    handler = HANDLERS.get(ins.opcode)
    if handler is not None and not ("64" in ins.modifiers and ins.opcode not in WITH_WIDTH):
        handler(registers, ins)
    elif ins.opcode in ARITHMETIC:
        _forget(registers, ins)
    else:
        raise CannotFollow(f"unknown instruction {ins.text!r}")


def _forget(registers: Registers, ins: Instruction) -> None:
    predicates = leading(ins.operands)
    for operand in predicates:
        registers.forget(operand)
    if ins.opcode not in ONLY_PREDICATES:
        pair = ins.opcode in PAIRS or (ins.modifiers and ins.modifiers[0] in ("F64", "S64", "U64"))
        registers.forget(ins.operands[len(predicates)], 2 if pair else 1)


HANDLERS: dict[str, Callable[[Registers, Instruction], None]] = {
    **dict.fromkeys(("IADD3", "UIADD3", "IADD", "VIADD", "UVIADD"), arithmetic.add),
    **dict.fromkeys(("IMAD", "UIMAD"), arithmetic.multiply_add),
    **dict.fromkeys(("LEA", "ULEA"), arithmetic.shifted_add),
    **dict.fromkeys(("SHF", "USHF"), arithmetic.funnel_shift),
    **dict.fromkeys(("ISETP", "UISETP"), arithmetic.compare),
    **dict.fromkeys(("LOP3", "ULOP3"), arithmetic.logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), arithmetic.predicate_logic),
    **dict.fromkeys(("SEL", "USEL"), arithmetic.select),
    **dict.fromkeys(("IMNMX", "VIMNMX", "VIMNMX3", "UVIMNMX", "VIADDMNMX"), arithmetic.extremum),
    **dict.fromkeys(("PRMT", "UPRMT"), moves.permute),
    **dict.fromkeys(("SGXT", "USGXT"), moves.extend),
    **dict.fromkeys(("MOV", "UMOV"), moves.move),
    **dict.fromkeys(("LDC", "ULDC", "LDCU"), moves.constant),
    **dict.fromkeys(("S2R", "S2UR"), moves.special),
    "CS2R": moves.zero_pair,
    "R2UR": moves.to_uniform,
    "VOTEU": moves.vote,
    "P2R": moves.predicates_to_register,
    "R2P": moves.register_to_predicates,
    "HFMA2": moves.packed_half,
    **dict.fromkeys(("I2F", "I2FP"), division.to_float),
    "F2I": division.to_integer,
    "MUFU": division.special_function,
}

WITH_WIDTH = {"LDC", "ULDC", "LDCU"}
ONLY_PREDICATES = {"FSETP", "DSETP", "HSETP2", "FCHK"}
PAIRS = {"DADD", "DMUL", "DFMA", "FADD2", "FMUL2", "FFMA2"}
ARITHMETIC = {
    *ONLY_PREDICATES, *PAIRS, "FADD", "FMUL", "FFMA", "FSEL", "FSET", "FMNMX", "F2F", "F2FP", "HADD2", "HMUL2",
    "FHADD", "FRND", "SHFL", "REDUX", "CREDUX", "POPC",
}  # fmt: skip
"""Instructions whose results only data depends on, or is expected to: they become unknown."""

WITHOUT_EFFECT = {
    "NOP", "BSSY", "BSYNC", "BREAK", "WARPSYNC", "MEMBAR", "DEPBAR", "LDGDEPBAR", "YIELD", "ERRBAR", "CCTL",
}  # fmt: skip
