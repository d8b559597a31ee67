"""The report of `fusedopt verify`: a table for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from .backends import NAMES, Availability, Cell
from .check import RMS_FACTOR, Report, Row
from .formats import DTYPES
from .measure import Error
from .oracles import ORACLES
from .problem import SEEDS

EXPLANATION = (
    "Errors of one step against an oracle in higher precision, in ulps of the largest addend (bf16 and fp16: of the "
    "reference rounded once). A row passes when its maximum is at most the larger of torch's maximum and the derived "
    f"bound, and its rms at most {RMS_FACTOR} × torch's; torch's are the largest over its for-loop, foreach and fused "
    "forms on the same data."
)


def coverage(names: Sequence[str], known: Mapping[str, Availability], dropped: Mapping[str, str]) -> dict[str, str]:
    """For every backend and for dtypes left out: what ran as what, and what did not run and why."""
    lines = {}
    for name in NAMES:
        if name in names:
            lines[name] = f"ran: {known[name].how}"
        else:
            lines[name] = known[name].how if not known[name].runs else "not run: not asked for"
    return {**lines, **dropped}


def left_out(rules: Sequence[str], dtypes: Sequence[str], further: Container[str]) -> dict[str, str]:
    """What `problem.cells` leaves out of rules and dtypes, in words."""
    lines = {}
    sampled = [name for name in dtypes if name not in further]
    if sampled and any(len(ORACLES[rule].configurations) > 1 for rule in rules):
        lines["sampled"] = f"{', '.join(sampled)}: the first configuration of each rule; --dtype NAME runs all in NAME"
    real = [rule for rule in rules if not ORACLES[rule].complex]
    if real and any(DTYPES[name].parts > 1 for name in dtypes):
        lines["real only"] = f"{', '.join(real)}: no complex parameters"
    return lines


def print_table(report: Report, ran: Mapping[str, str], seeds: int) -> None:
    """The report on stdout."""
    console, table = Console(highlight=False), _table(report)
    needed = Measurement.get(console, console.options.update(width=1000), table).maximum
    if console.width < needed or not console.is_terminal:
        console = Console(highlight=False, width=needed)  # rather a wrapped line than a number cut off
    if report.rows:
        console.print(table)
    console.print(EXPLANATION, style="dim")
    for form in sorted({form for row in report.rows for form in wrong_forms(row)}):
        console.print(f"* without torch's {form} form, which is not inexact here but wrong", style="dim")
    print_coverage(ran)
    for name, count in report.equal.items():
        different = sum(1 for _, backend in report.differences if backend == name)
        text = f"equal to the first backend in every bit in {count} of {count + different} cells"
        apart = sum(1 for _, backend in report.uncompared if backend == name)
        if apart:
            text += f"; {apart} more not compared: norms in float64 are summed in any order"
        console.print(Text(f"{name:12} {text}"))
    for line in complaints(report):
        console.print(Text(line, style="bold red"), soft_wrap=True)
    total, bad = len(report.rows), sum(1 for row in report.rows if row.problems)
    console.print(
        f"{'PASSED' if report.passed else 'FAILED'}: {total - bad} of {total} rows within bounds, "
        f"{len(report.failures)} cells failed, {len(report.differences)} differ in bits; "
        f"seeds {', '.join(map(str, SEEDS[:seeds]))}",
        style="bold",
        markup=False,
    )


def print_coverage(ran: Mapping[str, str]) -> None:
    """What ran as what, and what did not."""
    console = Console(highlight=False)
    for name, text in ran.items():
        console.print(Text(f"{name:12} {text}"), soft_wrap=True)


def complaints(report: Report) -> list[str]:
    """One line for everything that is wrong."""
    lines = [
        f"{row.configuration} {row.dtype} {row.backend}, {row.slot}: {'; '.join(row.problems)}"
        for row in report.rows
        if row.problems
    ]
    for (cell, name), text in report.failures.items():
        lines.append(f"{cell[0]} {cell[1]} {name}: {text}")
    for (cell, _), text in report.differences.items():
        lines.append(f"{cell[0]} {cell[1]}: {text}")
    return lines


def wrong_forms(row: Row) -> list[str]:
    """torch's forms that are no yardstick for a row (see `Row.yardsticks`)."""
    return [form for form, error in row.torch.items() if error not in row.yardsticks]


