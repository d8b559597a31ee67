"""What a step as a whole depends on: where its gradient norm comes from, the loss scale, what makes it be skipped."""

import math
from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import launch, table

from .groups import NEVER_SKIPS, GroupOptions
from .norm import Sums, norm_of
from .rule import Rule

_TOTALS = table.TOTAL_SQUARE.value, table.TOTAL_BAD.value, table.TOTAL_NORM.value


class Conditions:
    """What one step is given, and what the groups agree on; columns as in ``table.py``, floats or tensors.

    numbers: of the conditions. agreed: row 0 of the hyper-parameters. norm_mode, kind: one of table's ``…_NORM`` and
    of its ``NORM_…``. scaled: a loss scale or a skip decision is given.
    """

    def __init__(
        self,
        groups: Sequence[GroupOptions],
        given: dict[int, Any] | None = None,
        several: bool = False,
        measured: Sequence[bool] = (False, False),
    ) -> None:
        """several: gradients lie in more than one part. measured: metrics want the norm; those of single gradients.

        Raises:
            ValueError: groups that do not agree on the norm or on when a step is skipped.
        """
        given = given or {}
        asked = [group for group in groups if group.wants_norm]
        if asked and any(not _agree(group.step_numbers, asked[0].step_numbers) for group in groups):
            raise ValueError(
                "skip_nonfinite and skip_norm_above decide on the whole step: give every param_group the same values "
                "(of tensors, the same object)"
            )
        kinds = {group.norm_kind for group in asked} or {table.NORM_TWO.value}
        if len(kinds) > 1:
            raise ValueError("clip_norm_type is that of the norm over all gradients: give every param_group the same")
        self.kind: int = kinds.pop()
        if self.kind != table.NORM_TWO.value and (taken := [g.rule.name for g in groups if g.rule.grad_norm]):
            raise ValueError(f"{taken[0]} takes the 2-norm of gradients: leave clip_norm_type at 2.0")
        self.agreed: dict[int, Any] = asked[0].step_numbers if asked else NEVER_SKIPS
        self.numbers: dict[int, Any] = {
            **dict.fromkeys((table.FOUND_INF.value, table.CHECK.value, *_TOTALS), 0.0), table.GRAD_SCALE.value: 1.0,
            **given,
        }  # fmt: skip
        self.wants_norm = bool(asked) or measured[0] or table.CHECK.value in given
        self.single = measured[1]
        self.uses_total = any(group.uses_total for group in groups)
        self.scaled = bool({table.GRAD_SCALE.value, table.FOUND_INF.value} & given.keys())
        mode = table.SUMMED_NORM if several else table.OWN_NORM
        if table.TOTAL_NORM.value in given:
            mode = table.GIVEN_NORM
        self._totals: dict[torch.device, Tensor] = {}
        self._on: dict[torch.device, Conditions] = {}
        self.norm_mode: int = mode.value if self.wants_norm else table.NO_NORM.value

    def use(self, rule: Rule, clips_alone: bool) -> launch.NormUse:
        """What a part's kernels do with gradient norms."""
        mode = self.norm_mode
        if rule.grad_norm and mode == table.NO_NORM.value:
            mode = table.OWN_NORM.value
        own = mode != table.NO_NORM.value and (rule.grad_norm or clips_alone or self.single)
        return launch.NormUse(mode, self.kind, self.scaled, own, rule.grad_norm)

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


def _agree(a: dict[int, Any], b: dict[int, Any]) -> bool:
    """Equal floats, or the same tensors: what those hold is not looked at."""
    pairs = [(x, b[column]) for column, x in a.items()]
    return all(x is y or (not isinstance(x, Tensor) and not isinstance(y, Tensor) and x == y) for x, y in pairs)


class StepNumbers(NamedTuple):
    """Conditions, worked out: 1/loss scale, norm of all gradients, whether it is wanted, whether to skip, whether a
    gradient is not finite."""

    inverse: float
    norm: float
    with_norm: bool
    skip: bool
    bad: bool

    @classmethod
    def of(cls, conditions: Conditions, sums: Sums, wide: bool) -> "StepNumbers":
        """As the scalars kernel does it; sums: this part's own, for a norm of one part."""
        agreed = {column: float(x) for column, x in conditions.agreed.items()}
        given = {column: float(x) for column, x in conditions.numbers.items()}
        mode = conditions.norm_mode
        inverse = float(np.float32(np.float64(1.0) / given[table.GRAD_SCALE.value])) if conditions.scaled else 1.0
        skip = conditions.scaled and given[table.FOUND_INF.value] != 0.0
        if mode == table.NO_NORM.value:
            return cls(inverse, 0.0, False, skip, False)
        if mode == table.GIVEN_NORM.value:
            norm = given[table.TOTAL_NORM.value]
            bad = not math.isfinite(norm)
        else:
            total, bad = sums.total, sums.bad > 0.0
            if mode == table.SUMMED_NORM.value:
                total, bad = given[table.TOTAL_SQUARE.value], given[table.TOTAL_BAD.value] > 0.0
            norm = norm_of(total, wide, conditions.kind) * inverse
        above = agreed[table.SKIP_ABOVE.value]
        spike = above < math.inf and not norm <= above
        refused = bad and agreed[table.SKIP_NONFINITE.value] + given[table.CHECK.value] != 0.0
        return cls(inverse, norm, True, skip or spike or refused, bad)
