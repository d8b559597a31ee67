"""Runs all cells on torch.optim and on every backend, and judges each error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from . import backends
from .backends import Cell, Failure, Worker
from .formats import DTYPES
from .measure import UNORDERED, Error, first_difference, measure
from .oracle import Configuration
from .oracles import ORACLES
from .problem import Problem, build
from .subjects import Outcome, rule_of, run, takes_norms, torch_forms, torch_subject

RMS_FACTOR = 1.25
"""How much larger than torch.optim's our rms may be."""


@dataclass(frozen=True)
class Row:
    """One value (``"param"`` or a slot) of one cell on one backend.

    torch: errors of torch.optim's forms on the same data. bound: the derived bound on the maximum. All in ulps of
    the largest addend.
    """

    configuration: Configuration
    dtype: str
    backend: str
    slot: str
    error: Error
    torch: Mapping[str, Error]
    bound: float

    @property
    def yardsticks(self) -> list[Error]:
        """torch's forms that get at least the leading bit right everywhere.

        Others are wrong rather than inexact: torch 2.13's fused SGD on the CPU skips bf16 and fp16 elements
        (pytorch/pytorch#191763), and would let anything pass.
        """
        return [error for error in self.torch.values() if error.largest < _no_bit_right(self.dtype)]

    @property
    def limit(self) -> float:
        """Largest maximum that passes."""
        return max([self.bound, *(error.largest for error in self.yardsticks)])

    @property
    def rms_limit(self) -> float | None:
        """Largest rms that passes; None where torch.optim has nothing to compare with."""
        return RMS_FACTOR * max(error.rms for error in self.yardsticks) if self.yardsticks else None

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words; empty when the row passes."""
        found = []
        if self.error.broken:
            found.append(f"{self.error.broken} elements are infinite or NaN on one side only")
        if self.error.largest > self.limit:
            found.append(f"maximum {self.error.largest:.3g} > {self.limit:.3g}")
        if self.rms_limit is not None and self.error.rms > self.rms_limit:
            found.append(f"rms {self.error.rms:.3g} > {self.rms_limit:.3g}")
        return found


@dataclass
class Report:
    """What was verified.

    rows: see `Row`. failures: cells that raised an error, (cell, backend) → text. differences: cells on which a
    backend differs from the first one in some bit, likewise. equal: for each backend but the first, how many cells
    were compared with the first one bit for bit and found equal. uncompared: cells and backends that need not agree
    in every bit: in float64 each backend sums norms in an order of its own.
    """

    rows: list[Row] = field(default_factory=list)
    failures: dict[tuple[Cell, str], str] = field(default_factory=dict)
    differences: dict[tuple[Cell, str], str] = field(default_factory=dict)
    equal: dict[str, int] = field(default_factory=dict)
    uncompared: set[tuple[Cell, str]] = field(default_factory=set)

    @property
    def passed(self) -> bool:
        """Whether every row is inside its limits, nothing failed and all bits are equal; false if nothing ran."""
        inside = all(not row.problems for row in self.rows)
        return bool(self.rows) and inside and not self.failures and not self.differences


def verify(
    cells: Sequence[Cell],
    names: Sequence[str],
    seeds: Sequence[int],
    advance: Callable[[Cell], None] = lambda cell: None,
) -> Report:
    """Verify cells on the named backends over all seeds; ``advance`` is called after each cell."""
    report = Report()
    with ExitStack() as stack:
        pools = {name: backends.workers(name, cells, seeds) for name in names if name != "eager"}
        for pool in pools.values():
            for worker in pool:
                stack.callback(worker.close)
        for number, cell in enumerate(cells):
            turn = {name: pool[number % len(pool)] for name, pool in pools.items()}
            _verify_cell(report, cell, names, turn, seeds)
            advance(cell)
    return report


def _verify_cell(
    report: Report, cell: Cell, names: Sequence[str], workers: Mapping[str, Worker], seeds: Sequence[int]
) -> None:
    config, dtype = cell
    problems = [build(config, dtype, seed) for seed in seeds]
    torch_errors = _torch_errors(problems)
    first: tuple[str, list[Outcome]] | None = None
    for name in names:
        try:
            outcomes = workers[name].outcomes() if name in workers else backends.eager(problems)
        except Failure as failure:
            report.failures[cell, name] = str(failure)
            continue
        for slot, error in _errors(problems, outcomes).items():
            yardsticks = {form: errors[slot] for form, errors in torch_errors.items()}
            limit = ORACLES[config.rule].bound(config, slot, DTYPES[dtype])
            report.rows.append(Row(config, dtype, name, slot, error, yardsticks, limit))
        if first is None:
            first = name, outcomes
        else:
            _compare(report, cell, problems, first, (name, outcomes))


def _compare(
    report: Report,
    cell: Cell,
    problems: Sequence[Problem],
    first: tuple[str, list[Outcome]],
    second: tuple[str, list[Outcome]],
) -> None:
    report.equal.setdefault(second[0], 0)
    if cell[1] in UNORDERED and takes_norms(rule_of(cell[0].rule)):
        report.uncompared.add((cell, second[0]))
        return
    for problem, left, right in zip(problems, first[1], second[1], strict=True):
        difference = first_difference(problem.seed, left, right)
        if difference is not None:
            report.differences[cell, second[0]] = f"{first[0]} and {second[0]}: {difference}"
            return
    report.equal[second[0]] += 1


def _torch_errors(problems: Sequence[Problem]) -> dict[str, dict[str, Error]]:
    """Errors of those of torch.optim's forms that exist for this rule and dtype."""
    config, dtype = problems[0].configuration, problems[0].dtype
    found = {}
    for form in torch_forms(config.rule):
        if form == "fused" and dtype.parts > 1:
            continue  # torch's fused forms take no complex parameters
        make = torch_subject(config, form)
        found[form] = _errors(problems, [run(make, problem) for problem in problems])
    return found


def _errors(problems: Sequence[Problem], outcomes: Sequence[Outcome]) -> dict[str, Error]:
    errors: dict[str, Error] = {}
    for problem, outcome in zip(problems, outcomes, strict=True):
        measure(problem, outcome, errors)
    return errors


def _no_bit_right(dtype: str) -> float:
    """Error, in ulps, as large as the largest addend itself."""
    return 2.0 ** (DTYPES[dtype].store.digits - 1)
