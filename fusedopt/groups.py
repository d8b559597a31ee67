"""The options of one parameter group, as a plan was built from them."""

from copy import copy
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from . import options
from .rule import Rule, lookup


class GroupOptions:
    """What the plan needs to know of one parameter group, and whether it still holds."""

    def __init__(self, rule: Rule, group: dict[str, Any]) -> None:
        self.rule = rule
        self.keys = [key for key in group if key != "params"]
        self._pick = itemgetter(*self.keys)
        self.values: tuple[Any, ...] = self._pick(group)
        self.hypers = rule.hypers(group)
        self.tensors = [h for h in self.hypers if isinstance(h, Tensor)]
        self.addresses = [t.data_ptr() for t in self.tensors]
        self.variant = rule.variant(group)
        self.slots = rule.slots(group)
        self.decoupled = rule.decoupled(group)
        self.maximize = bool(group.get("maximize", False))
        self.options: dict[str, Any] = dict(group.get(options.KEY, {}))
        options.check(rule, group, self.options)
        self.cautious = bool(self.options.get("cautious", False))
        self.cautious_decay = bool(self.options.get("cautious_decay", False))
        # what may change without becoming another object: numbers in CPU memory (a GPU's plan has copies), containers
        self.on_host = [(t, t.item()) for t in self.tensors if t.device.type == "cpu"]
        used = (options.KEY, *(key.partition(".")[0] for key in rule.hyper))
        self.containers = [(v, copy(v)) for key in used if isinstance(v := group.get(key), list | dict)]

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
        return self.rule is other.rule and (
            (self.variant, self.slots, self.decoupled, self.maximize, self.options)
            == (other.variant, other.slots, other.decoupled, other.maximize, other.options)
        )
