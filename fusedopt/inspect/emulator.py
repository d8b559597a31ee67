"""Walks a kernel's machine code as one program of the GPU would, and counts what it executes and accesses.

All threads of the program run in lockstep; those that part meet again because the smallest address always goes next.
Loops, unrolling, masks and vector widths need no special care: they are executed. Only branches on data are decided
by a rule, since data is unknown: the side that calls a subroutine is the slow path of a division or square root for
subnormal, infinite or NaN operands, and is not taken. Any other branch on data is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fusedopt.inspect.alu import execute
from fusedopt.inspect.errors import CannotFollow
from fusedopt.inspect.memory import Memory, Region, Traffic
from fusedopt.inspect.registers import WARP, Registers
from fusedopt.inspect.sass import ZERO, Code, Instruction, Operand
from fusedopt.inspect.words import Flag, Word

LIMIT = 1_000_000
"""Steps after which a program counts as caught in a loop."""

STACK_POINTERS, STACK_TOP = (0x28, 0x37C), 0x10000
"""Where kernels find their stack pointer in constant bank 0 (before Blackwell, and there), and a value for it."""

GRID = (0xC, 0x370)
"""Where they find the number of programs."""


@dataclass
class Walk:
    """One program's execution. instructions: issued, summed over warps; spills, shared, barriers: those of them that
    touch the stack, touch shared memory, or wait for the other warps.
    """

    traffic: Traffic
    instructions: int = 0
    spills: int = 0
    shared: int = 0
    barriers: int = 0


def walk(
    code: Code, arguments: Sequence[int], regions: Sequence[Region], program: int, warps: int, grid: int = 1
) -> Walk:
    """Execute program ``program`` of ``grid`` of a kernel called with these 64-bit arguments.

    Raises:
        CannotFollow: an unknown instruction, or a branch or address that depends on data.
        BadAccess: an access outside the regions or a misaligned one.
    """
    return Program(code, arguments, Memory(regions), program, warps, grid).run()


class Program:
    """What `walk` executes, one instruction after the other in `step`."""

    def __init__(
        self, code: Code, arguments: Sequence[int], memory: Memory, program: int, warps: int, grid: int
    ) -> None:
        self.code, self.memory, threads = code, memory, warps * WARP
        lanes = np.arange(threads, dtype=np.uint32)
        specials = {"SR_TID.X": lanes, "SR_LANEID": lanes % WARP, "SR_CTAID.X": np.full(threads, program, np.uint32)}
        for name in ("SR_TID.Y", "SR_TID.Z", "SR_CTAID.Y", "SR_CTAID.Z", "SR_CgaCtaId"):
            specials[name] = np.zeros(threads, np.uint32)
        constants = {0: threads, 4: 1, 8: 1, **dict.fromkeys(STACK_POINTERS, STACK_TOP), **dict.fromkeys(GRID, grid)}
        for i, value in enumerate([*arguments, 0, 0, 0, 0]):  # Triton appends pointers to scratch memory
            constants[code.parameters + 8 * i] = value & 0xFFFFFFFF
            constants[code.parameters + 8 * i + 4] = value >> 32
        self.registers = Registers(threads, constants, specials)
        self.stack: dict[int, Word] = {}
        self.done = len(code.instructions)
        self.warps = warps  # that execute the instruction at hand
        self.at = np.zeros(threads, np.int64)
        self.walked = Walk(memory.traffic)

    def run(self) -> Walk:
        for _ in range(LIMIT):
            index = int(self.at.min())
            if index == self.done:
                return self.walked
            try:
                self.step(index)
            except CannotFollow as error:
                raise CannotFollow(f"at {self.code.instructions[index].address:#06x}: {error}") from None
        raise CannotFollow(f"no end after {LIMIT} instructions")

    def step(self, index: int) -> None:
        ins = self.code.instructions[index]
        active = self.at == index
        self.warps = int(active.reshape(-1, WARP).any(axis=1).sum()) if not active.all() else len(active) // WARP
        self.walked.instructions += self.warps
        guard = Flag(self.registers.yes, self.registers.yes) if ins.guard is None else self.registers.flag(ins.guard)
        if ins.opcode in ("BRA", "EXIT") or (ins.opcode == "CALL" and ins.guard):  # such a call is a far branch
            self._branch(index, ins, active, guard)
            return
        self.at[active] = index + 1
        self.registers.run, self.registers.maybe = active & guard.bits & guard.known, active & ~guard.known
        if ins.opcode in ("CALL", "RET", "BRX", "JMP", "BPT"):
            raise CannotFollow(f"{ins.text!r} on the ordinary path")
        if ins.opcode == "BAR":
            self.walked.barriers += self.warps
        elif ins.opcode in ("LDG", "STG"):
            self._access(ins)
        elif ins.opcode in ("LDL", "STL", "LDS", "STS", "LDSM", "STSM"):
            self._on_chip(ins)
        else:
            execute(self.registers, ins)

    # ------------------------------------------------------------------------------------------------- branches
    def _branch(self, index: int, ins: Instruction, active: np.ndarray, guard: Flag) -> None:
        condition = guard
        for operand in ins.operands:
            if operand.kind in ("P", "UP"):
                condition = condition & self.registers.flag(operand)
        target = self.done if ins.opcode == "EXIT" else self.code.index[ins.target]
        if condition.known[active].all():
            taken = active & condition.bits
        elif ins.opcode == "CALL":
            taken = self.registers.no
        elif ins.opcode == "BRA":
            taken = active if self._avoids_slow_path(index, target) else self.registers.no
        else:
            raise CannotFollow(f"{ins.text!r} depends on data")
        self.at[active] = index + 1
        self.at[taken] = target

    def _avoids_slow_path(self, index: int, target: int) -> bool:
        """Whether taking a branch on data leads past a subroutine call; False if the call is where it leads to."""
        falls = self._calls(index + 1, target)
        leads = self._calls(target, self.done)
        if falls == leads:
            raise CannotFollow(f"{self.code.instructions[index].text!r} depends on data")
        return falls

    def _calls(self, start: int, end: int) -> bool:
        """Whether straight code from ``start`` calls a subroutine before ``end`` or before paths part or join."""
        for ins in self.code.instructions[start:end]:
            if ins.opcode == "CALL" and not ins.guard:
                return True
            if ins.opcode in ("BRA", "EXIT", "BSYNC", "RET"):
                return False
        return False

    # ------------------------------------------------------------------------------------------------ accesses
    def _access(self, ins: Instruction) -> None:
        registers, what = self.registers, "load" if ins.opcode == "LDG" else "store"
        place = next(o for o in ins.operands if o.kind in ("memory", "other"))
        if place.kind != "memory" or place.narrow:
            raise CannotFollow(f"unknown form of address in {ins.text!r}")
        if registers.maybe.any():
            raise CannotFollow(f"whether {ins.text!r} happens depends on data")
        base = registers.read_wide(Operand("R", place.base if place.base is not None else ZERO))
        if not base.known[registers.run].all():
            raise CannotFollow(f"the address of {ins.text!r} depends on data")
        width = _width(ins)
        addresses = base.bits + np.uint64(place.value & 0xFFFFFFFFFFFFFFFF)
        loaded = self.memory.access(what, addresses, registers.run, width)
        if what == "store":
            return
        destination = next(o for o in ins.operands if o.kind == "R")
        if loaded is None or (width < 4 and any(m in ("S8", "S16") for m in ins.modifiers)):
            registers.forget(destination, max(1, width // 4))
            return
        padded = np.pad(loaded, ((0, 0), (0, -width % 4))).view(np.uint32)
        for i in range(padded.shape[1]):
            registers.write(destination, Word(padded[:, i].copy(), registers.yes), i)

    def _on_chip(self, ins: Instruction) -> None:
        """Stack and shared memory: both are counted, and what is spilled to the stack is found there again."""
        if ins.opcode in ("LDL", "STL"):
            self.walked.spills += self.warps
        else:
            self.walked.shared += self.warps
        register = next((o for o in ins.operands if o.kind == "R"), Operand("R", ZERO))
        words = int(ins.modifiers[-1]) if ins.opcode in ("LDSM", "STSM") else max(1, _width(ins) // 4)
        slot = self._stack_slot(ins) if ins.opcode in ("LDL", "STL") else None
        if ins.opcode == "STL":
            if slot is None:
                raise CannotFollow(f"unknown form of address in {ins.text!r}")
            for i in range(words):
                self._spill(slot + 4 * i, Operand("R", register.value + i if register.value != ZERO else ZERO))
        elif ins.opcode.startswith("LD"):
            for i in range(words):
                kept = self.stack.get(slot + 4 * i) if slot is not None else None
                self.registers.write(register, kept or self.registers.unknown, i)

    def _stack_slot(self, ins: Instruction) -> int | None:
        """Address of a 4-byte-aligned access to the stack, the same in all threads; None if it is another kind."""
        place = next(o for o in ins.operands if o.kind in ("memory", "other"))
        if place.kind != "memory" or place.base is None or _width(ins) < 4:
            return None
        base, run = self.registers.read(Operand("R", place.base)), self.registers.run
        values = np.unique(base.bits[run])
        return int(values[0]) + place.value if base.known[run].all() and len(values) == 1 else None

    def _spill(self, slot: int, source: Operand) -> None:
        registers, new = self.registers, self.registers.read(source)
        old = self.stack.get(slot, registers.unknown)
        known = np.where(registers.run, new.known, old.known & ~registers.maybe)
        self.stack[slot] = Word(np.where(registers.run, new.bits, old.bits), known)


def _width(ins: Instruction) -> int:
    """Bytes that one thread accesses."""
    for modifier in ins.modifiers:
        if modifier in ("U8", "S8", "8"):
            return 1
        if modifier in ("U16", "S16", "16"):
            return 2
        if modifier in ("64", "128", "256"):
            return int(modifier) // 8
    return 4
