"""Learning-rate schedules by name, made of torch.optim.lr_scheduler's classes; and a file that changes a running lr.

    schedule = fusedopt.schedules.make("cosine", optimizer, steps=1000, warmup_steps=50)
    ...
    optimizer.step()
    schedule.step()

Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .checks import check, closest, parse_arguments
from .names import NAMES, SCHEDULES, Run, default_min_lr, default_warmup_steps

if TYPE_CHECKING:
    from .schedule import Schedule, make
    from .watch import Watched

__all__ = [
    "NAMES", "SCHEDULES", "Run", "Schedule", "Watched", "check", "closest", "default_min_lr", "default_warmup_steps",
    "make", "parse_arguments",
]  # fmt: skip

_HOMES = {"Schedule": ".schedule", "make": ".schedule", "Watched": ".watch"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name], __name__), name)
