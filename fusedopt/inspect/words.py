"""Values of the emulator: one number per thread of a program, each either known or not.

What a kernel loads from parameters, gradients and states stays unknown: it must not decide where the kernel goes.
Addresses, counts and flags come from tables whose contents are known.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

MASK = np.uint64(0xFFFFFFFF)


class Word(NamedTuple):
    """A 32-bit register of every thread: uint32 bits, and which threads' are known."""

    bits: np.ndarray
    known: np.ndarray


class Wide(NamedTuple):
    """64 bits of every thread: uint64, and which threads' are known."""

    bits: np.ndarray
    known: np.ndarray


class Flag(NamedTuple):
    """A predicate of every thread: bool, and which threads' are known."""

    bits: np.ndarray
    known: np.ndarray

    def __invert__(self) -> Flag:
        return Flag(~self.bits, self.known)

    def __and__(self, other: Flag) -> Flag:
        no = (self.known & ~self.bits) | (other.known & ~other.bits)
        return Flag(self.bits & other.bits, no | (self.known & other.known))

    def __or__(self, other: Flag) -> Flag:
        return ~(~self & ~other)

    def __xor__(self, other: Flag) -> Flag:
        return Flag(self.bits ^ other.bits, self.known & other.known)


def wide(x: Word) -> np.ndarray:
    """Bits zero-extended to 64."""
    return x.bits.astype(np.uint64)


def signed(x: Word) -> np.ndarray:
    """Bits sign-extended to 64, as uint64: products and sums of these are right modulo 2^64."""
    return x.bits.view(np.int32).astype(np.int64).view(np.uint64)


def low(bits: np.ndarray) -> np.ndarray:
    """Low 32 bits of uint64."""
    return (bits & MASK).astype(np.uint32)


def high(bits: np.ndarray) -> np.ndarray:
    """High 32 bits of uint64."""
    return (bits >> np.uint64(32)).astype(np.uint32)


def shift_left(bits: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Shift of uint64 that gives 0 from 64 on."""
    return np.where(by < 64, bits << np.minimum(by, np.uint64(63)), np.uint64(0))


def shift_right(bits: np.ndarray, by: np.ndarray, arithmetic: bool) -> np.ndarray:
    """Shift of uint64 that gives 0, or copies of the sign, from 64 on."""
    if arithmetic:
        return (bits.view(np.int64) >> np.minimum(by, np.uint64(63)).astype(np.int64)).view(np.uint64)
    return np.where(by < 64, bits >> np.minimum(by, np.uint64(63)), np.uint64(0))


def table(code: int, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Bitwise function of three operands by its truth table: bit ``4a + 2b + c`` of ``code``."""
    result = np.zeros_like(a)
    for index in range(8):
        if code >> index & 1:
            term = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            result = result | term
    return result