def as_json(report: Report, ran: Mapping[str, str], seeds: int) -> dict[str, Any]:
    """The whole report, with the errors of each of torch's forms."""
    return {
        "passed": report.passed,
        "seeds": list(SEEDS[:seeds]),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
        "coverage": dict(ran),
        "equal_cells": dict(report.equal),
        "uncompared": [_cell_json(cell, name, "norms in float64") for cell, name in report.uncompared],
        "rows": [_row_json(row) for row in report.rows],
        "failures": [_cell_json(cell, name, text) for (cell, name), text in report.failures.items()],
        "differences": [_cell_json(cell, name, text) for (cell, name), text in report.differences.items()],
    }


def _table(report: Report) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("rule", "dtype", "value", "backend"):
        table.add_column(column, no_wrap=True)
    for column in ("max", "rms", "torch max", "torch rms", "bound", "max ≤", "rms ≤", ""):
        table.add_column(column, justify="right", no_wrap=True)
    before: tuple[Any, ...] = ()
    for key, group in groupby(report.rows, lambda row: (row.configuration, row.dtype)):
        rows = list(group)
        for slot in dict.fromkeys(row.slot for row in rows):
            for label, row in _merged(report, key, [row for row in rows if row.slot == slot]):
                rule = "" if key[:1] == before[:1] else str(key[0])
                dtype = "" if key == before else key[1]
                before = key
                table.add_row(rule, dtype, slot, label, *_numbers(row))
    return table


def _merged(report: Report, cell: Cell, rows: list[Row]) -> list[tuple[str, Row]]:
    """Backends whose bits equal the first one's share its line."""
    lines: list[tuple[list[str], Row]] = []
    for row in rows:
        if lines and (cell, row.backend) not in report.differences.keys() | report.uncompared:
            lines[0][0].append(row.backend)
        else:
            lines.append(([row.backend], row))
    return [(" = ".join(names), row) for names, row in lines]


def _numbers(row: Row) -> tuple[str | Text, ...]:
    used = row.yardsticks
    largest = _short(max(error.largest for error in used)) if used else "–"
    rms = _short(max(error.rms for error in used), 3) if used else "–"
    if len(used) < len(row.torch):
        largest += "*"
    rms_limit = "–" if row.rms_limit is None else _short(row.rms_limit, 3)
    verdict = Text("ok", style="green") if not row.problems else Text("BROKEN", style="bold red")
    own = (_short(row.error.largest), _short(row.error.rms, 3))
    return (*own, largest, rms, _short(row.bound), _short(row.limit), rms_limit, verdict)


def _short(x: float, digits: int = 2) -> str:
    return f"{x:.{digits}f}" if x < 1e4 else f"{x:.1e}"


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "rule": row.configuration.rule,
        "configuration": row.configuration.name,
        "options": dict(row.configuration.options),
        "dtype": row.dtype,
        "backend": row.backend,
        "value": row.slot,
        **_error_json(row.error),
        "torch": {
            form: {**_error_json(error), "yardstick": error in row.yardsticks} for form, error in row.torch.items()
        },
        "derived_bound": row.bound,
        "limit_max": row.limit,
        "limit_rms": row.rms_limit,
        "passed": not row.problems,
    }


def _error_json(error: Error) -> dict[str, float | int]:
    return {"max": error.largest, "rms": error.rms, "elements": error.count, "broken": error.broken}


def _cell_json(cell: Cell, name: str, text: str) -> dict[str, str]:
    return {
        "rule": cell[0].rule,
        "configuration": cell[0].name,
        "dtype": cell[1],
        "backend": name,
        "text": text,
    }
