"""A quantised format of state, as the rest of the library knows it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..table import SCALE_GROUP as GROUP


@dataclass(frozen=True, eq=False)
class StateFormat:
    """code, scale: dtypes of the codes and of what every group has beside them. packed: elements per code. dithered:
    rounded by a sequence of its own where it is not to be rounded stochastically.

    codec: device codec, given whether to round stochastically. load: (groups, GROUP/packed) codes and (groups,) scales
    to (groups, GROUP) fp32 values; store: the reverse, with (groups, GROUP) noise: int32 of 16 random bits, int64 of
    32 dithered ones, or None to round to nearest.
    """

    name: str
    code: torch.dtype
    scale: torch.dtype
    codec: Callable[[bool], tuple[Any, ...]]
    load: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    store: Callable[[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]]
    packed: int = 1
    dithered: bool = False

    @property
    def bytes_per_element(self) -> float:
        """In rows of whole groups."""
        return self.code.itemsize / self.packed + self.scale.itemsize / GROUP
