"""The report on a rule of the user's own: text for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import click

from .backends import NAMES, Availability
from .own import Report
from .problem import SEEDS, TIMES


def coverage(names: Sequence[str], known: Mapping[str, Availability]) -> dict[str, str]:
    """For every backend: what ran as what, or why it did not."""
    lines = {}
    for name in NAMES:
        if name == "eager":
            lines[name] = f"the reference: {known[name].how}"
        elif name in names:
            lines[name] = f"ran: {known[name].how}"
        else:
            lines[name] = known[name].how if not known[name].runs else "not run: not asked for"
    return lines


def print_report(target: str, report: Report, ran: Mapping[str, str], seeds: int) -> None:
    """The report on stdout."""
    rows = {
        **dict.fromkeys(report.equal, "equal in every bit"),
        **dict.fromkeys(report.uncompared, "ran; not compared: float64 norms, compiled quantised state"),
        **{key: f"DIFFERS, reference and kernel: {difference}" for key, difference in report.differences.items()},
        **{key: f"FAILED: {text}" for key, text in report.failures.items()},
    }
    widths = [max((len(key[i]) for key in rows), default=0) for i in range(3)]
    click.echo(f"{target}: kernels against the rule's eager reference, steps {', '.join(map(str, TIMES))}")
    for key, text in rows.items():
        click.echo("  ".join(part.ljust(width) for part, width in zip(key, widths, strict=True)) + f"  {text}")
    for name, text in ran.items():
        click.echo(f"{name:12} {text}")
    click.echo(
        f"{'PASSED' if report.passed else 'FAILED'}: {len(report.equal)} of "
        f"{len(report.equal) + len(report.differences) + len(report.failures)} cells equal the reference in every bit; "
        f"seeds {', '.join(map(str, SEEDS[:seeds]))}"
    )


def as_json(target: str, report: Report, ran: Mapping[str, str], seeds: int) -> dict[str, Any]:
    """The whole report; the values of a difference also in hexadecimal."""
    return {
        "passed": report.passed,
        "rule": target,
        "seeds": list(SEEDS[:seeds]),
        "steps": list(TIMES),
        "coverage": dict(ran),
        "equal": [_cell(key) for key in report.equal],
        "uncompared": [_cell(key) for key in report.uncompared],
        "differences": [
            {**_cell(key), **asdict(found), "hex": [value.hex() for value in found.values]}
            for key, found in report.differences.items()
        ],
        "failures": [{**_cell(key), "text": text} for key, text in report.failures.items()],
    }


def _cell(key: tuple[str, str, str]) -> dict[str, str]:
    return dict(zip(("options", "dtype", "backend"), key, strict=True))
