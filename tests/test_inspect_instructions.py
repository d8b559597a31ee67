"""The instructions that the emulator of `fusedopt inspect` knows, against Python's integers."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sass_text import code

from fusedopt.inspect import alu, sass
from fusedopt.inspect.registers import Registers

U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)


def execute(lines: Sequence[str], values: dict[str, int]) -> Registers:
    """Run instructions on one warp whose registers hold the values in every thread."""
    registers = Registers(32, {}, {})
    for name, value in values.items():
        operand = code(f"MOV {name}, RZ").instructions[0].operands[0]
        registers.write(operand, registers.number(value))
    for ins in code(*lines).instructions:
        guard = registers.flag(ins.guard) if ins.guard else None
        registers.run = registers.yes if guard is None else guard.bits
        alu.execute(registers, ins)
    return registers


def word(registers: Registers, name: str) -> int:
    """A register that every thread knows, and that is the same in all."""
    x = registers.read(code(f"MOV R0, {name}").instructions[0].operands[1])
    assert x.known.all() and (x.bits == x.bits[0]).all()
    return int(x.bits[0])


def pair(registers: Registers, name: str) -> int:
    prefix, number = name.rstrip("0123456789"), int(name.lstrip("UR"))
    return word(registers, name) | word(registers, f"{prefix}{number + 1}") << 32


def flag(registers: Registers, name: str) -> bool:
    f = registers.flag(code(f"PLOP3.LUT P0, PT, {name}, PT, PT, 0x80, 0x0").instructions[0].operands[2])
    assert f.known.all()
    return bool(f.bits[0])


def split(name: str, value: int) -> dict[str, int]:
    prefix, number = name.rstrip("0123456789"), int(name.lstrip("UR"))
    return {name: value & 0xFFFFFFFF, f"{prefix}{number + 1}": value >> 32}


@given(U64, U64)
def test_addition_in_two_words(a: int, b: int) -> None:
    values = {**split("R2", a), **split("R4", b)}
    lines = ["IADD3 R6, P1, R2, R4, RZ", "IADD3.X R7, R3, R5, RZ, P1, !PT"]
    assert pair(execute(lines, values), "R6") == (a + b) % 2**64
    blackwell = ["IADD3 R6, P1, PT, R2, R4, RZ", "IADD3.X R7, PT, PT, R3, R5, RZ, P1, !PT"]
    assert pair(execute(blackwell, values), "R6") == (a + b) % 2**64
    minus = ["IADD3 R6, P1, R2, -R4, RZ", "IADD3.X R7, R3, ~R5, RZ, P1, !PT"]
    assert pair(execute(minus, values), "R6") == (a - b) % 2**64


@given(U64, U64, U64)
def test_addition_of_three_terms_has_two_carries(a: int, b: int, c: int) -> None:
    values = {**split("R2", a), **split("R4", b), **split("UR6", c)}
    lines = ["IADD3 R8, P4, P6, R2, UR6, R4", "IADD3.X R9, R3, UR7, R5, P4, P6"]
    assert pair(execute(lines, values), "R8") == (a + b + c) % 2**64


@given(U64, U64, st.integers(1, 31))
def test_shifted_addition(a: int, b: int, n: int) -> None:
    values = {**split("R2", a), **split("R4", b)}
    lines = [f"LEA R6, P0, R2, R4, {n:#x}", f"LEA.HI.X R7, R2, R5, R3, {n:#x}, P0"]
    assert pair(execute(lines, values), "R6") == ((a << n) + b) % 2**64
    low = a % 2**32
    extended = low - (2**32 if low >= 2**31 else 0)
    lines = [f"LEA R6, P0, R2, R4, {n:#x}", f"LEA.HI.X.SX32 R7, R2, R5, {n:#x}, P0"]
    assert pair(execute(lines, values), "R6") == ((extended << n) + b) % 2**64


@given(U32, U32, U64)
def test_multiplication(a: int, b: int, c: int) -> None:
    values = {"R2": a, "R3": b, **split("R4", c)}
    sa, sb = (x - (2**32 if x >= 2**31 else 0) for x in (a, b))
    assert pair(execute(["IMAD.WIDE.U32 R6, R2, R3, R4"], values), "R6") == (a * b + c) % 2**64
    assert pair(execute(["IMAD.WIDE R6, R2, R3, R4"], values), "R6") == (sa * sb + c) % 2**64
    assert word(execute(["IMAD R6, R2, R3, R4"], values), "R6") == (a * b + c) % 2**32
    assert word(execute(["IMAD.HI.U32 R6, R2, R3, RZ"], values), "R6") == a * b >> 32
    assert word(execute(["IMAD.MOV.U32 R6, RZ, RZ, -R2"], values), "R6") == -a % 2**32


COMPARISONS = {"LT": "__lt__", "LE": "__le__", "GT": "__gt__", "GE": "__ge__", "EQ": "__eq__", "NE": "__ne__"}


@given(U64, U64, st.sampled_from(sorted(COMPARISONS)), st.booleans())
def test_comparison_of_two_words(a: int, b: int, how: str, unsigned: bool) -> None:
    for x, y in ((a, b), (a, a), (a, a ^ 1)):
        values = {**split("R2", x), **split("R4", y)}
        kind = ".U32" if unsigned else ""
        lines = [
            f"ISETP.{how}.U32.AND P0, PT, R2, R4, PT",
            f"ISETP.{how}{kind}.AND.EX P1, P2, R3, R5, PT, P0",
        ]
        sx, sy = (v if unsigned or v < 2**63 else v - 2**64 for v in (x, y))
        registers = execute(lines, values)
        expected = getattr(sx, COMPARISONS[how])(sy)
        assert flag(registers, "P1") == expected
        assert flag(registers, "P2") == (not expected)


@given(U64, st.integers(0, 63), U32)
def test_funnel_shifts(a: int, n: int, small: int) -> None:
    values = {**split("R2", a), "R4": small}
    signed = a - (2**64 if a >= 2**63 else 0)
    assert word(execute([f"SHF.L.U64.HI R6, R2, {n:#x}, R3"], values), "R6") == (a << n) % 2**64 >> 32
    assert word(execute([f"SHF.R.U64 R6, R2, {n:#x}, R3"], values), "R6") == (a >> n) % 2**32
    assert word(execute([f"SHF.R.S64 R6, R2, {n:#x}, R3"], values), "R6") == (signed >> n) % 2**32
    assert word(execute([f"SHF.L.U32 R6, R4, {n % 32:#x}, RZ"], values), "R6") == (small << n % 32) % 2**32
    assert word(execute([f"SHF.R.U32.HI R6, RZ, {n % 32:#x}, R4"], values), "R6") == small >> n % 32
    extended = small - (2**32 if small >= 2**31 else 0)
    assert word(execute(["SHF.R.S32.HI R6, RZ, 0x1f, R4"], values), "R6") == (extended >> 31) % 2**32


@given(U32, U32, U32)
def test_logic(a: int, b: int, c: int) -> None:
    values = {"R2": a, "R3": b, "R4": c}
    assert word(execute(["LOP3.LUT R6, R2, R3, RZ, 0xc0, !PT"], values), "R6") == a & b
    assert word(execute(["LOP3.LUT R6, R2, R3, R4, 0xfe, !PT"], values), "R6") == a | b | c
    assert word(execute(["LOP3.LUT R6, R2, R3, R4, 0x96, !PT"], values), "R6") == a ^ b ^ c
    registers = execute(["LOP3.LUT P0, RZ, R2, 0x10, RZ, 0xc0, !PT", "SEL R6, R3, R4, P0"], values)
    assert word(registers, "R6") == (b if a & 0x10 else c)
    minimum = execute(["VIMNMX.U32 R6, R2, R3, PT", "VIMNMX.U32 R7, R2, R3, !PT"], values)
    assert (word(minimum, "R6"), word(minimum, "R7")) == (min(a, b), max(a, b))
    three = execute(["VIMNMX3.U32 R6, R2, R3, R4, PT", "VIMNMX3.U32 R7, R2, R3, R4, !PT"], values)
    assert (word(three, "R6"), word(three, "R7")) == (min(a, b, c), max(a, b, c))


@given(U32, U32.filter(bool))
def test_unsigned_division(a: int, b: int) -> None:
    """The compiler's way: a reciprocal of fp32, one step of Newton's in integers, then at most two corrections."""
    lines = [
        "I2F.U32.RP R4, R2", "MUFU.RCP R4, R4", "IADD3 R4, R4, 0xffffffe, RZ", "F2I.FTZ.U32.TRUNC.NTZ R5, R4",
        "IMAD R6, R3, R5, RZ", "MOV R4, RZ", "IMAD.HI.U32 R7, R5, R6, R4",
    ]  # fmt: skip
    registers = execute(lines, {"R2": b, "R3": -b % 2**32})
    assert 0 <= a // b - (a * word(registers, "R7") >> 32) <= 2


def test_conversions_of_other_widths_are_unknown() -> None:
    for line in ("I2F.U64.RP R4, R2", "F2I.S64.F64.TRUNC R4, R2", "MUFU.SQRT R4, R2", "I2F.U8 R4, R2"):
        registers = execute(["MOV R4, RZ", line], {"R2": 7, "R3": 0})
        assert not registers.read(sass.Operand("R", 4)).known.any()


@given(U32, U32, st.integers(1, 32), st.integers(0, 127))
def test_moves(a: int, b: int, n: int, mask: int) -> None:
    values = {"R2": a, "R3": b}
    assert word(execute(["PRMT R6, R2, 0x5410, R3"], values), "R6") == (a & 0xFFFF) | (b & 0xFFFF) << 16
    assert word(execute([f"SGXT.U32 R6, R2, {n:#x}"], values), "R6") == a % 2**n
    field = a % 2**n
    extended = field - (2**n if field >= 2 ** (n - 1) else 0)
    assert word(execute([f"SGXT R6, R2, {n:#x}"], values), "R6") == extended % 2**32
    registers = execute([f"R2P PR, R2, {mask:#x}", f"P2R R6, PR, R3, {mask:#x}"], values)
    assert word(registers, "R6") == (b & ~mask) | (a & mask)
    assert word(execute(["HFMA2.MMA R6, -RZ, RZ, 0, 1.52587890625e-05"], {}), "R6") == 256


def test_a_predicate_is_known_as_soon_as_it_is_decided() -> None:
    unknown = ["FSETP.GT.AND P0, PT, R8, R9, PT"]
    registers = execute([*unknown, "ISETP.EQ.OR P1, PT, RZ, RZ, P0", "ISETP.NE.AND P2, PT, RZ, RZ, P0"], {})
    assert flag(registers, "P1") is True and flag(registers, "P2") is False
    registers = execute([*unknown, "PLOP3.LUT P1, PT, P0, PT, PT, 0xfc, 0x0"], {})
    assert flag(registers, "P1") is True
    for undecided in ("ISETP.EQ.AND P1, PT, RZ, RZ, P0", "ISETP.EQ.AND P1, PT, R8, RZ, PT"):
        registers = execute([*unknown, undecided], {})
        assert not registers.flag(sass.Operand("P", 1)).known.any()


def test_what_a_thread_may_have_written_is_unknown() -> None:
    registers = execute(["MOV R2, 0x1"], {})
    registers.run, registers.maybe = registers.no, registers.yes
    alu.execute(registers, code("MOV R2, 0x2").instructions[0])
    assert not registers.read(sass.Operand("R", 2)).known.any()


def test_arithmetic_forgets_exactly_what_it_writes() -> None:
    values = {f"R{n}": n for n in range(2, 8)}
    registers = execute(["DADD R4, R2, R2", "FADD R7, R2, R3"], values)
    known = [n for n in range(2, 8) if registers.read(sass.Operand("R", n)).known.all()]
    assert known == [2, 3, 6]


def test_a_vote_asks_the_running_threads_of_a_warp() -> None:
    registers = Registers(64, {}, {"SR_TID.X": np.arange(64, dtype=np.uint32)})
    for line in ("S2R R2, SR_TID.X", "ISETP.EQ.AND P1, PT, R2, 0x5, PT", "VOTEU.ANY UP0, P1"):
        alu.execute(registers, code(line).instructions[0])
    x = registers.flag(sass.Operand("UP", 0))
    assert x.known.all() and (x.bits == np.repeat([True, False], 32)).all()


def test_uniform_registers_take_the_first_running_thread() -> None:
    registers = Registers(64, {}, {"SR_TID.X": np.arange(64, dtype=np.uint32)})
    alu.execute(registers, code("S2R R2, SR_TID.X").instructions[0])
    registers.run = np.arange(64) % 32 >= 3
    alu.execute(registers, code("R2UR UR4, R2").instructions[0])
    x = registers.read(sass.Operand("UR", 4))
    assert (x.bits == np.repeat([3, 35], 32)).all()
