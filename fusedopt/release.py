"""Gradient release (option ``release_gradients``): backward updates every parameter and frees its gradient at once.

A hook on every parameter runs a step over it alone, so that no two gradients need be in memory at a time. What a step
over one parameter cannot know is refused: norms of all gradients, whether another gradient is finite, a loss scale that
is found too large later, a gradient that more is to be added to. ``step()`` is still called after every backward pass:
hooks and schedules count it, and it updates what has a gradient that no backward pass produced. Where the gradient that
backward leaves is this process's alone, as under DistributedDataParallel, ``release_ddp.py`` says when it is ready.
"""

import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from fusedopt_kernels import table

from .average import refuse_swapped
from .blocks import Workers
from .hooks import hook_of, remove_with
from .pieces import FRAGMENTS, REMEDY, is_fragment
from .shards import is_dtensor
from .single import Single
from .upload import capturing

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

NAME = "release_gradients"


_ONE_AT_A_TIME = threading.Lock()
"""A process group's threads update parameters too; scratch memory and launch caches are shared."""


class Release:
    """The hooks of one optimizer and a step for each of its parameters."""

    def __init__(self, optimizer: "FusedOptimizer") -> None:
        self._optimizer = weakref.ref(optimizer)
        self._places: dict[Tensor, tuple[int, int]] = {}
        self._single: dict[Tensor, Single] = {}
        self._stepped: set[Tensor] = set()
        self._announced: set[Tensor] = set()
        self._waiting: set[Tensor] = set()
        self._workers: dict[torch.device, Workers] = {}
        self._handles: dict[Tensor, RemovableHandle] = {}
        self._hook = hook_of(self)
        remove_with(self, self._handles)

    def attach(self) -> None:
        """Hook the optimizer's present parameters, and no others.

        Raises:
            RuntimeError: parameters of FSDP1.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        groups = optimizer.param_groups
        self._places = {p: (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])}
        for p in self._handles.keys() - self._places.keys():
            self._handles.pop(p).remove()
            self._single.pop(p, None)
        for p in self._places.keys() - self._handles.keys():
            if is_fragment(p):
                raise RuntimeError(
                    f"{FRAGMENTS} {NAME}=True needs hooks, which they do not run; leave it out, or {REMEDY}"
                )
            if p.requires_grad and p.is_leaf:
                self._handles[p] = p.register_post_accumulate_grad_hook(self._hook)

    # ------------------------------------------------------------------------------------------------- backward
    def fire(self, p: Tensor) -> None:
        """Update a parameter from its gradient and let go of that; if others' are to be added, wait for `arrive`.

        Raises:
            RuntimeError: it was updated already since the last ``step()``; others' gradients are to be added that
                nobody has announced; a CUDA graph; inside `swap_ema`.
        """
        optimizer = self._optimizer()
        if optimizer is None or p.grad is None or not self._owns(optimizer, p):
            return
        refuse_swapped(optimizer, "a backward pass under release_gradients")
        if capturing():
            raise RuntimeError(
                f"{NAME} does not work inside a CUDA graph: leave it out of an optimizer that is captured"
            )
        if p in self._stepped:
            raise RuntimeError(
                f"release_gradients: a second gradient came for a parameter of shape {tuple(p.shape)}, which has been "
                "updated from the first and cannot be accumulated into any more: call optimizer.step() after every "
                "backward pass (reentrant checkpointing splits one: use_reentrant=False), or leave the option out"
            )
        if p in self._announced:
            self._waiting.add(p)
            return
        if _is_local(p):
            raise _not_reduced(p)
        if is_dtensor(p) and p.is_cpu and torch.accelerator.is_available():  # FSDP2 may still be copying it there
            torch.accelerator.current_stream().synchronize()
        self._update(p)
        p.grad = None

    def announce(self, params: Iterable[Tensor]) -> None:
        """Gradients of these are not final when their hooks run: they `arrive` later."""
        self._announced.update(params)

    def expects(self, p: Tensor) -> bool:
        """Whether backward has produced a gradient here that is still to arrive."""
        return p in self._waiting

    def postpone(self, p: Tensor) -> None:
        """A gradient that waits is final when backward ends; `step` updates from it."""
        self._waiting.discard(p)

    def arrive(self, p: Tensor, grad: Tensor) -> None:
        """Update a parameter that waits from its final gradient, which becomes ``p.grad`` until `step`."""
        p.grad = grad
        self._update(p)
        self._waiting.discard(p)

    # ----------------------------------------------------------------------------------------------------- step
    def step(self, given: Mapping[int, Any]) -> None:
        """What ``step()`` does: update from gradients that were set by hand, hook parameters that came, start anew.

        Raises:
            RuntimeError: conditions were given, which come too late; gradients never arrived.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        if table.TOTAL_NORM.value in given:
            raise RuntimeError("step(total_norm=…) comes when release_gradients has updated all: leave it out")
        if given:
            refuse_scaler()
        if self._waiting:
            raise _not_reduced(next(iter(self._waiting)))
        self.attach()
        for p in self._places:
            if p.grad is not None and p not in self._stepped:
                self._update(p)
            p.grad = None
        self.forget()

    def forget(self) -> None:
        """A step is done, or its gradients were dropped."""
        self._stepped.clear()
        self._waiting.clear()

    def leave(self) -> None:
        """State was replaced: the steps of all parameters are planned anew."""
        self._single.clear()
        self.forget()

    def _update(self, p: Tensor) -> None:
        optimizer = self._optimizer()
        assert optimizer is not None
        if capturing():
            raise RuntimeError(
                f"{NAME} does not work inside a CUDA graph: leave it out of an optimizer that is captured"
            )
        with _ONE_AT_A_TIME:
            if p not in self._single:
                self._single[p] = Single(optimizer, p, self._workers)
            self._single[p].update(*self._places[p])
        self._stepped.add(p)

    def _owns(self, optimizer: "FusedOptimizer", p: Tensor) -> bool:
        """Whether this is one of the optimizer's parameters, which may have been replaced."""
        if self._is_placed(optimizer, p):
            return True
        self.attach()
        return self._is_placed(optimizer, p)

    def _is_placed(self, optimizer: "FusedOptimizer", p: Tensor) -> bool:
        g, i = self._places.get(p, (-1, -1))
        groups = optimizer.param_groups
        return 0 <= g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is p


# --------------------------------------------------------------------------------------------------------- refusals
ALONE = ("amp_scaling", "norm_at_backward", "metrics")
"""Options of the whole optimizer that need all gradients at once."""


def checked(chosen: Mapping[str, Any]) -> bool:
    """The option's value.

    Raises:
        ValueError: another value, or with an option that needs all gradients at once.
    """
    value = chosen.get(NAME, False)
    if not isinstance(value, bool):
        raise ValueError(f"{NAME} must be True or False, got {value!r}")
    if value:
        for name in (name for name in ALONE if chosen.get(name)):
            raise ValueError(f"{name}={chosen[name]!r} needs all gradients at once, which {NAME}=True never has")
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


def _is_local(p: Tensor) -> bool:
    """Whether backward leaves a gradient of this process alone; FSDP2's DTensors have theirs reduced by then."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not is_dtensor(p)


def _not_reduced(p: Tensor) -> RuntimeError:
    return RuntimeError(
        f"{NAME}: the gradient of a parameter of shape {tuple(p.shape)} is this process's alone, in a "
        "torch.distributed process group of several; nothing was updated from it. Under DistributedDataParallel call "
        "fusedopt.release_under_ddp(model, optimizer) once before training, and step() only after a backward pass "
        "outside of no_sync(); elsewhere leave the option out"
    )
