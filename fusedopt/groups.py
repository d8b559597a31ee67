"""The options of one parameter group, as a plan was built from them."""

from collections.abc import Hashable
from copy import copy
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from fusedopt_kernels import table

from . import options
from .rule import Rule, lookup, switched_on

NEVER_SKIPS = {table.SKIP_NONFINITE.value: 0.0, table.SKIP_ABOVE.value: float("inf")}
"""Numbers of a group that leaves every step to be made."""

KINDS = {1.0: table.NORM_ONE.value, 2.0: table.NORM_TWO.value, float("inf"): table.NORM_INF.value}
"""Norms of gradients, by ``norm_type``."""


class GroupOptions:
    """What the plan needs to know of one parameter group, and whether it still holds."""

    def __init__(self, rule: Rule, group: dict[str, Any]) -> None:
        self.rule = rule
        self.origin: Hashable = None  # what it was derived from, see `derived.py`
        self.keys = [key for key in group if key != "params"]
        self._pick = itemgetter(*self.keys)
        self.values: tuple[Any, ...] = self._pick(group)
        self.options: dict[str, Any] = dict(group.get(options.KEY, {}))
        options.check(rule, group, self.options)
        self.hypers = rule.hypers(group)
        self.numbers = {**dict(zip(_columns(self.hypers), self.hypers, strict=True)), **self._engine_numbers(group)}
        self.step_numbers = {
            table.SKIP_NONFINITE.value: float(self.options.get("skip_nonfinite", False)),
            table.SKIP_ABOVE.value: _or_inf(self.options.get("skip_norm_above")),
        }
        every = (*self.numbers.values(), *self.step_numbers.values())
        self.tensors = [h for h in every if isinstance(h, Tensor)]
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.variant = rule.variant(group)
        self.slots = rule.slots(group)
        self.decoupled = rule.decoupled(group)
        self.maximize = bool(group.get("maximize", False))
        self.clips_value = self.options.get("clip_grad_value") is not None
        self.l1 = switched_on(self.options.get("l1", 0.0))
        limits = (self.options.get(name) for name in ("clip_grad_norm", "skip_norm_above"))
        self.wants_norm = self.options.get("skip_nonfinite", False) or any(limit is not None for limit in limits)
        clips = self.options.get("clip_grad_norm") is not None
        self.clips_alone = clips and self.options.get("clip_scope") == "tensor"
        self.averaged = self.options.get("ema_decay") is not None
        self.norm_kind = KINDS[self.options.get("clip_norm_type", 2.0)]
        skips = self.options.get("skip_nonfinite", False) or self.options.get("skip_norm_above") is not None
        self.uses_total = self.wants_norm and (skips or not self.clips_alone)
        self.cautious = bool(self.options.get("cautious", False))
        self.cautious_decay = bool(self.options.get("cautious_decay", False))
        # what may change without becoming another object: numbers in CPU memory (a GPU's plan has copies), containers
        self.on_host = [(t, t.item()) for t in self.tensors if t.device.type == "cpu"]
        used = (options.KEY, *(key.partition(".")[0] for key in rule.hyper))
        self.containers = [(v, copy(v)) for key in used if isinstance(v := group.get(key), list | dict)]

    def _engine_numbers(self, group: dict[str, Any]) -> dict[int, Any]:
        """Numbers that the engine takes from the options, by column of the hyper-parameter row."""
        return {
            table.CLIP_NORM.value: _or_inf(self.options.get("clip_grad_norm")),
            table.CLIP_VALUE.value: _or_inf(self.options.get("clip_grad_value")),
            table.L1.value: self.options.get("l1", 0.0),
            table.LR_INITIAL.value: options.lr_initial(group) if self.independent else 1.0,
            table.EMA_DECAY.value: 0.0 if (decay := self.options.get("ema_decay")) is None else decay,
            table.EMA_WARMUP.value: float(self.options.get("ema_warmup", False)),
        }

    @property
    def independent(self) -> bool:
        """Whether decoupled decay follows lr/lr_initial."""
        return self.options.get("decay_mode") == "independent"

    def unchanged(self, group: dict[str, Any]) -> bool:
        """Every option is the same object as before, holding what it held; tensor options are where they were."""
        if len(group) != len(self.keys) + 1:
            return False
        try:
            values = self._pick(group)
        except KeyError:
            return False
        return (
            all(map(is_, values, self.values))
            and [t.data_ptr() for t in self.tensors] == self.addresses
            and all(t.item() == was for t, was in self.on_host)
            and all(v == was for v, was in self.containers)
        )

    def hyper(self, name: str) -> Any:
        """The group's value of a hyper-parameter, ``"betas.0"`` for an entry of a tuple."""
        return lookup(dict(zip(self.keys, self.values, strict=True)), name)

    def same_structure(self, other: "GroupOptions") -> bool:
        """Only numbers differ: no other kernels, no other state."""
        return self.rule is other.rule and self._structure() == other._structure()

    def _structure(self) -> tuple[Any, ...]:
        switches = {k: v for k, v in self.options.items() if k not in options.NUMBERS}
        on = (self.clips_value, self.l1, self.wants_norm, self.averaged)
        return self.variant, self.slots, self.decoupled, self.maximize, switches, on


def _columns(hypers: tuple[Any, ...]) -> list[int]:
    """Where a rule's hyper-parameters stand in their row."""
    first = table.RULE_HYPERS.value
    return [table.LR.value, table.WEIGHT_DECAY.value, *range(first, first + len(hypers) - 2)]


def _or_inf(limit: Any) -> Any:
    return float("inf") if limit is None else limit
