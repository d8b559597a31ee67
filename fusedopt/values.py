"""Blocks of numbers for eager twins: a twin is written down once and then run over every block.

A twin reads like its kernel (``m + q1 * (g - m)``). It is called with `Values`, which hold no numbers: a `Tape` notes
what is done to them. The `Program` made of the tape runs that over block after block, one library call an operation,
in scratch registers that are reused as soon as their value is dead. A result takes the place of the state or parameter
that it replaces as soon as the old value is not needed any more, so nothing is allocated and nothing copied back.

NumPy does the arithmetic on CPU memory and torch elsewhere. NumPy's add, subtract, multiply, divide and square root
round once, as IEEE 754 asks; torch's square root on the CPU is a library's with 1 ulp of error, and its calls cost
two to three times as much.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch

from .blocks import Lane

NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "sqrt": np.sqrt,
    "maximum": lambda a, b, out: np.maximum(a, b, out=out), "minimum": lambda a, b, out: np.minimum(a, b, out=out),
    "abs": np.absolute, "sign": lambda x, out: _sign(x, out), "where": lambda c, a, b, out: _where(c, a, b, out),
    "gt": np.greater, "ge": np.greater_equal, "copy": np.positive,
}  # fmt: skip
TORCH: dict[str, Callable[..., Any]] = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "sqrt": torch.sqrt,
    "maximum": torch.maximum, "minimum": torch.minimum, "abs": torch.abs, "sign": torch.sign,
    "where": lambda c, a, b, out: out.copy_(torch.where(c != 0, a, b)),
    "gt": lambda a, b, out: out.copy_(a > b), "ge": lambda a, b, out: out.copy_(a >= b),
    "copy": lambda x, out: out.copy_(x),
}  # fmt: skip
"""Operations by name; each takes its operands and, last or as ``out``, where the result goes."""


def _sign(x: Any, out: Any) -> None:
    """NumPy's sign of NaN is NaN; torch's and the kernels' is 0."""
    np.subtract(x > 0, x < 0, out=out, dtype=out.dtype)


def _where(c: Any, a: Any, b: Any, out: Any) -> None:
    """Element-wise choice; the result may take the place of any operand."""
    out[...] = np.where(c != 0, a, b)


def scalar_type(dtype: torch.dtype) -> Any:
    """NumPy's type of one number: twins compute with scalars in it as kernels do in theirs."""
    return np.float64 if dtype == torch.float64 else np.float32


class Values:
    """One block of numbers inside a twin: a place on a tape."""

    __slots__ = ("index", "tape")
    __array_ufunc__ = None  # a NumPy scalar on the left leaves the operation to us

    def __init__(self, tape: "Tape", index: int) -> None:
        self.tape, self.index = tape, index

    def __add__(self, other: Any) -> "Values":
        return self.tape.apply("add", self, other)

    def __radd__(self, other: Any) -> "Values":
        return self.tape.apply("add", other, self)

    def __sub__(self, other: Any) -> "Values":
        return self.tape.apply("sub", self, other)

    def __rsub__(self, other: Any) -> "Values":
        return self.tape.apply("sub", other, self)

    def __mul__(self, other: Any) -> "Values":
        return self.tape.apply("mul", self, other)

    def __rmul__(self, other: Any) -> "Values":
        return self.tape.apply("mul", other, self)

    def __truediv__(self, other: Any) -> "Values":
        return self.tape.apply("div", self, other)

    def __rtruediv__(self, other: Any) -> "Values":
        return self.tape.apply("div", other, self)

    def __gt__(self, other: Any) -> "Values":
        return self.tape.apply("gt", self, other)

    def __lt__(self, other: Any) -> "Values":
        return self.tape.apply("gt", other, self)

    def __ge__(self, other: Any) -> "Values":
        return self.tape.apply("ge", self, other)

    def __le__(self, other: Any) -> "Values":
        return self.tape.apply("ge", other, self)

    def sqrt(self) -> "Values":
        """Square root, correctly rounded."""
        return self.tape.apply("sqrt", self)

    def abs(self) -> "Values":
        return self.tape.apply("abs", self)

    def where(self, a: Any, b: Any) -> "Values":
        """a where this comparison (or product of such) holds, else b; values or numbers."""
        return self.tape.apply("where", self, a, b)

    def sign(self) -> "Values":
        """−1, 0 or 1; 0 for NaN."""
        return self.tape.apply("sign", self)


