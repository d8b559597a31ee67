"""Runs all formats of all rules on every backend, and gathers what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from . import backends, kept
from .backends import Failure, Worker
from .kept import TIMES, KeptCell
from .kept_check import Verdict, judge
from .measure import first_difference
from .storage import CODED
from .subjects import Outcome


@dataclass
class KeptReport:
    """What was verified; every cell is in one of ``verdicts``, ``refused``, ``idle`` and ``failures``.

    verdicts: (cell, backend) → verdict; backends with the bits of the first one share its. refused: cell → the rule's
    reason. idle: cells whose rule has nothing that the format could hold. failures, differences, equal: as in
    `check.Report`. uncompared: (cell, backend) where bits may differ: compiled divisions of quantised state.
    """

    verdicts: dict[tuple[KeptCell, str], Verdict] = field(default_factory=dict)
    refused: dict[KeptCell, str] = field(default_factory=dict)
    idle: list[KeptCell] = field(default_factory=list)
    failures: dict[tuple[KeptCell, str], str] = field(default_factory=dict)
    differences: dict[tuple[KeptCell, str], str] = field(default_factory=dict)
    equal: dict[str, int] = field(default_factory=dict)
    uncompared: set[tuple[KeptCell, str]] = field(default_factory=set)

    @property
    def passed(self) -> bool:
        """Whether every number is within limits, nothing failed and all bits are equal; false if nothing was tried."""
        right = not any(verdict.problems for verdict in self.verdicts.values())
        return bool(self.verdicts or self.refused or self.idle) and right and not self.failures and not self.differences

    def wrong(self, cell: KeptCell) -> bool:
        """Whether anything is wrong with a cell."""
        bad = self.failures.keys() | self.differences.keys() | {k for k, v in self.verdicts.items() if v.problems}
        return any(key[0] == cell for key in bad)


def verify(
    cells: Sequence[KeptCell],
    names: Sequence[str],
    seeds: Sequence[int],
    advance: Callable[[KeptCell], None] = lambda cell: None,
) -> KeptReport:
    """Verify cells on the named backends over all seeds; ``advance`` is called after each cell."""
    report = KeptReport()
    accepted = [cell for cell in cells if _accepted(report, cell)]
    with ExitStack() as stack:
        pools: dict[str, list[Worker]] = {}
        for name in names:
            if name != "eager" and accepted:
                pools[name] = backends.sharing(name, [cell.key for cell in accepted], seeds, backends.FORMATS)
                for worker in pools[name]:
                    stack.callback(worker.close)
        number = 0
        for cell in cells:
            if cell in accepted:
                _verify_cell(report, cell, names, {k: pool[number % len(pool)] for k, pool in pools.items()}, seeds)
                number += 1
            advance(cell)
    return report


def _accepted(report: KeptReport, cell: KeptCell) -> bool:
    """Whether there is something to run; if not, the report says why."""
    if not cell.held:
        report.idle.append(cell)
        return False
    try:
        reason = cell.refusal()
    except Exception as error:  # whatever breaks is this cell's failure
        report.failures[cell, "eager"] = " ".join(f"{type(error).__name__}: {error}".split())
        return False
    if reason is not None and cell.refused:
        report.refused[cell] = reason
    elif reason is not None:
        report.failures[cell, "eager"] = f"refused, but should be taken: {reason}"
    elif cell.refused:
        report.failures[cell, "eager"] = "taken, but should be refused"
    return reason is None and not cell.refused


def _verify_cell(
    report: KeptReport, cell: KeptCell, names: Sequence[str], workers: Mapping[str, Worker], seeds: Sequence[int]
) -> None:
    first: tuple[str, list[Outcome]] | None = None
    for name in names:
        try:
            if name in workers:
                outcomes = workers[name].outcomes()
            else:
                outcomes = backends.guarded(lambda: [kept.run(cell, seed, "eager") for seed in seeds])
        except Failure as failure:
            report.failures[cell, name] = str(failure)
            continue
        if first is None or not _equal(report, cell, seeds, first, (name, outcomes)):
            report.verdicts[cell, name] = judge(cell, seeds, outcomes, fast=name == "compiled")
        first = first or (name, outcomes)


def _equal(
    report: KeptReport,
    cell: KeptCell,
    seeds: Sequence[int],
    first: tuple[str, list[Outcome]],
    second: tuple[str, list[Outcome]],
) -> bool:
    """Whether two backends agree in every bit; where they must and do not, the report says so."""
    report.equal.setdefault(second[0], 0)
    if second[0] == "compiled" and cell.kept.state in CODED:
        report.uncompared.add((cell, second[0]))
        return False
    for seed, left, right in zip(seeds, first[1], second[1], strict=True):
        difference = first_difference(seed, left, right, TIMES)
        if difference is not None:
            report.differences[cell, second[0]] = f"{first[0]} and {second[0]}: {difference}"
            return False
    report.equal[second[0]] += 1
    return True
