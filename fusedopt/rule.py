"""The contract of an update rule. Read this first.

A rule is element-wise and touches no memory: values in, values out, no pointer, mask, offset, dtype or program id.
It is written twice, once for kernels (``@triton.jit``) and once in eager PyTorch right below, with the same lines
and the same variable names; the engine does everything else (launches, formats, clipping, decay, checkpoints).

``scalars(hyper, t)``
    Numbers that are the same for a whole parameter, in float64: ``hyper = (lr, weight_decay, *Rule.hyper)``, ``t``
    the step count after this step. Only add, mul, div and ``numerics``' functions, so that both twins agree in
    every bit. Returns a tuple of ``Rule.n_scalars`` numbers; one more is the share of p that decoupled weight decay
    takes off, in the place of lr·weight_decay.
``scalars(hyper, t, state)``, ``scalars(hyper, t, state, norm)``
    The forms of a rule with scalar slots, which takes their values and returns ``(numbers, new_state)``, and of one
    with ``Rule.grad_norm``, which also takes the L2 norm of the parameter's gradient (unscaled and clipped).
``update(g, p, state, s, VARIANT, EXACT)``
    One block of elements: transformed gradient, parameter, tuple of state values, tuple of scalars. Returns
    ``(descent, new_state)``; the engine sets ``p ← p − (descent + decay·p)``, rounding once. ``VARIANT`` is the tuple
    of structural switches (`Rule.structure`), ``EXACT`` is handed to ``numerics.div`` and ``numerics.sqrt``; the
    eager twin has no EXACT, its division and root always are.
    An eager twin is called with placeholders (``values.py``) and written down, so it must not ask what a block
    holds; its scalars are NumPy numbers of the compute type, which round as the kernel's do.
``measure(g, p, state, s, VARIANT, EXACT)``
    Only for rules with per-tensor reductions: a tuple of ``Rule.n_norms`` values whose L2 norms over the whole
    parameter are appended to ``s`` when ``update`` is called, and after them the number of elements.
"""

import importlib
import pickle
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from fusedopt_kernels import table


