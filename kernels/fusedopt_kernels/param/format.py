"""A format of low-precision weights, as the rest of the library knows it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def _nothing(param: Tensor) -> None:
    return None


@dataclass(frozen=True, eq=False)
class WeightFormat:
    """codec: device codec of a dtype, given whether to round stochastically. load: fp32 values, new or in ``out``, of a
    weight and what is kept beside it. store: writes fp32 values, which are used up; noise: int32, 16 bits, or None.
    initial: what belongs beside a weight whose value is exact. key: of that in the state, None if there is nothing.
    dtype: its dtype, None: the weight's own. random: whether it always, never or by choice (None) rounds at random.
    """

    name: str
    codec: Callable[..., tuple[Any, ...]]
    load: Callable[..., Tensor]
    store: Callable[[Tensor, Tensor, Any, Tensor | None], None]
    key: str | None = None
    dtype: torch.dtype | None = None
    initial: Callable[[Tensor], Tensor | None] = _nothing
    random: bool | None = False

    def dtype_beside(self, param: Tensor) -> torch.dtype:
        """Dtype of what is kept beside a weight."""
        return param.dtype if self.dtype is None else self.dtype
