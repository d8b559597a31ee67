"""fusedopt: fused optimizers for training large models, drop-in for torch.optim.

    import fusedopt
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3)

Names are resolved on first use, so that importing the package imports no Triton and leaves the choice between
compiled and interpreted kernels (``TRITON_INTERPRET``) open.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .flatten import flatten_, unflatten_
    from .optimizer import FusedOptimizer
    from .rule import Rule, Slot
    from .rules.adam import Adam
    from .rules.adamw import AdamW
    from .rules.sgd import SGD

__version__ = "0.1.0"
__all__ = ["SGD", "Adam", "AdamW", "FusedOptimizer", "Rule", "Slot", "__version__", "flatten_", "unflatten_"]

_HOMES = {
    "Adam": ".rules.adam",
    "AdamW": ".rules.adamw",
    "FusedOptimizer": ".optimizer",
    "Rule": ".rule",
    "SGD": ".rules.sgd",
    "Slot": ".rule",
    "flatten_": ".flatten",
    "unflatten_": ".flatten",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
