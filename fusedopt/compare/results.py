"""The rows of a comparison, and what several seeds say together."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..train.errors import BadInput
from ..train.files import write_atomically
from . import classes

FILE_NAME = "results.jsonl"
FINAL = ("done", "diverged")
"""Cells of such a status are not run again; a refused one is: what was missing may be there now."""
REACHED_BY = 0.75

Row = dict[str, Any]


class Results:
    """The rows of a file by cell, written again as a whole with each new one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = {row["cell"]: row for row in read(path)}

    def add(self, row: Row) -> None:
        """Keep a row, in the place of an older one of its cell; with lists for tuples, as it will be read."""
        self.rows[row["cell"]] = json.loads(json.dumps(row))
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows.values()]
        write_atomically(self.path, "".join(lines).encode())


def read(path: Path) -> list[Row]:
    """The rows of a file, none when there is no file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
        if not isinstance(rows[-1], dict) or not rows[-1].keys() >= {"cell", "status", "fixed", "own"}:
            raise BadInput(f"{path}: line {number} is no result of a comparison")
    return rows


class Spread(NamedTuple):
    """Of the values of several seeds. std: None for one value."""

    mean: float
    std: float | None
    low: float
    high: float


def spread(values: Iterable[float | None]) -> Spread | None:
    """None without any value."""
    found = [value for value in values if value is not None]
    if not found:
        return None
    std = statistics.stdev(found) if len(found) > 1 else None
    return Spread(statistics.fmean(found), std, min(found), max(found))


@dataclass(frozen=True)
class Group:
    """The runs that differ only in the seed."""

    optimizer: str
    schedule: str
    batch_size: int | str | None
    rows: tuple[Row, ...]

    @property
    def done(self) -> list[Row]:
        """The runs that came to their end."""
        return [row for row in self.rows if row["status"] == "done"]

    def count(self, status: str) -> int:
        """How many runs ended so."""
        return sum(row["status"] == status for row in self.rows)

    def spread(self, key: str) -> Spread | None:
        """Of a field, or of what the task measured."""
        return spread(row.get(key, row["measured"].get(key)) for row in self.done)

    def median(self, key: str) -> float | None:
        """Of a field."""
        found = [row[key] for row in self.done if row.get(key) is not None]
        return statistics.median(found) if found else None

    def steps_to(self, target: float) -> list[int]:
        """The first validated step at or below the target, of each run that came there; before it diverged, too."""
        rows = [row for row in self.rows if row["status"] in FINAL]
        reached = ([step for step, loss in row["curve"] if loss <= target] for row in rows)
        return [steps[0] for steps in reached if steps]


def groups(rows: Iterable[Row]) -> list[Group]:
    """By class, then by final loss, the lowest first; groups without a finished run last."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault((row["optimizer"], row["schedule"], row["batch_size"]), []).append(row)
    made = [Group(*key, rows=tuple(sorted(own, key=lambda row: row["seed"]))) for key, own in found.items()]
    titles = list(classes.CLASSES)

    def order(group: Group) -> tuple[int, float]:
        loss = group.spread("val_loss_last")
        return titles.index(classes.class_of(group.optimizer)), loss.mean if loss else math.inf

    return sorted(made, key=order)


def examples(group: Group) -> float:
    """Examples in a mini-batch: a key to sort by; the full batch is the largest."""
    sizes = [row["config"]["batch_size"] for row in group.rows if "config" in row]
    return sizes[0] if sizes else math.inf if isinstance(group.batch_size, str) else group.batch_size or 0


class Noise:
    """Which groups cannot be told from the one of the lowest mean final loss.

    lowest: that one, of the groups of which every run came to its end. Few seeds give a poor standard deviation, so one
    below the median of all groups counts as the median.
    """

    def __init__(self, made: Sequence[Group]) -> None:
        found = {id(g): loss for g in made if len(g.done) == len(g.rows) and (loss := g.spread("val_loss_last"))}
        self._losses = found
        self._typical = statistics.median([s.std for s in found.values() if s.std is not None] or [0.0])
        self.lowest = min((g for g in made if id(g) in found), key=lambda g: found[id(g)].mean, default=None)

    def covers(self, group: Group) -> bool:
        """Whether its mean is above the lowest by no more than the two deviations; False for single seeds."""
        if self.lowest is None or group is self.lowest or id(group) not in self._losses:
            return False
        ours, best = self._losses[id(group)], self._losses[id(self.lowest)]
        if ours.std is None or best.std is None:
            return False
        return ours.mean - best.mean <= max(ours.std, self._typical) + max(best.std, self._typical)


def default_target(made: Sequence[Group]) -> float | None:
    """The loss that three quarters of the groups reach on average, rounded up to two decimals."""
    losses = sorted(loss.mean for group in made if (loss := group.spread("val_loss_best")))
    if not losses:
        return None
    return math.ceil(100 * losses[math.ceil(REACHED_BY * len(losses)) - 1]) / 100