class Tape:
    """What a twin does, in order: inputs, numbers and element-wise operations on them."""

    def __init__(self, inputs: int) -> None:
        self.inputs = inputs
        """Blocks that every run brings along; they are ``Values(tape, 0)`` and so on."""
        self.numbers: list[Any] = []
        self.steps: list[tuple[str, tuple[int, ...]]] = []

    def apply(self, name: str, *operands: Any) -> Values:
        """The result of an operation on values and numbers. Values are ≥ 0, numbers stand as −1, −2, …"""
        places = tuple(o.index if isinstance(o, Values) else self._number(o) for o in operands)
        self.steps.append((name, places))
        return Values(self, self.inputs + len(self.steps) - 1)

    def _number(self, x: Any) -> int:
        self.numbers.append(x)
        return -len(self.numbers)

    def program(self, results: Sequence[tuple[Values, Values]], dtype: torch.dtype, device: torch.device) -> "Program":
        """Make it runnable; ``results`` are pairs (value, input whose place it takes)."""
        pairs = []
        for value, target in results:
            if value.index != target.index:
                pairs.append((self.apply("copy", value) if value.index < self.inputs else value, target))
        layout = _layout(self.inputs, tuple(self.steps), tuple((v.index, t.index) for v, t in pairs))
        return Program(layout, self.numbers, dtype, device)


class Program:
    """A twin ready to run over blocks of a dtype on a device."""

    def __init__(self, layout: Any, numbers: Sequence[Any], dtype: torch.dtype, device: torch.device) -> None:
        self.registers, code = layout
        self.dtype = dtype
        self._on_cpu = device.type == "cpu"
        library = NUMPY if self._on_cpu else TORCH
        self._code = [(library[name], pick) for name, pick in code]
        make: Any = partial(np.array, dtype=scalar_type(dtype)) if self._on_cpu else partial(torch.tensor, dtype=dtype)
        self._constants = [make(float(x)) for x in reversed(numbers)]

    def run(self, inputs: Sequence[Any], lane: Lane) -> None:
        """Run over one block: inputs as the tape has them, results in their places."""
        n = len(inputs[0])
        frame = [*inputs, *(lane.take(self.dtype, n) for _ in range(self.registers)), *self._constants]
        if self._on_cpu:
            for fn, pick in self._code:
                fn(*pick(frame))
        else:
            for fn, pick in self._code:
                *operands, out = pick(frame)
                fn(*operands, out=out)


_layouts: dict[Any, Any] = {}


def _layout(inputs: int, steps: tuple[Any, ...], pairs: tuple[tuple[int, int], ...]) -> Any:
    """(registers, [(operation, places of operands and result)]) of a tape; found once for each shape of tape.

    A frame is inputs, registers, numbers in reverse; so a number keeps its negative index.
    """
    key = (inputs, steps, pairs)
    if key not in _layouts:
        _layouts[key] = _allocate(inputs, steps, pairs)
    return _layouts[key]


def _allocate(inputs: int, steps: tuple[Any, ...], pairs: tuple[tuple[int, int], ...]) -> Any:
    wanted = _needed(inputs, steps, {value for value, _ in pairs})
    last = {place: i for i in wanted for place in steps[i][1]}
    home: dict[int, int] = {}
    left: list[tuple[int, int]] = []
    for value, target in pairs:
        if value not in home and last.get(target, -1) <= value - inputs:
            home[value] = target
        else:
            left.append((value, target))
    forever = set(home) | {value for value, _ in left} | set(range(inputs))
    code: list[tuple[str, Any]] = []
    free: list[int] = []
    registers = 0
    for i in wanted:
        name, places = steps[i]
        operands = [home.get(place, place) for place in places]
        free.extend({home[p] for p in places if p >= inputs and p not in forever and last[p] == i})
        value = inputs + i
        if value not in home:
            if not free:
                free.append(inputs + registers)
                registers += 1
            home[value] = free.pop()
        code.append((name, itemgetter(*operands, home[value])))
    code.extend(("copy", itemgetter(home[value], target)) for value, target in left)
    return registers, code


def _needed(inputs: int, steps: tuple[Any, ...], values: set[int]) -> list[int]:
    """Steps that the values depend on, in order."""
    needed = set(values)
    for i in reversed(range(len(steps))):
        if inputs + i in needed:
            needed.update(steps[i][1])
    return [i for i in range(len(steps)) if inputs + i in needed]


def div_eager(a: Any, b: Any) -> Any:
    """a / b, correctly rounded; values or numbers."""
    return a / b


def sqrt_eager(x: Any) -> Any:
    """Square root, correctly rounded; values or numbers."""
    return x.tape.apply("sqrt", x) if isinstance(x, Values) else np.sqrt(x)


def maximum_eager(a: Any, b: Any) -> Values:
    """Larger of a and b; NaN if either is NaN. One of them may be a number."""
    return _tape(a, b).apply("maximum", a, b)


def minimum_eager(a: Any, b: Any) -> Values:
    """Smaller of a and b; NaN if either is NaN. One of them may be a number."""
    return _tape(a, b).apply("minimum", a, b)


def where_eager(condition: Values, a: Any, b: Any) -> Values:
    """a where the condition (a comparison of values, or a product of such) holds, else b; values or numbers."""
    return condition.where(a, b)


def _tape(*operands: Any) -> Tape:
    return next(o.tape for o in operands if isinstance(o, Values))


def sqrt_scalar(x: float) -> float:
    """Square root of a float64 scalar, correctly rounded; NaN below zero as on the device."""
    return math.sqrt(x) if x >= 0.0 else math.nan