@dataclass(frozen=True)
class Slot:
    """One entry of ``optimizer.state[p]``.

    name: torch's key. kind: only ``signed`` and ``nonnegative`` slots may be quantised; ``weight`` slots follow the
    weights' precision; a ``scalar`` is one number for the parameter (0-dim, fp32; fp64 under a float64 default
    dtype), which ``scalars`` reads and renews. Scalars come last. init: ``"zeros"``, ``"param"`` (a copy of the
    parameter), a hyper-parameter's name (its value) or a number. when: the group key that must be non-zero for the
    slot to exist, or None. wide: a scalar that is fp64 always (sums over many steps, numbers of fp64 parameters).
    shape: for matrix rules, gives the slot's shape for a parameter, or None where it has no such slot; without it a
    slot is like the parameter.
    """

    name: str
    kind: Literal["signed", "nonnegative", "weight", "scalar"]
    init: str | float = "zeros"
    when: str | None = None
    wide: bool = False
    shape: Callable[[torch.Tensor], tuple[int, ...] | None] | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("signed", "nonnegative", "weight", "scalar"):
            raise ValueError(
                f"slot {self.name!r}: kind must be signed, nonnegative, weight or scalar, got {self.kind!r}"
            )
        if self.name in ("step", "update_mask", "param_residual", "master_param", "ema", "ema_step"):
            raise ValueError(f"slot {self.name!r}: the engine keeps something else under this name; choose another")


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule; see the module's text for the four functions.

    hyper: group keys that ``scalars`` takes after lr and weight_decay, ``"betas.0"`` for an entry of a tuple.
    structure: group keys whose truth selects a compiled variant (amsgrad, nesterov, momentum ≠ 0 …).
    decay: ``"coupled"`` (L2, into the gradient), ``"decoupled"`` (lr·weight_decay·p, from the parameter) or
    ``"own"`` (the rule does it); a group's ``decoupled_weight_decay`` key, where torch has one, overrides it.
    decoupled_key: the group key that does so, where its authors named it otherwise.
    counts_in_state: whether torch keeps ``step`` in this rule's state.
    grad_norm: whether ``scalars`` takes the norm of the parameter's gradient.
    measures: whether norms of parameters and updates can be measured (metrics).
    cautious: whether the descent is a step against the gradient, so that a cautious mask has a meaning.
    kernel_part, eager_part: for matrix rules, the classes that run their steps in the place of `DeviceTables` and
    `EagerStep`, or functions that return lists of such. small: where kernels depend on the shape, that of a small
    parameter that takes the same ones.
    sparse: ``"rows"`` if the rule takes sparse gradients as torch does, ``"only"`` if it takes no others, ``"lazy"`` if
    it takes them only under ``sparse="lazy"``, None if never.
    moves_all: group key that, when on, makes rows without a gradient move as well (momentum).
    subtracts: group key that, when on, makes the update subtract averages from each other, which must be exact then.
    defaults: values of hyper-parameters and switches that `Optimizer` fills in.
    """

    name: str
    hyper: tuple[str, ...]
    state: tuple[Slot, ...]
    n_scalars: int
    scalars: Any
    scalars_eager: Callable[..., Any]
    update: Any
    update_eager: Callable[..., Any]
    structure: tuple[str, ...] = ()
    decay: Literal["coupled", "decoupled", "own"] = "coupled"
    decoupled_key: str = "decoupled_weight_decay"
    counts_in_state: bool = True
    n_norms: int = 0
    measure: Any = None
    measure_eager: Callable[..., Any] | None = None
    grad_norm: bool = False
    cautious: bool = True
    measures: bool = True
    sparse: Literal["rows", "only", "lazy"] | None = None
    moves_all: str | None = None
    subtracts: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    kernel_part: Any = None
    eager_part: Any = None
    small: Callable[[torch.Tensor], tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        kinds = [slot.kind == "scalar" for slot in self.state]
        if kinds != sorted(kinds):
            raise ValueError(f"rule {self.name!r}: scalar slots come after all others")
        for what, have, room in (
            ("state slots", len(self.state), table.MAX_SLOTS),
            ("hyper-parameters", len(self.hyper), table.HYPER_WIDTH.value - table.RULE_HYPERS.value),
            ("scalars", self.n_scalars, table.SCALAR_WIDTH.value - table.RULE_SCALARS.value),
        ):
            if have > room:  # the next segment's row would be overwritten
                raise ValueError(f"rule {self.name!r} has {have} {what}; a row of the segment table holds {room}")

    def __deepcopy__(self, memo: Any) -> "Rule":
        return self

    def __reduce__(self) -> Any:
        """Rules are pickled by name: compiled functions have no other form."""
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if value is self:
                    return _named, (module.__name__, name)
        raise pickle.PicklingError(f"rule {self.name!r} is not a variable of any module; keep it in one to pickle it")

    def variant(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        """Structural switches of a group; a tensor counts as on, since its value may change on the device."""
        return tuple(switched_on(group[key]) for key in self.structure)

    def slots(self, group: Mapping[str, Any]) -> tuple[Slot, ...]:
        """Parameter-shaped slots that exist under a group's options."""
        return tuple(s for s in self.state if s.kind != "scalar" and (s.when is None or switched_on(group[s.when])))

    @property
    def scalar_slots(self) -> tuple[Slot, ...]:
        """Slots that hold one number."""
        return tuple(s for s in self.state if s.kind == "scalar")

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        """Whether weight decay acts on the parameter directly under a group's options."""
        return bool(group.get(self.decoupled_key, self.decay == "decoupled")) and self.decay != "own"

    def hypers(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """(lr, weight_decay, *hyper) of a group, as floats or tensors."""
        return (group["lr"], group.get("weight_decay", 0.0), *(lookup(group, key) for key in self.hyper))


def _named(module: str, name: str) -> Rule:
    return getattr(importlib.import_module(module), name)


def switched_on(value: Any) -> bool:
    """Truth of a structural option; tensors are on whatever they hold."""
    return True if isinstance(value, torch.Tensor) else bool(value)


def lookup(group: Mapping[str, Any], key: str) -> Any:
    """A group's value of a hyper-parameter; None (left out) is 0."""
    name, _, index = key.partition(".")
    value = group[name][int(index)] if index else group[name]
    return 0.0 if value is None else value
