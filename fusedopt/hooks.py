"""Hooks on parameters that call an object of the optimizer, and do not keep it alive."""

import weakref
from collections.abc import Callable
from typing import Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle


class Fires(Protocol):
    """Who is told of a gradient."""

    def fire(self, p: Tensor) -> None:
        """Backward has produced a parameter's gradient."""
        ...


def hook_of(owner: Fires) -> Callable[[Tensor], None]:
    """What parameters hold; it does nothing once the owner is gone."""
    reference = weakref.ref(owner)

    def fire(p: Tensor) -> None:
        here = reference()
        if here is not None:
            here.fire(p)

    return fire


def remove_with(owner: Fires, handles: dict[Tensor, RemovableHandle]) -> None:
    """Take hooks off their parameters when the owner goes."""
    weakref.finalize(owner, _remove, handles).atexit = False


def _remove(handles: dict[Tensor, RemovableHandle]) -> None:
    for handle in handles.values():
        handle.remove()
