"""Whether tensors are still of the type, dtype, device, layout, shape and strides that they were of."""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor

from . import layout


class AttributeGuard:
    """`guard_of`'s check in Python, for a torch without the C++ one."""

    _pick = attrgetter("dtype", "device", "layout", "shape")

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.known = self._look(tensors)

    def _look(self, tensors: Sequence[Tensor]) -> list[Any]:
        return [(type(t), self._pick(t), t.stride(), t.is_conj(), t.is_neg()) for t in tensors]

    def check(self, *tensors: Tensor) -> bool:
        """Whether every tensor is as it was; a tensor that has no strides (sparse) is not."""
        try:
            return self._look(tensors) == self.known
        except (AttributeError, RuntimeError):
            return False


def guard_of(tensors: Sequence[Tensor]) -> Any:
    """What ``check(*tensors)`` finds unchanged: type, dtype, device, layout, shape, strides, lazy bits.

    torch.compile's own guard: one C++ call, about a third of the time of asking each tensor from Python.
    """
    if len(set(map(id, tensors))) < len(tensors):  # one listed twice: the C++ guard takes no tensor two times
        return AttributeGuard(tensors)
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: Any = [list(t.shape) for t in tensors]  # the stubs' types are of an older form
        strides: Any = [list(t.stride()) for t in tensors]
        return TensorGuards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    except (ImportError, TypeError):
        layout.warn_once("guard", "this torch lacks the fast tensor guard; a step takes more host time")
        return AttributeGuard(tensors)
