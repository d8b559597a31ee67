"""NVIDIA machine code as text: disassembles a cubin and parses the instructions and the resources they need.

The tools ship in the Triton wheel, so neither a CUDA toolkit nor a GPU is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fusedopt.inspect.errors import CannotFollow

Kind = Literal["R", "UR", "P", "UP", "number", "constant", "memory", "other"]

ZERO, TRUE = 255, 7
"""Numbers given to the register that is always zero (RZ, URZ) and to the predicate that is always true (PT, UPT)."""


@dataclass(frozen=True)
class Operand:
    """kind "R"/"UR": register number; "P"/"UP": predicate number; "number": its 32 bits; "constant": byte offset in
    bank 0; "memory": ``[base + value]``, base being a pair of registers (or one, if narrow) or None; "other": what only
    arithmetic needs, as text. negative: ``-x``; inverted: ``~x`` or ``!P``.
    """

    kind: Kind
    value: int = 0
    negative: bool = False
    inverted: bool = False
    text: str = ""
    base: int | None = None
    narrow: bool = False


@dataclass(frozen=True)
class Instruction:
    """One line of SASS: ``@guard opcode.modifiers operands``; target: address that a branch names."""

    address: int
    guard: Operand | None
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    text: str

    @property
    def target(self) -> int:
        """Address a branch goes to."""
        return self.operands[-1].value


@dataclass(frozen=True)
class Code:
    """A kernel: instructions, where each address is in the list, registers and stack per thread, shared memory in
    bytes (without what the driver reserves), and where its arguments begin in constant bank 0.
    """

    instructions: tuple[Instruction, ...]
    index: dict[int, int]
    registers: int
    stack: int
    parameters: int

    def count(self, *opcodes: str) -> int:
        """Instructions with one of these opcodes, executed or not."""
        return sum(i.opcode in opcodes for i in self.instructions)


def disassemble(cubin: bytes) -> Code:
    """Disassemble with the ``cuobjdump`` of the Triton in use."""
    from triton.backends import nvidia

    tool = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    if not tool.exists():
        raise CannotFollow(f"this build of Triton has no {tool.name} to disassemble with")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "-sass", "-elf", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotFollow("cuobjdump failed: " + " ".join((done.stderr or done.stdout).split()))
    return parse(done.stdout)


_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P(?:\d|T))\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+)")
_PARAMETERS = re.compile(r"EIATTR_PARAM_CBANK\s+Format:\s+\S+\s+Value:\s+0x[0-9a-f]+\s+0x([0-9a-f]+)")


def parse(listing: str) -> Code:
    """Parse what ``cuobjdump -sass -elf -res-usage`` prints for a cubin with one kernel."""
    resources, parameters = _RESOURCES.search(listing), _PARAMETERS.search(listing)
    if resources is None or parameters is None:
        raise CannotFollow("the disassembler's output has an unknown format")
    instructions = tuple(_instruction(match) for match in _LINE.finditer(listing))
    return Code(
        instructions,
        {instruction.address: i for i, instruction in enumerate(instructions)},
        int(resources[1]),
        int(resources[2]),
        int(parameters[1], 16) & 0xFFFF,
    )


def _instruction(match: re.Match[str]) -> Instruction:
    address, guard, name, rest = match.groups()
    opcode, *modifiers = name.split(".")
    operands = tuple(_operand(part) for part in re.split(r",(?![^\[]*\])", rest) if part.strip())
    if opcode in ("RET", "CALL", "BRA") and operands and " " in rest.strip():  # RET.REL.NODEC R44 0x0
        operands = tuple(_operand(part) for part in re.split(r"[,\s]+", rest))
    return Instruction(
        int(address, 16),
        _operand(guard[1:]) if guard else None,
        opcode,
        tuple(modifiers),
        operands,
        f"{name} {rest}".strip(),
    )


_REGISTER = re.compile(r"(-?)(~?)(U?R)(\d+|Z)((?:\.\w+)*)$")
_PREDICATE = re.compile(r"(!?)(U?P)(\d|T)$")
_NUMBER = re.compile(r"-?0x[0-9a-f]+$")
_CONSTANT = re.compile(r"(-?)(~?)c\[0x0\]\[0x([0-9a-f]+)\](\.\w+)*$")
_MEMORY = re.compile(r"(?:desc\[UR\d+\])?\[([^\]]*)\](\.\w+)*$")


def _operand(text: str) -> Operand:
    text = text.strip()
    if found := _REGISTER.match(text):
        number = ZERO if found[4] == "Z" else int(found[4])
        kind: Kind = "UR" if found[3] == "UR" else "R"
        half = found[5].replace(".reuse", "")
        if half:  # a half of a register, as fp16 arithmetic reads it
            return Operand("other", text=text)
        return Operand(kind, number, bool(found[1]), bool(found[2]))
    if found := _PREDICATE.match(text):
        number = TRUE if found[3] == "T" else int(found[3])
        return Operand("UP" if found[2] == "UP" else "P", number, inverted=bool(found[1]))
    if _NUMBER.match(text):
        return Operand("number", int(text, 16) & 0xFFFFFFFF)
    if found := _CONSTANT.match(text):
        return Operand("constant", int(found[3], 16), bool(found[1]), bool(found[2]))
    if found := _MEMORY.match(text):
        return _address(found[1])
    return Operand("other", text=text)


def _address(text: str) -> Operand:
    base, offset, narrow = None, 0, False
    for term in text.replace("+-", "+ -").split("+"):
        term = term.strip().replace(" ", "")
        if _NUMBER.match(term):
            offset += int(term, 16)
        elif (found := re.match(r"R(\d+)(\.64)?$", term)) and base is None:
            base, narrow = int(found[1]), not found[2]
        else:  # a scaled or uniform index, which the emulator does not know
            return Operand("other", text=text)
    return Operand("memory", offset, text=text, base=base, narrow=narrow)
