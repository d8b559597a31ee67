"""Groups and segments that a part of a step makes from the plan's, for rules and numbers of its own."""

from collections.abc import Callable, Container, Hashable, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from .groups import GroupOptions
from .options import KEY, MATRIX
from .rule import Rule
from .segment import Segment

BEFORE = {
    "clip_grad_norm", "clip_norm_type", "clip_scope", "clip_grad_value", "skip_nonfinite", "skip_norm_above",
    "state_dtype", "state_rounding", "seed", "streams",
}  # fmt: skip
"""Options that concern gradients and state."""
AFTER = {"master_weights", "master_rounding", "seed", "streams", "cautious_decay", "decay_mode", "lr_initial"}
"""Options that concern parameters."""

Make = Callable[[GroupOptions, Any], dict[str, Any]]
"""(group of the plan, key) → group of the part."""


class DerivedGroups:
    """One group for each (group of the plan, key) that a part's segments need, renewed when the plan's changes.

    groups: the plan's. list: those made from them, under ``rule``; both are changed in place.
    """

    def __init__(self, rule: Rule, groups: Sequence[GroupOptions], make: Make) -> None:
        self.rule, self.groups, self.make = rule, groups, make
        self.list: list[GroupOptions] = []
        self._index: dict[tuple[int, Hashable], int] = {}

    def index(self, group: int, key: Hashable = None) -> int:
        """Place in ``list`` of the group made from the plan's number ``group`` for a key."""
        if (group, key) not in self._index:
            self._index[group, key] = len(self.list)
            self.list.append(self._made(group, key))
        return self._index[group, key]

    def renew(self, changed: Sequence[int]) -> list[int]:
        """Make anew what depends on groups of the plan; returns the places."""
        places = {(group, key): place for (group, key), place in self._index.items() if group in set(changed)}
        for (group, key), place in places.items():
            self.list[place] = self._made(group, key)
        return list(places.values())

    def _made(self, group: int, key: Any) -> GroupOptions:
        made = GroupOptions(self.rule, self.make(self.groups[group], key))
        made.origin = (group, key)
        return made


def values(group: GroupOptions, options: Container[str] = MATRIX) -> dict[str, Any]:
    """Keys and values of a group, with no parameters and only some of our options."""
    kept = {name: value for name, value in group.options.items() if name in options}
    return {**dict(zip(group.keys, group.values, strict=True)), "params": [], KEY: kept}


def check_segments(name: str, segments: Sequence[Segment]) -> None:
    """Refuse what a matrix rule cannot follow.

    Raises:
        RuntimeError: complex parameters.
    """
    if any(s.param.is_complex() for s in segments):
        raise RuntimeError(f"{name} does not support complex parameters")


class DerivedSegment(Segment):
    """A parameter, without state, whose gradient ``direction`` is computed by an earlier part of the step."""

    __slots__ = ("direction",)

    def __init__(self, source: Segment, group: int, position: int, direction: Tensor) -> None:
        self.param, self.group, self.position, self.direction = source.param, group, position, direction
        self.local, self.span, self.ranks, self.mesh = source.local, source.span, source.ranks, source.mesh
        self.weight, self.residual, self.mask = source.weight, source.residual, source.mask
        self.grad_buffer, self.slots, self.numbers = None, [], []
        self.counter, self.counted = source.counter, True
        self.ema, self.ema_step = None, None
        self.scales, self.formats, self.rows = [], [], None
        self.weight_format, self.keys = source.weight_format, source.keys[:1]

    @property
    def grad_dtype(self) -> torch.dtype:
        return self.direction.dtype


def with_group(s: Segment, group: int) -> Segment:
    """The same segment in another group."""
    s = copy(s)
    s.group = group
    return s


def without_average(s: Segment) -> Segment:
    """The same segment, whose average is renewed elsewhere."""
    s = copy(s)
    s.ema = s.ema_step = None
    return s
