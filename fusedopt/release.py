"""Gradient release (option ``release_gradients``): backward updates every parameter and frees its gradient at once.

A hook on every parameter runs a step over it alone, so that no two gradients need be in memory at a time. What a step
over one parameter cannot know is refused: norms of all gradients, whether another gradient is finite, a loss scale that
is found too large later, a gradient that more is to be added to. ``step()`` is still called after every backward pass:
hooks and schedules count it, and it updates what has a gradient that no backward pass produced.
"""

import weakref
from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fusedopt_kernels import table

from . import streams
from .average import refuse_swapped
from .blocks import Workers
from .eager import EagerStep
from .hooks import hook_of, remove_with
from .metrics import Metrics
from .options import KEY
from .plan import Plan
from .rule import Rule
from .stepper import Stepper
from .upload import capturing

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

NAME = "release_gradients"


class Release:
    """The hooks of one optimizer and a step for each of its parameters."""

    def __init__(self, optimizer: "FusedOptimizer") -> None:
        self._optimizer = weakref.ref(optimizer)
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._single: dict[Tensor, Single] = {}
        self._stepped: set[Tensor] = set()
        self._workers: dict[torch.device, Workers] = {}
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._hook = hook_of(self)
        remove_with(self, self._handles)

    def attach(self) -> None:
        """Hook the optimizer's present parameters, and no others."""
        optimizer = self._optimizer()
        assert optimizer is not None
        groups = optimizer.param_groups
        self._places = {p: (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
        for p in self._handles.keys() - self._places.keys():
            self._handles.pop(p).remove()
            self._single.pop(p, None)
        for p in self._places.keys() - self._handles.keys():
            if p.requires_grad and p.is_leaf:
                self._handles[p] = p.register_post_accumulate_grad_hook(self._hook)

    def fire(self, p: Tensor) -> None:
        """Update a parameter from its gradient and let go of that.

        Raises:
            RuntimeError: it was updated already since the last ``step()``; a CUDA graph; inside `swap_ema`.
        """
        optimizer = self._optimizer()
        if optimizer is None or p.grad is None:
            return
        refuse_swapped(optimizer, "a backward pass under release_gradients")
        _refuse_elsewhere()
        if p in self._stepped:
            raise RuntimeError(
                f"release_gradients: a second gradient came for a parameter of shape {tuple(p.shape)}, which has been "
                "updated from the first and cannot be accumulated into any more: call optimizer.step() after every "
                "backward pass (reentrant checkpointing splits one: use_reentrant=False), or leave the option out"
            )
        if not self._is_placed(optimizer, p):
            self.attach()
            if not self._is_placed(optimizer, p):  # no parameter of this optimizer any more
                return
        if p not in self._single:
            self._single[p] = Single(optimizer, p, self._workers)
        self._single[p].update(*self._places[p])
        p.grad = None
        self._stepped.add(p)

    def step(self, given: Mapping[int, Any]) -> None:
        """What ``step()`` does: update from gradients that were set by hand, hook parameters that came, start anew.

        Raises:
            RuntimeError: conditions were given, which come too late.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        if table.TOTAL_NORM.value in given:
            raise RuntimeError("step(total_norm=…) comes when release_gradients has updated all: leave it out")
        if given:
            refuse_scaler()
        self.attach()
        for p in self._places:
            if p.grad is not None and p not in self._stepped:
                self.fire(p)
        self.forget()

    def forget(self) -> None:
        """A step is done, or its gradients were dropped."""
        self._stepped.clear()

    def leave(self) -> None:
        """State was replaced: the steps of all parameters are planned anew."""
        self._single.clear()
        self.forget()

    def _is_placed(self, optimizer: "FusedOptimizer", p: Tensor) -> bool:
        g, i = self._places.get(p, (-1, -1))
        groups = optimizer.param_groups
        return 0 <= g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is p


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


# --------------------------------------------------------------------------------------------------------- refusals
ALONE = ("amp_scaling", "norm_at_backward", "metrics")
"""Options of the whole optimizer that need all gradients at once."""


def checked(chosen: Mapping[str, Any]) -> bool:
    """The option's value.

    Raises:
        ValueError: another value, or with an option that needs all gradients at once.
        RuntimeError: several processes train together.
    """
    value = chosen.get(NAME, False)
    if not isinstance(value, bool):
        raise ValueError(f"{NAME} must be True or False, got {value!r}")
    if value:
        for name in (name for name in ALONE if chosen.get(name)):
            raise ValueError(f"{name}={chosen[name]!r} needs all gradients at once, which {NAME}=True never has")
        _refuse_elsewhere()
    return value


def check_group(options: Mapping[str, Any]) -> None:
    """Refuse options of a group that need all gradients at once.

    Raises:
        ValueError: names the option and what to do.
    """
    for name in ("skip_nonfinite", "skip_norm_above"):
        if options.get(name):
            raise ValueError(f"{name} decides on all gradients at once, which {NAME}=True never has: leave one out")
    if options.get("clip_grad_norm") is not None and options.get("clip_scope") != "tensor":
        raise ValueError(
            f"clip_grad_norm clips by the norm of all gradients, which {NAME}=True never has at once: use "
            "clip_scope='tensor', clip_grad_value, or a rule that bounds its own steps such as StableAdamW"
        )


def refuse_scaler() -> None:
    """Refuse a loss scale, which comes too late.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        f"{NAME}: parameters have been updated in backward from gradients of the scaled loss; leave the GradScaler out "
        "(bf16 needs none) and start again from a checkpoint, or leave the option out"
    )


def _refuse_elsewhere() -> None:
    """Refuse where gradients are not final when their hooks run.

    Raises:
        RuntimeError: torch.distributed has a process group of several, or a CUDA graph is being captured.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(
            f"{NAME} does not work in a torch.distributed process group of several processes, whose gradients are "
            "reduced after the hooks that would use them: leave it out"
        )
    if capturing():
        raise RuntimeError(f"{NAME} does not work inside a CUDA graph: leave it out of an optimizer that is captured")
