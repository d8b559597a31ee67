"""`FusedOptimizer`: the torch.optim face of every rule. What a step works on is in ``plan.py``."""

import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from fusedopt_kernels import launch

from . import buffers, checkpoint, compiled, flatten, options
from .arguments import check_backend, check_flags, check_total_norm
from .groups import GroupOptions
from .options import Options
from .parts import Parts
from .plan import Plan, Segment
from .rule import Rule
from .state import MASK, init_state
from .upload import capturing
from .warmup import compile_variants

_LAUNCHER = launch.Launcher()


class FusedOptimizer(torch.optim.Optimizer):
    """Base of all optimizers here: a `Rule` run in a fixed number of launches over all parameters.

    Drops in for torch.optim: group keys, state keys, hooks, closures and checkpoints are torch's. Nothing is
    allocated, flattened or cached by object at construction; parameters, groups, gradients and state may be
    replaced between steps.

    defaults: the group keys of torch's namesake. chosen: the options that every optimizer here takes, see `Options`;
    a group may give its own (except backend).
    """

    rule: ClassVar[Rule]
    backend: str = "auto"
    _plan: Plan | None = None
    _parts: Parts
    _total_norm: float | Tensor | None = None
    _launcher: launch.Launcher = _LAUNCHER

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], **chosen: Unpack[Options]) -> None:
        self.backend = chosen.get("backend", "auto")
        check_backend(self.backend)
        self._options = options.given(type(self).__name__, chosen)
        self._counters: dict[Tensor, Tensor] = {}
        self._handle = compiled.handle_of(self)
        self._forget_plan()
        self._captures: list[tuple[Plan, Parts]] = []
        super().__init__(params, defaults)
        check_flags(defaults.get("foreach"), defaults.get("fused"), defaults.get("differentiable"))

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """The rule that updates a group's parameters."""
        return self.rule

    def defaults_of(self, group: dict[str, Any]) -> dict[str, Any]:
        """Group keys of that rule, with their defaults."""
        return self.defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options of ours among its keys hold for it alone.

        Raises:
            ValueError: an option that its rule cannot follow; nothing is added then.
        """
        if isinstance(param_group, dict):
            if "backend" in param_group:
                raise ValueError("backend belongs to the whole optimizer: pass it to the constructor, not in a group")
            chosen = options.of_group({**self.defaults, **param_group}, self._options)
            whole = {**self.defaults, **{k: v for k, v in param_group.items() if k not in options.DEFAULTS}}
            options.check(self.rule_of(whole), whole, chosen)
            for name in options.DEFAULTS:
                param_group.pop(name, None)
            if chosen:
                param_group[options.KEY] = chosen
        super().add_param_group(param_group)

    @property
    def _tables(self) -> list[Any]:
        """Parts of the present plan that run kernels."""
        return [] if self._plan is None else self._parts.tables

    @property
    def _eager(self) -> list[Any]:
        """Parts of the present plan that run twins."""
        return [] if self._plan is None else self._parts.eager

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
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_total_norm(total_norm)
        if torch.compiler.is_compiling():
            if total_norm is not None:
                raise RuntimeError("step(total_norm=…) does not work under torch.compile: call it outside the graph")
            compiled.step(self)
        else:
            self._total_norm = total_norm
            try:
                with torch.no_grad():
                    self._step()
            finally:
                self._total_norm = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Gradients that share a buffer (`flatten_`) take one launch, not one each.

        Raises:
            RuntimeError: DistributedDataParallel put a gradient of `flatten_(grads=True)` into a bucket of its own.
        """
        if flatten.has_gradients:
            with torch.autograd.profiler.record_function(self._zero_grad_profile_name):
                flatten.zero_grad([p for group in self.param_groups for p in group["params"]], set_to_none)
        else:
            super().zero_grad(set_to_none)

    def _step(self, grads: list[Tensor] | None = None) -> None:
        """One step; ``grads`` stand in for the gradients of the parameters that have one, in their order."""
        if capturing():
            self._capture(grads)
            return
        plan, changed = self._plan, None
        if plan is not None and plan.refresh(self):
            changed = plan.changed_groups(self)
        if plan is None or changed is None:
            plan = self._build()
        elif changed:
            self._parts.set_hypers(changed)
        self._run(plan, grads)

    def _run(self, plan: Plan, grads: list[Tensor] | None) -> None:
        if grads is not None:
            plan.replace_gradients(grads)
        plan.pack()
        self._parts.run(plan, self._total_norm)
        plan.unpack()

    def _capture(self, grads: list[Tensor] | None) -> None:
        """A step that goes into a CUDA graph, with tables of its own that live as long as the optimizer.

        A replay reads the addresses that were captured, whatever later steps upload or rebuild.
        """
        plan = self._build()
        if self._parts.eager:
            raise RuntimeError("only Triton kernels can be captured in a CUDA graph: eager twins read from the device")
        if any(group.on_host for group in plan.groups):
            raise RuntimeError(
                "a hyper-parameter is a CPU tensor, whose changes a captured CUDA graph would not see; "
                "make it a tensor on the GPU, or a float to keep its value in the graph"
            )
        self._captures.append((plan, self._parts))
        self._run(plan, grads)
        self._forget_plan()

    def _forget_plan(self) -> None:
        """Drop the plan and everything it holds: state, packed parameters, device tables."""
        self._plan = None
        self.__dict__.pop("_parts", None)
        self._written: list[Tensor] = []

    def _build(self) -> Plan:
        """A new plan from what is there now, and its parts by device."""
        self._forget_plan()
        plan = Plan(self)
        self._parts = Parts(plan, self.backend, self._launcher)
        self._plan = plan
        if any(map(buffers.is_placed, plan.params)):
            self._written = flatten.bases(plan.params)
        return plan

    # --------------------------------------------------------------------------------------------------- state
    def materialize_state(self) -> None:
        """Create the state of every parameter that requires a gradient, without stepping."""
        plan_groups = [GroupOptions(self.rule_of(group), group) for group in self.param_groups]
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    init_state(self, Segment(p, index, 0), plan_groups[index])

    def set_update_mask(self, param: Tensor, mask: Tensor | None) -> None:
        """Let only some elements of a parameter change; its state follows the whole gradient all the same.

        Args:
            param: one of the optimizer's parameters.
            mask: bool, of the parameter's shape, True where it may change; a copy is kept in
                ``state[param]["update_mask"]`` and saved in checkpoints. None: every element may change again.

        Raises:
            ValueError: a tensor that is no parameter of this optimizer, or a mask of another shape or dtype.
        """
        if not any(p is param for group in self.param_groups for p in group["params"]):
            raise ValueError("set_update_mask: param is not one of this optimizer's parameters")
        if mask is None:
            self.state.get(param, {}).pop(MASK, None)
            return
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != param.shape:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"set_update_mask: mask must be a bool tensor of shape {tuple(param.shape)}, got {got}")
        self.state[param][MASK] = torch.empty_like(param.detach(), dtype=torch.bool).copy_(mask)

    def to(self, device: torch.device | str) -> "FusedOptimizer":
        """Move all state to a device, to free memory elsewhere; a step brings it back to its parameters."""
        for state in self.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.to(device)
        self._forget_plan()
        return self

    def warmup(self) -> tuple[int, float]:
        """Compile every kernel variant of the current groups; steps nothing and changes no state.

        Under torch.distributed every rank must call it: the lowest local rank compiles first, the others then find
        its results in Triton's cache. Returns (number of kernels made ready, seconds).
        """
        start = time.perf_counter()
        return compile_variants(self), time.perf_counter() - start

    # ---------------------------------------------------------------------------------------------- checkpoints
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of its torch.optim namesake; state keeps the dtypes it was saved with.

        Raises:
            ValueError: groups that do not match, or a file written by a newer format.
        """
        checkpoint.load(self, state_dict, super().load_state_dict)

    def __getstate__(self) -> dict[str, Any]:
        return {
            **super().__getstate__(),
            "backend": self.backend,
            "_counters": self._counters,
            "_options": self._options,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = dict(state["defaults"] if "defaults" in state else self.defaults)
        super().__setstate__(state)
        self.defaults = defaults  # torch adds `differentiable`, also to classes that do not know it
        self._forget_plan()
        self.__dict__.setdefault("_counters", {})
        self.__dict__.setdefault("_options", {})
        self.__dict__.setdefault("_captures", [])
        self._handle = compiled.handle_of(self)
        checkpoint.restore(self)
