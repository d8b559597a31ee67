"""Numbers of rows as reports, terminals and plots write them."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeGuard

from perf.results import Row

OURS = "fusedopt"
GIB = 2**30


class Spread(NamedTuple):
    """20th percentile, median and 80th percentile; all the same of what was taken once."""

    p20: float
    median: float
    p80: float


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is one; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def spread(value: Any) -> Spread | None:
    """Of a row's field: percentiles, or one number. None if it holds neither."""
    if isinstance(value, Spread):
        return value
    if isinstance(value, dict):
        found = [x for name in Spread._fields if is_number(x := value.get(name))]
        return Spread(*found) if len(found) == len(Spread._fields) else None
    return Spread(value, value, value) if is_number(value) else None


def median(value: Any) -> float | None:
    """Of a row's field."""
    found = spread(value)
    return None if found is None else found.median


def number(value: Any, digits: int = 3) -> str:
    """To so many significant digits, whole from there on, without an exponent."""
    x = median(value)
    if x is None or not math.isfinite(x):
        return "" if x is None else str(x)
    places = max(0, digits - 1 - math.floor(math.log10(abs(x)))) if x else 0
    text = f"{x:,.{min(places, 6)}f}"
    return text.rstrip("0").rstrip(".") if x == int(x) and "." in text else text


def ranged(value: Any, digits: int = 3) -> str:
    """Median (p20–p80)."""
    found = spread(value)
    if found is None or found.p20 == found.p80:
        return number(value, digits)
    return f"{number(found.median, digits)} ({number(found.p20, digits)}–{number(found.p80, digits)})"


def percent(value: Any) -> str:
    """A share."""
    x = median(value)
    return "" if x is None else f"{100 * x:.1f} %"


def times(value: Any) -> str:
    """A factor."""
    x = median(value)
    return "" if x is None else f"{x:.2f} ×"


def gib(value: Any) -> str:
    """Bytes."""
    x = median(value)
    return "" if x is None else number(x / GIB)


def inverse(value: Any) -> Spread | None:
    """Of a ratio."""
    found = spread(value)
    return None if found is None or min(found) <= 0 else Spread(1 / found.p80, 1 / found.median, 1 / found.p20)


def markdown(columns: Sequence[str], lines: Iterable[Sequence[str]], left: bool = False) -> str:
    """A table. Columns in which nothing stands are left out; all but the first lean to the right unless ``left``."""
    lines = [list(line) for line in lines]
    kept = [i for i in range(len(columns)) if i == 0 or any(line[i] for line in lines)]
    rule = ["---" if i == 0 or left else "---:" for i in kept]
    rows = [
        [columns[i] for i in kept],
        rule,
        *([" ".join(line[i].replace("|", "\\|").split()) for i in kept] for line in lines),
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def place(row: Row) -> str:
    """The machine of a row in short: its GPU where it was one's work, else its processor."""
    machine = row.get("machine") or {}
    if row.get("device", "cuda") == "cuda" and machine.get("gpu"):
        return str(machine["gpu"])
    return f"{machine.get('cpu', 'unknown processor')}, {machine.get('cores', '?')} cores"


def versions(row: Row) -> str:
    """Versions, driver and commit of a row."""
    machine = row.get("machine") or {}
    named = [f"{name} {machine[name]}" for name in ("driver", "cuda", "torch", "triton", "python") if machine.get(name)]
    threads = [f"{machine['threads']} threads"] if row.get("device") == "cpu" and machine.get("threads") else []
    commit = f"commit {row.get('commit')}{' with changes' if row.get('dirty') else ''}" if row.get("commit") else ""
    return ", ".join(filter(None, [*threads, *named, commit]))
