"""`FusedOptimizer`: the torch.optim face of every rule. What a step works on is in ``plan.py``."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Unpack

import torch
from torch import Tensor

from . import checkpoint, compiled, flatten, formats, offload, options, ranks, release, source
from .arguments import check_backend, check_flags, own
from .average import ema_parameters, refuse_swapped, swap_ema
from .captures import refresh
from .conditions import Conditions
from .groups import GroupOptions
from .metrics import Metrics, collect
from .options import Options
from .stateful import Stateful
from .warmup import compile_variants


class FusedOptimizer(Stateful):
    """Base of all optimizers here: a `Rule` run in a fixed number of launches over all parameters.

    Drops in for torch.optim: group keys, state keys, hooks, closures and checkpoints are torch's. Nothing is
    allocated, flattened or cached by object at construction; parameters, groups, gradients and state may be
    replaced between steps.

    defaults: the group keys of torch's namesake. chosen: the options that every optimizer here takes, see `Options`;
    a group may give its own (except backend).
    """

    _step_supports_amp_scaling = False  # torch.amp.GradScaler reads it; False is the compatible choice

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], **chosen: Unpack[Options]) -> None:
        self.backend = chosen.get("backend", "auto")
        check_backend(self.backend)
        self._metrics = Metrics(chosen.get("metrics", ()))
        if not isinstance(amp_scaling := chosen.get("amp_scaling", False), bool):
            raise ValueError(f"amp_scaling must be True or False, got {amp_scaling!r}")
        self._norm_at_backward = source.checked(chosen.get("norm_at_backward", False), amp_scaling)
        self._release_gradients = release.checked(chosen)
        self._offload_state = offload.checked(chosen)
        self._norm_group = ranks.checked(chosen.get("norm_group"))
        # asked for its flag, a stock GradScaler shows itself; it would rewrite gradients behind the hooks
        self._step_supports_amp_scaling = amp_scaling or bool(self._norm_at_backward) or self._release_gradients
        self._options = options.given(type(self).__name__, chosen)
        self._counters: dict[Tensor, Tensor] = {}
        self._handle = compiled.handle_of(self)
        self._begin()
        super().__init__(params, defaults)
        options.check_effect(self._options, {x for group in self.param_groups for x in group.get(options.KEY, {})})
        check_flags(defaults.get("foreach"), defaults.get("fused"), defaults.get("differentiable"))
        if self._norm_at_backward:
            source.check_used([GroupOptions(self.rule_of(group), group) for group in self.param_groups], self._metrics)

    def _begin(self) -> None:
        super()._begin()
        self._release = release.Release(self) if self._release_gradients else None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options of ours among its keys hold for it alone.

        Raises:
            ValueError: an option that its rule or a parameter cannot follow; nothing is added then.
        """
        if isinstance(param_group, dict):
            if name := next((name for name in options.WHOLE if name in param_group), None):
                raise ValueError(
                    f"{name} belongs to the whole optimizer: pass it to the constructor, not in a group (for "
                    f"ZeroRedundancyOptimizer: optimizer_class=functools.partial({type(self).__name__}, {name}=...))"
                )
            chosen = options.of_group({**self.defaults, **param_group}, self._options)
            whole = {**self.defaults, **{k: v for k, v in param_group.items() if k not in options.DEFAULTS}}
            options.check(self.rule_of(whole), whole, chosen)
            chosen = options.without_useless(chosen, param_group)
            if "master_weights" in chosen and "params" in param_group:
                if isinstance(param_group["params"], Iterator):
                    param_group["params"] = list(param_group["params"])
                formats.check_weights(param_group["params"], chosen)
            if self._release_gradients:
                release.check_group(chosen)
            self._metrics.check(self.rule_of(whole))
            if chosen or any(options.KEY in group for group in self.param_groups[:1]):  # others agree with the first
                self._check_agreement({**whole, options.KEY: chosen})
            for name in options.DEFAULTS:
                param_group.pop(name, None)
            if chosen:
                param_group[options.KEY] = chosen
        super().add_param_group(param_group)
        if self._release is not None:
            self._release.attach()

    def _check_agreement(self, new: dict[str, Any]) -> None:
        """Refuse a group that disagrees with the others on the norm or on when a step is skipped."""
        added = GroupOptions(self.rule_of(new), new)
        others = (GroupOptions(self.rule_of(group), group) for group in self.param_groups)
        first = next(others, added)
        wanting = (
            first if first.wants_norm or not added.wants_norm else next((g for g in others if g.wants_norm), added)
        )
        Conditions([first, wanting, added])

    # ---------------------------------------------------------------------------------------------------- step
    def _patch_step_function(self) -> None:
        """torch would wrap ``step`` of every class anew; the hooks run in the one below, once for every subclass."""
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"

    @torch.optim.Optimizer.profile_hook_step
    def step(self, closure: Callable[[], Any] | None = None, *, total_norm: float | Tensor | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] # torch's overloads
        """One optimization step over every parameter that has a gradient; returns the closure's result.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.
            total_norm: norm of the gradients to clip by and to decide on skipping with, float or 0-dim tensor, when
                they are not all this optimizer's (several optimizers, pipeline stages); default: measured here.

        Raises:
            ValueError: total_norm without an option that uses it.
        """
        refuse_swapped(self, "step()")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            if total_norm is not None:
                raise RuntimeError("step(total_norm=…) does not work under torch.compile: call it outside the graph")
            if self._norm_at_backward or self._release_gradients:
                name = "norm_at_backward" if self._norm_at_backward else release.NAME
                raise RuntimeError(f"{name} does not work under torch.compile: call step() outside the graph")
            compiled.step(self)
        else:
            with torch.no_grad():
                self._step(total_norm=total_norm)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Gradients that share a buffer (`flatten_`) take one launch, not one each.

        Raises:
            RuntimeError: DistributedDataParallel put a gradient of `flatten_(grads=True)` into a bucket of its own.
        """
        for hooks in (own(self)._source, own(self)._release):
            if hooks is not None:
                hooks.forget()
        if flatten.has_gradients:
            with torch.autograd.profiler.record_function(self._zero_grad_profile_name):
                flatten.zero_grad([p for group in self.param_groups for p in group["params"]], set_to_none)
        else:
            super().zero_grad(set_to_none)

    def accumulate(self) -> AbstractContextManager[None]:
        """A context for every backward pass but the last before a step, when gradients are accumulated.

        Under ``norm_at_backward`` gradients are summed up after the last pass only; without it nothing differs.
        """
        if own(self)._release is not None:
            raise RuntimeError("accumulate(): release_gradients=True frees every gradient at once: leave one out")
        hooks = own(self)._source
        return nullcontext() if hooks is None else hooks.paused()

    def refresh(self) -> None:
        """Bring hyper-parameters that changed to the device, for captured steps.

        A replay of a CUDA graph reads lr, betas, weight decay and thresholds from the device: tensors as they are when
        it runs, floats as they were at the last step outside of the graph or the last ``refresh()``, whichever came
        later. Call it on the stream that replays, after a scheduler or you changed a float and before the replay; and
        before a capture. It copies asynchronously and only what changed; gradients, state and counts are not touched.

        Raises:
            RuntimeError: a change that needs other kernels or state than a captured step has.
        """
        refresh(own(self))

    def metrics(self, per: str = "model") -> dict[str, Tensor]:
        """Numbers about the last step by name, 0-dim float64 tensors on its device; nothing waits for the device.

        See `fusedopt.metrics.collect` for the names. Those that the option ``metrics`` asks for are measured; others
        are there when the step has them anyway. Counts start with the optimizer and are not saved.

        Args:
            per: ``"model"``; ``"group"`` or ``"tensor"`` for names such as ``"grad_norm/0"`` (index of the group) or
                ``"grad_norm/0.3"`` (group and index in it; the parameter's name where the optimizer was given names).

        Raises:
            RuntimeError: there was no step yet. ValueError: another ``per``.
        """
        return collect(own(self), per)

    def warmup(self, *, scaled: bool = False) -> tuple[int, float]:
        """Compile every kernel variant of the current groups; steps nothing and changes no state.

        scaled: those of steps under a GradScaler (`fusedopt.GradScaler`, or torch's with ``amp_scaling=True``).

        Under torch.distributed every rank must call it: the lowest local rank compiles first, the others then find
        its results in Triton's cache. Returns (number of kernels made ready, seconds).
        """
        start = time.perf_counter()
        return compile_variants(own(self), scaled), time.perf_counter() - start

    # -------------------------------------------------------------------------------------------- weight average
    def ema_parameters(self) -> list[Tensor]:
        """Running averages of the weights (option ``ema_decay``), in the order of the parameters.

        Raises:
            RuntimeError: no group has ``ema_decay``.
        """
        return ema_parameters(self)

    def swap_ema(self) -> AbstractContextManager[None]:
        """A context in which the parameters hold their averages, rounded to their dtype: for validation and saving.

        On exit the training weights return bit for bit. It takes memory for one more copy of the weights.

        Raises:
            RuntimeError: no group has ``ema_decay``; contexts in one another; a step or a load inside.
        """
        return swap_ema(own(self))

    # ---------------------------------------------------------------------------------------------- checkpoints
    def __getstate__(self) -> dict[str, Any]:
        if self._offload_state:
            offload.finish()
        return {
            **super().__getstate__(),
            "backend": self.backend,
            "_counters": self._counters,
            "_options": self._options,
            "_metrics": self._metrics,
            "_norm_at_backward": self._norm_at_backward,
            "_release_gradients": self._release_gradients,
            "_offload_state": self._offload_state,
            "_norm_group": self._norm_group,
            "_step_supports_amp_scaling": self._step_supports_amp_scaling,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = dict(state["defaults"] if "defaults" in state else self.defaults)
        super().__setstate__(state)
        self.defaults = defaults  # torch adds `differentiable`, also to classes that do not know it
        if "_shared" in self.__dict__:  # torch's load_state_dict comes here too
            self._forget_plan()
        else:
            self._begin()
        self.__dict__.setdefault("_counters", {})
        self.__dict__.setdefault("_options", {})
        self._handle = compiled.handle_of(self)
        checkpoint.restore(self)
        if self._release is not None:
            self._release.attach()
