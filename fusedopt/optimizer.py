"""`FusedOptimizer`: the torch.optim face of every rule. What a step works on is in ``plan.py``."""

import time
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor

from fusedopt_kernels import launch, numerics

from . import buffers, checkpoint, compiled, flatten, options
from .arguments import check_backend, check_flags
from .eager import EagerStep
from .groups import GroupOptions
from .options import Options
from .plan import Plan, Segment
from .rule import Rule
from .sparse import EagerRows, SparseTables
from .state import MASK, init_state
from .tables import DeviceTables
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
    _launcher: launch.Launcher = _LAUNCHER

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], **chosen: Unpack[Options]) -> None:
        self.backend = chosen.get("backend", "auto")
        check_backend(self.backend)
        self._options = options.given(type(self).__name__, chosen)
        self._counters: dict[Tensor, Tensor] = {}
        self._handle = compiled.handle_of(self)
        self._forget_plan()
        self._captures: list[tuple[Plan, list[DeviceTables]]] = []
        super().__init__(params, defaults)
        check_flags(defaults.get("foreach"), defaults.get("fused"), defaults.get("differentiable"))

    def rule_of(self, group: dict[str, Any]) -> Rule:
        """The rule that updates a group's parameters."""
        return self.rule

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; options of ours among its keys hold for it alone.

        Raises:
            ValueError: an option that its rule cannot follow; nothing is added then.
        """
        if isinstance(param_group, dict):
            chosen = options.of_group(param_group, self._options)
            whole = {**self.defaults, **{k: v for k, v in param_group.items() if k not in options.DEFAULTS}}
            options.check(self.rule_of(whole), whole, chosen)
            for name in options.DEFAULTS:
                param_group.pop(name, None)
            if chosen:
                param_group[options.KEY] = chosen
        super().add_param_group(param_group)

    # ---------------------------------------------------------------------------------------------------- step
    def _patch_step_function(self) -> None:
        """torch would wrap ``step`` of every class anew; the hooks run in the one below, once for every subclass."""
        self._zero_grad_profile_name = f"Optimizer.zero_grad#{type(self).__name__}.zero_grad"

    @torch.optim.Optimizer.profile_hook_step
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] # torch's overloads
        """One optimization step over every parameter that has a gradient; returns the closure's result.

        Args:
            closure: re-evaluates the model and returns the loss; called once, with gradients enabled.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            compiled.step(self)
        else:
            with torch.no_grad():
                self._step()
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
            for part in (*self._tables, *self._eager):
                part.set_hypers(changed)
        self._run(plan, grads)

    def _run(self, plan: Plan, grads: list[Tensor] | None) -> None:
        if grads is not None:
            plan.replace_gradients(grads)
        plan.pack()
        for tables in self._tables:
            tables.set_gradients(plan.grad_addresses)
            tables.run()
        for part in self._eager:
            part.run(plan.grads)
        plan.unpack()

    def _capture(self, grads: list[Tensor] | None) -> None:
        """A step that goes into a CUDA graph, with tables of its own that live as long as the optimizer.

        A replay reads the addresses that were captured, whatever later steps upload or rebuild.
        """
        plan = self._build()
        if self._eager:
            raise RuntimeError("only Triton kernels can be captured in a CUDA graph: eager twins read from the device")
        if any(group.on_host for group in plan.groups):
            raise RuntimeError(
                "a hyper-parameter is a CPU tensor, whose changes a captured CUDA graph would not see; "
                "make it a tensor on the GPU, or a float to keep its value in the graph"
            )
        self._captures.append((plan, self._tables))
        self._run(plan, grads)
        self._forget_plan()

    def _forget_plan(self) -> None:
        """Drop the plan and everything it holds: state, packed parameters, device tables."""
        self._plan = None
        self._tables: list[DeviceTables] = []
        self._eager: list[Any] = []
        self._written: list[Tensor] = []

    def _build(self) -> Plan:
        """A new plan from what is there now, and its parts by device."""
        self._forget_plan()
        plan = Plan(self)
        parts: dict[tuple[torch.device, Rule, bool], list[Segment]] = {}
        for segments, is_sparse in ((plan.segments, False), (plan.sparse, True)):
            for s in segments:
                parts.setdefault((s.weight.device, plan.groups[s.group].rule, is_sparse), []).append(s)
        for (device, rule, is_sparse), segments in parts.items():
            if self._runs_kernels(device):
                kind = SparseTables if is_sparse else rule.kernel_part or DeviceTables
                tables = kind(rule, segments, plan.groups, self._launcher)
                tables.set_hypers(range(len(plan.groups)))
                self._tables.append(tables)
            else:
                step = EagerRows if is_sparse else rule.eager_part or EagerStep
                self._eager.append(step(rule, segments, plan.groups))
        self._plan = plan
        if any(map(buffers.is_placed, plan.params)):
            self._written = flatten.bases(plan.params)
        return plan

    def _runs_kernels(self, device: torch.device) -> bool:
        if device.type == "cpu" and self.backend == "triton" and not self._launcher.accepts_cpu:
            raise RuntimeError(
                "backend='triton' on CPU tensors needs the interpreter: set TRITON_INTERPRET=1 in the environment "
                "before Python starts, move the parameters to a GPU, or use backend='eager'"
            )
        kernels = self.backend == "triton" or (self.backend == "auto" and device.type == "cuda")
        if kernels and device.type == "cuda" and numerics.INTERPRETED:
            raise RuntimeError(
                "kernels run in the interpreter (TRITON_INTERPRET=1), which cannot read GPU memory: unset the variable "
                "before Python starts, move the parameters to the CPU, or use backend='eager'"
            )
        return kernels

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
            self.state[param].pop(MASK, None)
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
        super().__setstate__(state)
        self._forget_plan()
        self.__dict__.setdefault("_counters", {})
        self.__dict__.setdefault("_options", {})
        self.__dict__.setdefault("_captures", [])
        self._handle = compiled.handle_of(self)
        checkpoint.restore(self)
