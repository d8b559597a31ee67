"""AdamW of this package as bf16 training may use it: the rows that stand beside other packages' formats."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .held import Memory, cast, estimate


@dataclass(frozen=True)
class Suggestion:
    """A configuration of AdamW over bf16 parameters."""

    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Its formats in words."""
        return ", ".join(("fusedopt, bf16", *self.options.values()))


SUGGESTIONS = (
    Suggestion(dict(master_weights="split16", state_dtype="bfloat16")),
    Suggestion(dict(master_weights="split8", state_dtype="int8")),
    Suggestion(dict(master_weights="stochastic", state_dtype="int8")),
    Suggestion(dict(master_weights="split8", state_dtype="int4")),
)
"""From the most exact to the smallest."""


def count_all(params: Sequence[Tensor]) -> list[tuple[Suggestion, Memory]]:
    """What each of them holds for a model's parameters."""
    held = cast(params, torch.bfloat16)
    return [(suggestion, estimate(held, "adamw", **suggestion.options)) for suggestion in SUGGESTIONS]
