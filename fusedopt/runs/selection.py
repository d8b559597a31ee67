"""Which runs are shown, and in which order."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from fusedopt.train.errors import BadInput

from .folders import Run

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
CONDITION = re.compile(r"([\w.]+)(<=|>=|!=|=|<|>)(.*)")
DESCENDING = ("date", "chrf", "bleu")
"""Beginnings of the names whose largest value comes first: the newest, the best."""


def known_name(name: str, runs: Iterable[Run], option: str) -> str:
    """`name` as the runs have it, `eps` for `optimizer_args.eps`. BadInput with the closest when none has it."""
    known = {"name": None} | {key: None for run in runs for key in (*run.results, *run.settings)}
    inner = [key for key in known if key.endswith(f".{name}")]
    if name in known or len(inner) == 1:
        return name if name in known else inner[0]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}"
    raise BadInput(f"{option}: no run has a {name}: {hint}")


def filtered(runs: Sequence[Run], conditions: Iterable[str]) -> list[Run]:
    """Those that satisfy every condition, such as `optimizer=adamw` or `lr<0.01 steps>=500`."""
    kept = list(runs)
    for condition in " ".join(conditions).split():
        match = CONDITION.fullmatch(condition)
        if not match:
            raise BadInput(f"--filter takes conditions such as optimizer=adamw or 'lr<0.01', not {condition!r}")
        name = known_name(match[1], runs, "--filter")
        wanted, holds = _value(match[3]), OPERATORS[match[2]]
        if isinstance(wanted, str) and match[2] not in ("=", "!=") and name != "date":
            raise BadInput(f"--filter {condition}: {match[3]!r} is not a number; = and != compare words")
        kept = [run for run in kept if _comparable(run.value(name), wanted) and holds(run.value(name), wanted)]
    return kept


def ordered(runs: Sequence[Run], name: str) -> list[Run]:
    """By a result or setting: the best, the newest or the smallest first; runs that have none of it last."""
    name = known_name(name, runs, "--sort") if runs else name
    values = {id(run): run.value(name) for run in runs}
    without = [run for run in runs if values[id(run)] is None]
    having = [run for run in runs if values[id(run)] is not None]
    return sorted(having, key=lambda run: _rank(values[id(run)]), reverse=name.startswith(DESCENDING)) + without


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _comparable(value: Any, wanted: Any) -> bool:
    return isinstance(value, str) == isinstance(wanted, str) and isinstance(value, str | int | float)


def _rank(value: Any) -> tuple[bool, Any]:
    """Numbers before words, and neither compared with the other."""
    is_number = isinstance(value, int | float)
    return (False, value) if is_number else (True, str(value))
