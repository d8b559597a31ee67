"""What a step as a whole depends on: where its gradient norm comes from, the loss scale, what makes it be skipped."""

import math
from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import table

from .groups import NEVER_SKIPS, GroupOptions
from .norm import Sums, norm_of


class Conditions:
    """Numbers of row 0 of the hyper-parameters (``table.py``), floats or tensors, and how the norm is found.

    norm_mode: one of table's ``…_NORM``. scaled: a loss scale or a skip decision is given.
    """

    def __init__(self, groups: Sequence[GroupOptions], several: bool, given: dict[int, Any]) -> None:
        """given: columns of row 0 that belong to this step. several: gradients lie in more than one part.

        Raises:
            ValueError: groups that do not agree on when a step is skipped.
        """
        asked = [group.step_numbers for group in groups if group.wants_norm]
        if asked and any(group.step_numbers != asked[0] for group in groups):
            raise ValueError(
                "skip_nonfinite and skip_norm_above decide on the whole step: give every param_group the same values"
            )
        skips = asked[0] if asked else NEVER_SKIPS
        self.numbers: dict[int, Any] = {table.GRAD_SCALE.value: 1.0, **skips, **given}
        self.wants_norm = bool(asked)
        self.uses_total = any(group.uses_total for group in groups)
        self.scaled = bool({table.GRAD_SCALE.value, table.FOUND_INF.value} & given.keys())
        mode = table.SUMMED_NORM if several else table.OWN_NORM
        if table.TOTAL_NORM.value in given:
            mode = table.GIVEN_NORM
        self._totals: dict[torch.device, Tensor] = {}
        self._on: dict[torch.device, Conditions] = {}
        self.norm_mode: int = mode.value if self.wants_norm else table.NO_NORM.value

    def take_totals(self, device: torch.device, totals: Tensor) -> None:
        """(sum of squares, whether an element is not finite) of all parts, for those on a device."""
        have = self._totals.get(device)
        if have is None:
            self._totals[device] = totals
            numbers = {table.TOTAL_SQUARE.value: totals[0], table.TOTAL_BAD.value: totals[1]}
            self._on[device] = copy(self)
            self._on[device].numbers = {**self.numbers, **numbers}
        else:
            have.copy_(totals)

    def on(self, device: torch.device) -> "Conditions":
        """The same for parts on a device."""
        return self._on.get(device, self)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What a part that took these conditions need not take again; tensors by address, on the CPU also by value."""
        return self.norm_mode, self.scaled, tuple(
            (column, x if not isinstance(x, Tensor) else (id(x), x.data_ptr(), x.dtype, x.is_cpu and x.item()))
            for column, x in self.numbers.items()
        )  # fmt: skip


class StepNumbers(NamedTuple):
    """Row 0 of the hyper-parameters, worked out: 1/loss scale, norm of all gradients, whether to skip."""

    inverse: float
    norm: float
    with_norm: bool
    skip: bool

    @classmethod
    def of(cls, conditions: Conditions, sums: Sums, wide: bool) -> "StepNumbers":
        """As the scalars kernel does it; sums: this part's own, for a norm of one part."""
        given = {column: float(x) for column, x in conditions.numbers.items()}
        mode = conditions.norm_mode
        inverse = float(np.float32(np.float64(1.0) / given[table.GRAD_SCALE.value])) if conditions.scaled else 1.0
        skip = conditions.scaled and given.get(table.FOUND_INF.value, 0.0) != 0.0
        if mode == table.NO_NORM.value:
            return cls(inverse, 0.0, False, skip)
        if mode == table.GIVEN_NORM.value:
            norm = given[table.TOTAL_NORM.value]
            bad = not math.isfinite(norm)
        else:
            summed = mode == table.SUMMED_NORM.value
            square, found = (
                (given[table.TOTAL_SQUARE.value], given[table.TOTAL_BAD.value]) if summed else (sums.square, sums.bad)
            )
            norm, bad = norm_of(square, wide) * inverse, found > 0.0
        above = given[table.SKIP_ABOVE.value]
        spike = above < math.inf and not norm <= above
        return cls(inverse, norm, True, skip or spike or (bad and given[table.SKIP_NONFINITE.value] != 0.0))
