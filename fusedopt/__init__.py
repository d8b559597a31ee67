"""fusedopt: fused optimizers for training large models, drop-in for torch.optim.

    import fusedopt
    optimizer = fusedopt.AdamW(model.parameters(), lr=1e-3)

Names are resolved on first use, so that importing the package imports no Triton and leaves the choice between
compiled and interpreted kernels (``TRITON_INTERPRET``) open.
"""

import importlib
from typing import TYPE_CHECKING, Any

from .rules import RULES

if TYPE_CHECKING:
    from . import schedules
    from .amp import GradScaler
    from .batch_size import scale_adam, scale_lr
    from .clip import clip_grad_norm_, get_total_norm
    from .custom import Optimizer, make_rule
    from .flatten import flatten_, unflatten_
    from .foreign import import_state_dict
    from .group_table import describe_groups
    from .grouping import no_decay, param_groups
    from .optimizer import FusedOptimizer
    from .options import Options
    from .release_ddp import release_under_ddp
    from .rule import Rule, Slot
    from .rules.adabelief import AdaBelief
    from .rules.adadelta import Adadelta
    from .rules.adafactor import Adafactor
    from .rules.adagrad import Adagrad
    from .rules.adam import Adam
    from .rules.adamax import Adamax
    from .rules.adamw import AdamW
    from .rules.adan import Adan
    from .rules.ademamix import AdEMAMix
    from .rules.adopt import ADOPT
    from .rules.asgd import ASGD
    from .rules.lamb import LAMB
    from .rules.lars import LARS
    from .rules.lion import Lion
    from .rules.muon import Muon
    from .rules.nadam import NAdam
    from .rules.novograd import NovoGrad
    from .rules.radam import RAdam
    from .rules.rmsprop import RMSprop
    from .rules.rprop import Rprop
    from .rules.schedule_free_adamw import AdamWScheduleFree
    from .rules.schedule_free_sgd import SGDScheduleFree
    from .rules.sgd import SGD
    from .rules.sparse_adam import SparseAdam
    from .rules.stable_adamw import StableAdamW

__version__ = "0.1.0"
__all__ = [
    "ADOPT", "ASGD", "LAMB", "LARS", "SGD", "AdEMAMix", "AdaBelief", "Adadelta", "Adafactor", "Adagrad", "Adam",
    "AdamW", "AdamWScheduleFree", "Adamax", "Adan", "FusedOptimizer", "GradScaler", "Lion", "Muon", "NAdam", "NovoGrad",
    "Optimizer", "Options", "RAdam", "RMSprop", "Rprop", "Rule", "SGDScheduleFree", "Slot", "SparseAdam",
    "StableAdamW", "__version__", "clip_grad_norm_", "describe_groups", "flatten_", "get_total_norm",
    "import_state_dict", "make_rule", "no_decay", "param_groups", "release_under_ddp", "scale_adam", "scale_lr",
    "schedules", "unflatten_",
]  # fmt: skip

_HOMES = {
    "FusedOptimizer": ".optimizer", "GradScaler": ".amp", "Optimizer": ".custom", "Options": ".options",
    "Rule": ".rule", "Slot": ".rule", "clip_grad_norm_": ".clip", "describe_groups": ".group_table",
    "flatten_": ".flatten", "get_total_norm": ".clip", "import_state_dict": ".foreign", "make_rule": ".custom",
    "no_decay": ".grouping", "param_groups": ".grouping", "release_under_ddp": ".release_ddp",
    "scale_adam": ".batch_size", "scale_lr": ".batch_size", "unflatten_": ".flatten",
    **{cls: f".rules.{name}" for name, cls in RULES.items()},
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "schedules":
        return importlib.import_module(".schedules", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
