"""A step over one parameter of an optimizer, for those that are updated in backward (``release.py``)."""

import weakref
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import streams
from .blocks import Workers
from .eager import EagerStep
from .metrics import Metrics
from .options import KEY
from .plan import Plan
from .rule import Rule
from .stepper import Stepper

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


class Single(Stepper):
    """A step over one parameter, with the state and the options that it has in its optimizer."""

    def __init__(self, owner: "FusedOptimizer", p: Tensor, workers: dict[torch.device, Workers]) -> None:
        # torch's constructor is left out: this is no optimizer of its own, it has no hooks and no defaults
        self.owner, self.param, self.workers = weakref.ref(owner), p, workers
        self.backend, self._launcher, self._metrics = owner.backend, owner._launcher, Metrics(())
        self.state = defaultdict(dict)
        self.param_groups, self._counters = [], {}
        self._options: tuple[Any, Any] = (None, None)
        self._begin()

    def rule_of(self, group: dict[str, Any]) -> Rule:
        owner = self.owner()
        assert owner is not None
        return owner.rule_of(group)

    def update(self, group_index: int, index: int) -> None:
        """One step; the indices say where the parameter stands in its optimizer."""
        owner, p = self.owner(), self.param
        assert owner is not None
        streams.assign(owner)
        group = owner.param_groups[group_index]
        self.param_groups = [{**group, "params": [p], **self._own_options(group, index)}]
        if p in owner.state:
            self.state[p] = owner.state[p]
        else:
            self.state.clear()
        if p in owner._counters:
            self._counters[p] = owner._counters[p]
        with torch.no_grad():
            self._step()
        if p in self.state:
            owner.state[p] = self.state[p]
        owner._counters.update(self._counters)

    def _own_options(self, group: dict[str, Any], index: int) -> dict[str, Any]:
        """The group's options with this parameter's stream alone; the same object as long as they are."""
        options = group.get(KEY)
        if options is None:
            return {}
        if self._options[0] is not options:
            own = dict(options)
            if streams.STREAMS in own:
                own[streams.STREAMS] = [own[streams.STREAMS][index]]
            self._options = options, own
        return {KEY: self._options[1]}

    def _build(self) -> Plan:
        """As every optimizer; scratch memory of twins is shared with the other parameters."""
        plan = super()._build()
        for part in self._eager:
            if isinstance(part, EagerStep):
                shared = self.workers.get(part.workers.device)
                if shared is None or shared.block < part.workers.block:
                    self.workers[part.workers.device] = shared = part.workers
                part.workers = shared
        return plan
