"""Registers, predicates and constants of all threads of one program, as the emulator keeps them."""

from __future__ import annotations

import numpy as np

from fusedopt.inspect.errors import CannotFollow
from fusedopt.inspect.sass import TRUE, ZERO, Operand
from fusedopt.inspect.words import MASK, Flag, Wide, Word, high, low

WARP = 32


class Registers:
    """State of ``threads`` threads. ``run``: threads for which the current instruction takes effect; ``maybe``: threads
    whose guard is unknown, so that what they would write is unknown afterwards.
    """

    def __init__(self, threads: int, constants: dict[int, int], specials: dict[str, np.ndarray]) -> None:
        self.threads = threads
        self.yes, self.no = np.ones(threads, bool), np.zeros(threads, bool)
        self.run, self.maybe = self.yes, self.no
        self.unknown = Word(np.zeros(threads, np.uint32), self.no)
        self._constants, self._specials = constants, specials
        self._words: dict[tuple[str, int], Word] = {}
        self._flags: dict[tuple[str, int], Flag] = {}

    # -------------------------------------------------------------------------------------------------- reading
    def _raw(self, operand: Operand, offset: int = 0) -> Word:
        kind, n = operand.kind, operand.value + offset
        if kind in ("R", "UR"):
            return self.number(0) if operand.value == ZERO else self._words.get((kind, n), self.unknown)
        if kind == "number" and not offset:
            return self.number(n)
        if kind == "constant":
            address = operand.value + 4 * offset
            return self.number(self._constants[address]) if address in self._constants else self.unknown
        if kind == "other":
            return self.unknown
        raise CannotFollow(f"operand {operand} where a number is expected")

    def number(self, value: int) -> Word:
        """The same number in every thread."""
        return Word(np.full(self.threads, value & 0xFFFFFFFF, np.uint32), self.yes)

    def term(self, operand: Operand) -> tuple[np.ndarray, np.ndarray]:
        """An operand of a sum as uint64 and its known threads; ``-x`` is ``~x + 1`` with the carry in bit 32."""
        x = self._raw(operand)
        bits = x.bits.astype(np.uint64)
        if operand.negative or operand.inverted:
            bits = bits ^ MASK
        return (bits + np.uint64(1) if operand.negative else bits), x.known

    def read(self, operand: Operand) -> Word:
        """A 32-bit operand with its sign or inversion applied."""
        bits, known = self.term(operand)
        return Word(low(bits), known)

    def read_wide(self, operand: Operand) -> Wide:
        """A 64-bit operand: a pair of registers, or a constant."""
        x, y = self._raw(operand), self._raw(operand, 1)
        bits = x.bits.astype(np.uint64) | (y.bits.astype(np.uint64) << np.uint64(32))
        if operand.negative:
            bits = ~bits + np.uint64(1)
        return Wide(~bits if operand.inverted else bits, x.known & y.known)

    def flag(self, operand: Operand) -> Flag:
        """A predicate, inverted if the operand says so."""
        if operand.kind not in ("P", "UP"):
            raise CannotFollow(f"operand {operand} where a predicate is expected")
        if operand.value == TRUE:
            flag = Flag(self.yes, self.yes)
        else:
            flag = self._flags.get((operand.kind, operand.value), Flag(self.no, self.no))
        return ~flag if operand.inverted else flag

    def special(self, name: str) -> Word:
        """A special register, unknown unless it was given."""
        return Word(self._specials[name], self.yes) if name in self._specials else self.unknown

    # -------------------------------------------------------------------------------------------------- writing
    def _threads(self, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """(run, maybe) for a destination; uniform registers belong to whole warps."""
        if kind in ("R", "P") or self.run.all():
            return self.run, self.maybe
        return _whole_warps(self.run), _whole_warps(self.maybe)

    def write(self, operand: Operand, x: Word, offset: int = 0) -> None:
        """Write a 32-bit register."""
        if operand.value == ZERO:
            return
        key = (operand.kind, operand.value + offset)
        run, maybe = self._threads(operand.kind)
        if not run.all():
            old = self._words.get(key, self.unknown)
            known = np.where(run, x.known, old.known & ~maybe)
            x = Word(np.where(run, x.bits, old.bits), known)
        self._words[key] = x

    def write_wide(self, operand: Operand, x: Wide) -> None:
        """Write a pair of registers."""
        self.write(operand, Word(low(x.bits), x.known))
        self.write(operand, Word(high(x.bits), x.known), 1)

    def write_flag(self, operand: Operand, x: Flag) -> None:
        """Write a predicate."""
        if operand.value == TRUE:
            return
        key = (operand.kind, operand.value)
        run, maybe = self._threads(operand.kind)
        if not run.all():
            old = self._flags.get(key, Flag(self.no, self.no))
            known = np.where(run, x.known, old.known & ~maybe)
            x = Flag(np.where(run, x.bits, old.bits), known)
        self._flags[key] = x

    def forget(self, operand: Operand, count: int = 1) -> None:
        """What an instruction writes here is not followed: it becomes unknown."""
        if operand.kind in ("P", "UP"):
            self.write_flag(operand, Flag(self.no, self.no))
            return
        for offset in range(count):
            self.write(operand, self.unknown, offset)


def _whole_warps(threads: np.ndarray) -> np.ndarray:
    return threads.reshape(-1, WARP).any(axis=1).repeat(WARP)
