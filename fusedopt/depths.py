"""How many layers lie above a parameter, by its name: what layer-wise lr decay needs."""

import math
import re
from collections.abc import Callable, Sequence

Number = int | tuple[int, ...] | None
Layers = re.Pattern[str] | Callable[[str], Number]
Level = tuple[float, ...]

NUMBER = re.compile(r"(?:^|\.)(\d+)\.")
"""The first integer in a name, as in ``blocks.3.mlp.weight``."""


def depths(names: Sequence[str], layers: Layers | None) -> list[int]:
    """For each name the number of layers above its own: 0 for the topmost; layers that no name has do not count.

    layers: see `fusedopt.param_groups`.

    Raises:
        ValueError: no name has a number; without layers: numbers stand in several places.
    """
    numbers = [_number(layers, name) for name in names]
    if not any(numbers):
        raise ValueError(
            f"layer_decay finds no layer number in names such as {names[0] if names else '(none)'}: give layers, a "
            "compiled regular expression with a group, or a function of the name"
        )
    places = {found.string[: found.start()] or "(top)" for name in names if (found := NUMBER.search(name))}
    if layers is None and len(places) > 1:
        raise ValueError(
            f"layer_decay finds numbers in {', '.join(sorted(places))}: say which are layers and in which order by "
            r"layers, such as re.compile(r'blocks\.(\d+)\.')"
        )
    levels = [number or (_outside(names, numbers, i),) for i, number in enumerate(numbers)]
    order = {level: i for i, level in enumerate(sorted(set(levels), reverse=True))}
    return [order[level] for level in levels]


def _number(layers: Layers | None, name: str) -> Level:
    """A layer's number, longer where layers have layers; () for none."""
    if callable(layers):
        number = layers(name)
        return () if number is None else number if isinstance(number, tuple) else (number,)
    found = (layers or NUMBER).search(name)
    return tuple(int(group) for group in found.groups() if group is not None) if found else ()


def _outside(names: Sequence[str], numbers: Sequence[Level], i: int) -> float:
    """−inf, below the layers, or inf, above them: those of the innermost module that holds the parameter and layers."""
    path = names[i].split(".")
    for length in reversed(range(len(path))):
        module = "".join(part + "." for part in path[:length])
        first = next((k for k, name in enumerate(names) if numbers[k] and name.startswith(module)), None)
        if first is not None:
            return -math.inf if i < first else math.inf
    raise AssertionError("the outermost module holds every parameter")
