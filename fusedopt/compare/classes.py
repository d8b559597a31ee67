"""The optimizers that a comparison knows, sorted into classes. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..schedules import closest
from ..train.errors import BadInput

ALL = "all"


class Entry(NamedTuple):
    """A rule of `fusedopt.rules` with arguments. usual: the learning rate at which the search for a good one begins."""

    optimizer: str
    usual: float
    arguments: dict[str, Any] = {}  # noqa: RUF012 never written to


CLASSES: dict[str, dict[str, Entry]] = {
    "gradient descent": {
        "sgd": Entry("sgd", 0.3, {"momentum": 0.0}),
        "momentum": Entry("sgd", 0.1, {"momentum": 0.9}),
        "nesterov": Entry("sgd", 0.1, {"momentum": 0.9, "nesterov": True}),
        "asgd": Entry("asgd", 0.3),
        "lars": Entry("lars", 3.0, {"momentum": 0.9}),
        "schedule_free_sgd": Entry("schedule_free_sgd", 1.0),
    },
    "adaptive gradient": {
        "adagrad": Entry("adagrad", 0.03),
        "rmsprop": Entry("rmsprop", 0.001),
        "adadelta": Entry("adadelta", 1.0),
        "adafactor": Entry("adafactor", 0.03),
        "rprop": Entry("rprop", 0.001),
    },
    "adaptive moment": {
        "adam": Entry("adam", 0.003),
        "adamw": Entry("adamw", 0.003),
        "nadam": Entry("nadam", 0.003),
        "radam": Entry("radam", 0.003),
        "adamax": Entry("adamax", 0.003),
        "lion": Entry("lion", 0.0003),
        "adabelief": Entry("adabelief", 0.003),
        "adan": Entry("adan", 0.003),
        "ademamix": Entry("ademamix", 0.003),
        "adopt": Entry("adopt", 0.003),
        "lamb": Entry("lamb", 0.01),
        "novograd": Entry("novograd", 0.01),
        "schedule_free_adamw": Entry("schedule_free_adamw", 0.003),
        "stable_adamw": Entry("stable_adamw", 0.003),
    },
    "matrix": {"muon": Entry("muon", 0.003)},
}
"""Gradient descent: the gradient, or a running mean of it, with one step size per tensor. Adaptive gradient: a step
size per element (Adafactor: per row and column) from past gradients. Adaptive moment: the same of a running mean of
gradients (Lion: its sign). Matrix: whole matrices at once."""

ENTRIES = {name: entry for entries in CLASSES.values() for name, entry in entries.items()}
DEFAULT = ("momentum", "nesterov", "adagrad", "rmsprop", "adamw", "lion")
"""Two of each large class."""


def class_of(name: str) -> str:
    """The class of an entry."""
    return next(title for title, entries in CLASSES.items() if name in entries)


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """The entries of these names, each once, in the order of `CLASSES`; "all" is every one. BadInput for others."""
    wanted = set()
    for name in names:
        if name.lower() == ALL:
            wanted |= ENTRIES.keys()
        elif name.lower() == "sparse_adam":
            raise BadInput("--optimizers: sparse_adam takes sparse gradients only; these models' are dense")
        else:
            wanted.add(known("--optimizers", name.lower(), tuple(ENTRIES)))
    return tuple(name for name in ENTRIES if name in wanted)


def known(option: str, name: str, names: Sequence[str]) -> str:
    """`name` if it is one of `names`; else BadInput with the closest of them."""
    if name in names:
        return name
    raise BadInput(f"{option}: unknown name {name}{closest(name, names)}")
