"""A rule of the user's own: its kernels against its eager reference, bit for bit.

There is no oracle and no torch.optim class for it, so nothing says that the reference is right.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Container, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fusedopt.rule import Rule

from . import backends, kept
from .backends import Failure
from .formats import DTYPES, SCALAR, DType
from .measure import UNORDERED, Difference, first_difference
from .problem import MANY_CHUNKS, SHAPES, TIMES, data
from .storage import CODED
from .subjects import Outcome, takes_norms, to_numpy, to_torch

PLAIN = "plain"
DECAY = "weight decay"


class NotFound(Exception):
    """No rule where the user said; the text says why, in one line."""


def load(target: str) -> Rule:
    """The rule that ``FILE.py:NAME`` or ``package.module:NAME`` names.

    Raises:
        NotFound: the file or module cannot be imported, or holds no rule of that name.
    """
    home, _, name = target.rpartition(":")
    try:
        module = _from_file(Path(home)) if home.endswith(".py") else _from_module(home)
        rule = getattr(module, name)
    except Exception as error:  # whatever the user's code raises while it is imported
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise NotFound(f"cannot load the rule {target!r}: {text}") from error
    if not isinstance(rule, Rule):
        raise NotFound(f"{target!r} is {type(rule).__name__}, not a rule; fusedopt.make_rule makes one")
    return rule


def _from_file(path: Path) -> Any:
    """The module in a file, which may import its neighbours as when Python runs it."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    name = f"fusedopt_verify_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    sys.path.insert(0, str(path.resolve().parent))
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _from_module(name: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as with python -m
    return importlib.import_module(name)


@dataclass(frozen=True)
class Cell:
    """A rule with options, in a dtype. label: which options, the name of the one switch that is turned over, or the
    title of a way to keep numbers (``kept.py``).
    """

    rule: Rule
    label: str
    dtype: str

    @property
    def kept(self) -> kept.Kept | None:
        """How its numbers are kept, if not plainly."""
        return None if self.label in self.rule.defaults else kept.KEPT.get(self.label)

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of `fusedopt.Optimizer`."""
        if self.kept is not None:
            return self.kept.options(self.rule)
        if self.label == PLAIN:
            return {}
        if self.label == DECAY:
            return dict(weight_decay=0.01, maximize=True)
        return {self.label: not self.rule.defaults[self.label]}

    def compared(self, backend: str) -> bool:
        """Whether a backend must agree with the reference in every bit."""
        if self.kept is not None and self.kept.state in CODED:
            return backend != "compiled"  # division is approximate
        return not (self.dtype in UNORDERED and takes_norms(self.rule))

    def run(self, seed: int, backend: str, device: str = "cpu") -> Outcome:
        """All steps on a backend, each from where the one before ended but for the step count, which jumps."""
        from fusedopt import Optimizer

        dtype = DTYPES[self.dtype]
        shapes = (*SHAPES, MANY_CHUNKS) if self.kept is None else kept.SHAPES
        params, gradients = data(self.rule.name, dtype, seed, shapes)
        tensors = [to_torch(x, dtype, device).requires_grad_() for x in params]
        outcome: Outcome = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice on low-precision state is for training
            optimizer = Optimizer(tensors, self.rule, backend=backend, **self.options)
            slots = {slot.name: dtype for slot in self.rule.slots(optimizer.param_groups[0])}
            slots |= {slot.name: DTYPES["float64"] if slot.wide else SCALAR for slot in self.rule.scalar_slots}
            for t, grads in zip(TIMES, gradients, strict=True):
                self._step(optimizer, tensors, t, [to_torch(g, dtype, device) for g in grads])
                if self.kept is None:
                    outcome.append(_values(optimizer, tensors, dtype, slots))
                else:
                    outcome.append(kept.stored(optimizer, tensors, kept.keys(self.rule)))
        return outcome

    def _step(self, optimizer: Any, tensors: list[torch.Tensor], t: int, grads: list[torch.Tensor]) -> None:
        for p, grad in zip(tensors, grads, strict=True):
            p.grad = grad
            if t > 1 and "step" in optimizer.state[p]:
                optimizer.state[p]["step"].fill_(t - 1)
        optimizer.step()


def cells(rule: Rule, dtypes: Sequence[str], formats: Container[str] = ()) -> list[Cell]:
    """What a rule is tried with: defaults, weight decay with maximize, each of its switches turned over; and formats.

    formats: names of those, of which the rule is tried with what it can hold.
    """
    switches = [key for key in rule.structure if isinstance(rule.defaults.get(key), bool)]
    plain = [Cell(rule, label, dtype) for label in (PLAIN, DECAY, *switches) for dtype in dtypes]
    able = [
        way
        for way in kept.KEPT.values()
        if way.name in formats and way.held_by(rule, rule.defaults) and not way.refused_by(rule, rule.defaults)
    ]
    return plain + [Cell(rule, str(way), dtype) for way in able for dtype in way.dtypes]


def _values(optimizer: Any, tensors: list[torch.Tensor], dtype: DType, slots: dict[str, DType]) -> Any:
    values = {"param": [to_numpy(p, dtype) for p in tensors]}
    for name, stored in slots.items():
        values[name] = [to_numpy(optimizer.state[p][name], stored) for p in tensors]
    return values


@dataclass
class Report:
    """What was compared.

    equal, uncompared: (cell's label, dtype, backend) of those found equal and of those where bits need not be.
    differences: likewise, with the first difference. failures: with the error's text.
    """

    equal: list[tuple[str, str, str]] = field(default_factory=list)
    uncompared: list[tuple[str, str, str]] = field(default_factory=list)
    differences: dict[tuple[str, str, str], Difference] = field(default_factory=dict)
    failures: dict[tuple[str, str, str], str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether something was compared and nothing differs or failed."""
        return bool(self.equal) and not self.differences and not self.failures


def verify(
    target: str,
    cells: Sequence[Cell],
    names: Sequence[str],
    seeds: Sequence[int],
    advance: Callable[[Cell], None] = lambda cell: None,
) -> Report:
    """Compare the kernel backends among ``names`` with the reference; ``advance`` is called after each cell.

    target: where the processes of the kernel backends find the rule again.
    """
    report, named = Report(), [(cell.label, cell.dtype) for cell in cells]
    with ExitStack() as stack:
        pools = {name: backends.sharing(name, named, seeds, target) for name in names if name != "eager"}
        for pool in pools.values():
            for worker in pool:
                stack.callback(worker.close)
        for number, cell in enumerate(cells):
            turn = {name: pool[number % len(pool)] for name, pool in pools.items()}
            _verify_cell(report, cell, turn, seeds)
            advance(cell)
    return report


def _verify_cell(report: Report, cell: Cell, workers: dict[str, backends.Worker], seeds: Sequence[int]) -> None:
    expected: list[Outcome] | None = None
    try:
        expected = backends.guarded(lambda: [cell.run(seed, "eager") for seed in seeds])
    except Failure as failure:
        report.failures[cell.label, cell.dtype, "eager"] = str(failure)
    for name, worker in workers.items():
        key = cell.label, cell.dtype, name
        try:
            outcomes = worker.outcomes()
        except Failure as failure:
            report.failures[key] = str(failure)
            continue
        if expected is None:
            continue
        if not cell.compared(name):
            report.uncompared.append(key)
            continue
        found = [first_difference(*both) for both in zip(seeds, expected, outcomes, strict=True)]
        difference = next((found for found in found if found is not None), None)
        if difference is None:
            report.equal.append(key)
        else:
            report.differences[key] = difference
