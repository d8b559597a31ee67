"""The grid of a comparison: its axes, and a cell for each run."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..train.errors import BadInput
from . import classes

Settings = dict[str, Any]
BatchSize = int | str | None
FULL = "full"

SMALL: Settings = {
    "task": "translate", "hidden_size": 64, "num_layers": 1, "num_heads": 4, "max_seq_len": 48, "dropout": 0.0,
    "label_smoothing": 0.0, "batch_size": 32, "steps": 200,
}  # fmt: skip
"""What a comparison runs unless told otherwise: small enough for two cores, and too short to overfit."""
INTERVALS = 20
"""Validations of a run: so fine are its curve and the steps to a target."""
VALIDATED = 512
"""Examples, or all that there are, that validations take when the batch size is varied."""


@dataclass(frozen=True)
class Axes:
    """What is varied. batch_sizes: empty when every run has that of the settings."""

    optimizers: tuple[str, ...]
    schedules: tuple[str, ...]
    seeds: tuple[int, ...]
    batch_sizes: tuple[BatchSize, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run. name: of its folder and its row. fixed: the settings that all cells share; own: this one's. tuned:
    where its lr is from, None when it is train's default.
    """

    name: str
    optimizer: str
    schedule: str
    seed: int
    batch_size: BatchSize
    fixed: Settings
    own: Settings
    tuned: Mapping[str, Any] | None = None

    @property
    def settings(self) -> Settings:
        """What `train.session.run` takes."""
        found = {**self.fixed, **self.own}
        if found.get("lr_scaling") == "none":
            found.pop("base_batch_size", None)
        return found


def cells(axes: Axes, fixed: Settings, tuned: Mapping[str, Mapping[str, Any]]) -> Iterator[Cell]:
    """Every combination, seed by seed, so that each has one result before any has two."""
    for seed, batch_size, schedule, name in product(
        axes.seeds, axes.batch_sizes or (None,), axes.schedules, axes.optimizers
    ):
        own, record = own_settings(name, schedule, seed), tuned.get(name)
        if record:
            own["lr"] = record["lr"]
        own |= {} if batch_size is None else batch_settings(batch_size)
        title = f"{name}-{schedule}{'' if batch_size is None else f'-batch{batch_size}'}-seed{seed}"
        yield Cell(title, name, schedule, seed, batch_size, fixed, own, record)


def own_settings(name: str, schedule: str, seed: int) -> Settings:
    """The settings that set a run apart, without learning rate and batch size."""
    entry = classes.ENTRIES[name]
    arguments = dict(entry.arguments)
    return {"optimizer": entry.optimizer, "optimizer_args": arguments, "schedule": schedule, "seed": seed}


def batch_settings(batch_size: int | str) -> Settings:
    """The settings of a mini-batch size: validation is on as many examples with each."""
    return {
        "batch_size": batch_size,
        "val_batches": 1 if batch_size == FULL else math.ceil(VALIDATED / int(batch_size)),
    }


def tuning_cell(name: str, schedule: str, seed: int, lr: float, fixed: Settings) -> Cell:
    """A run of the search for a learning rate: at the batch size for which it is found."""
    own = own_settings(name, schedule, seed) | {"lr": lr}
    if "batch_size" not in fixed:
        own |= batch_settings(fixed["base_batch_size"])
    return Cell(f"{name}-{schedule}-lr{lr:g}", name, schedule, seed, None, fixed, own)


def fixed_settings(given: Settings, batches: bool) -> Settings:
    """The settings of all cells: `given` over the small defaults.

    batches: the mini-batch size is varied. Then every run sees the same examples (epochs instead of steps), and the
    learning rate is that of the batch size of the settings, scaled.
    """
    given = dict(given)
    if batches and "steps" in given:
        raise BadInput("--batch-sizes compares runs over the same examples: give --epochs instead of --steps")
    if batches and "val_batches" in given:
        raise BadInput(f"--batch-sizes validates every run on the same {VALIDATED} examples: leave out --val-batches")
    if batches and given.get("batch_size") == FULL:
        raise BadInput("--batch-size is the one that learning rates were tuned at: a number, not full")
    if batches:
        given.setdefault("epochs", 1)
        given.setdefault("lr_scaling", "sqrt")
    settings = {name: value for name, value in SMALL.items() if not (name == "steps" and "epochs" in given)} | given
    if batches:
        settings.setdefault("base_batch_size", settings.pop("batch_size"))
    elif isinstance(settings.get("steps"), int):
        settings.setdefault("val_interval", max(1, settings["steps"] // INTERVALS))
    return settings


def parse_seeds(values: Sequence[str]) -> tuple[int, ...]:
    """`("3",)` is three seeds, 0 to 2; of several numbers each is a seed."""
    try:
        numbers = [int(value) for value in values]
    except ValueError:
        raise BadInput(f"--seeds takes how many, or several numbers, not {' '.join(values)}") from None
    if len(numbers) == 1:
        if not 1 <= numbers[0] <= 1000:
            raise BadInput(f"--seeds {numbers[0]}: one number is how many seeds there are, from 1 to 1000")
        numbers = list(range(numbers[0]))
    if any(number < 0 for number in numbers):
        raise BadInput(f"--seeds: a seed is not negative: {min(numbers)}")
    return tuple(dict.fromkeys(numbers))


def parse_batch_sizes(values: Sequence[str]) -> tuple[BatchSize, ...]:
    """`("1", "64", "full")` as sizes."""
    for value in values:
        if value != FULL and not re.fullmatch("[1-9][0-9]*", value):
            raise BadInput(f"--batch-sizes takes numbers of at least 1, or full, not {value}")
    return tuple(dict.fromkeys(value if value == FULL else int(value) for value in values))


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting that differs, by the option that says it."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]

    def show(value: Any) -> str:
        return "the default" if value is None else str(value)

    return [f"--{name.replace('_', '-')} was {show(before.get(name))}, now {show(now.get(name))}" for name in names]
