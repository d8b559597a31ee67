"""The report on formats: a table of rules by formats for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .kept import STATE_NAMES, WEIGHT_NAMES, KeptCell
from .kept_verify import KeptReport
from .problem import SEEDS

EXPLANATION = (
    "Formats of state (under fp32 parameters) and of weights (bf16 and fp16): how far what is stored after a step lies "
    "beyond the numbers next to the exact result (to nearest: beyond the nearer one), as a share of the rule's derived "
    "bound on arithmetic; rounded to nearest / stochastically. A cell passes at 1 or less, with every group's scale "
    "that of its largest element and the same bits on all backends but compiled ones. none: the rule has no such state."
)


def print_tables(report: KeptReport, cells: Sequence[KeptCell], seeds: int) -> None:
    """The report on stdout."""
    console = Console(highlight=False)
    for title, names in (("state", STATE_NAMES), ("weights", WEIGHT_NAMES)):
        few = [cell for cell in cells if cell.kept.name in names]
        if few:
            table = _table(report, title, few)
            needed = Measurement.get(console, console.options.update(width=1000), table).maximum
            wide = Console(highlight=False, width=max(needed, console.width if console.is_terminal else 0))
            wide.print(table)
    console.print(EXPLANATION, style="dim")
    for rule, reason in dict.fromkeys((str(cell.configuration), reason) for cell, reason in report.refused.items()):
        console.print(Text(f"refused by {rule}: {reason}"), soft_wrap=True)
    for name, count in report.equal.items():
        different = sum(1 for _, backend in report.differences if backend == name)
        apart = sum(1 for _, backend in report.uncompared if backend == name)
        text = f"{name:12} equal to the first backend in every bit in {count} of {count + different} cells"
        if apart:
            text += f"; {apart} more not compared: compiled divisions of quantised state are approximate"
        console.print(Text(text))
    for line in complaints(report):
        console.print(Text(line, style="bold red"), soft_wrap=True)
    tried = {cell for cell, _ in report.verdicts.keys() | report.failures.keys()}
    bad = sum(1 for cell in cells if report.wrong(cell))
    console.print(
        f"formats {'PASSED' if report.passed else 'FAILED'}: {len(tried) - bad} of {len(tried)} cells within bounds, "
        f"{len(report.failures)} failed, {len(report.differences)} differ in bits; {len(report.refused)} refused, "
        f"{len(report.idle)} with nothing to hold; seeds {', '.join(map(str, SEEDS[:seeds]))}",
        style="bold",
        markup=False,
        soft_wrap=True,
    )


def complaints(report: KeptReport) -> list[str]:
    """One line for everything that is wrong."""
    lines = [f"{cell}, {name}: {'; '.join(v.problems)}" for (cell, name), v in report.verdicts.items() if v.problems]
    lines += [f"{cell}, {name}: {text}" for (cell, name), text in report.failures.items()]
    return lines + [f"{cell}: {text}" for (cell, _), text in report.differences.items()]


def as_json(report: KeptReport, cells: Sequence[KeptCell]) -> dict[str, Any]:
    """The whole report, one entry per cell."""
    return {
        "passed": report.passed,
        "equal_cells": dict(report.equal),
        "cells": [_cell_json(report, cell) for cell in cells],
        "problems": complaints(report),
    }


def _table(report: KeptReport, title: str, cells: Sequence[KeptCell]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column(f"{title} of", no_wrap=True)
    names = list(dict.fromkeys(cell.kept.name for cell in cells))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for config in dict.fromkeys(cell.configuration for cell in cells):
        row = []
        for name in names:
            few = [cell for cell in cells if (cell.configuration, cell.kept.name) == (config, name)]
            texts = [_verdict(report, cell) for cell in few]
            text = texts[0] if len(set(texts)) == 1 and not texts[0][:1].isdigit() else " / ".join(texts)
            row.append(Text(text, style="bold red" if any(map(report.wrong, few)) else "green"))
        table.add_row(str(config), *row)
    return table


def _verdict(report: KeptReport, cell: KeptCell) -> str:
    if report.wrong(cell):
        return "BROKEN"
    if cell in report.refused:
        return "refused"
    if cell in report.idle:
        return "none"
    return f"{max(v.largest for (judged, _), v in report.verdicts.items() if judged == cell):.2f}"


def _cell_json(report: KeptReport, cell: KeptCell) -> dict[str, Any]:
    verdict = _verdict(report, cell)
    return {
        "rule": cell.configuration.rule,
        "configuration": cell.configuration.name,
        "format": cell.kept.name,
        "rounding": "stochastic" if cell.kept.random else "nearest",
        "verdict": verdict if verdict in ("BROKEN", "refused", "none") else "ok",
        "reason": report.refused.get(cell),
        "used": {name: v.used for (judged, name), v in report.verdicts.items() if judged == cell},
    }
