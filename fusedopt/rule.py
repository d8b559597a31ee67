"""The contract of an update rule. Read this first.

A rule is element-wise and touches no memory: values in, values out, no pointer, mask, offset, dtype or program id.
It is written twice, once for kernels (``@triton.jit``) and once in eager PyTorch right below, with the same lines
and the same variable names; the engine does everything else (launches, formats, clipping, decay, checkpoints).

``scalars(hyper, t)``
    Numbers that are the same for a whole parameter, in float64: ``hyper = (lr, weight_decay, *Rule.hyper)``, ``t``
    the step count after this step. Only add, mul, div and ``numerics``' functions, so that both twins agree in
    every bit. Returns a tuple of ``Rule.n_scalars`` numbers.
``update(g, p, state, s, VARIANT, EXACT)``
    One block of elements: transformed gradient, parameter, tuple of state values, tuple of scalars. Returns
    ``(descent, new_state)``; the engine sets ``p ← p − (descent + decay·p)``, rounding once. ``VARIANT`` is the tuple
    of structural switches (`Rule.structure`), ``EXACT`` is handed to ``numerics.div`` and ``numerics.sqrt``; the
    eager twin has no EXACT, its division and root always are.
    An eager twin is called with placeholders (``values.py``) and written down, so it must not ask what a block
    holds; its scalars are NumPy numbers of the compute type, which round as the kernel's do.
``measure(g, p, state, s, VARIANT, EXACT)``
    Only for rules with per-tensor reductions: a tuple of ``Rule.n_norms`` values whose L2 norms over the whole
    parameter are appended to ``s`` when ``update`` is called.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fusedopt_kernels import table


@dataclass(frozen=True)
class Slot:
    """One entry of ``optimizer.state[p]``.

    name: torch's key. kind: only ``signed`` and ``nonnegative`` slots may be quantised; ``weight`` slots follow the
    weights' precision. init: ``"zeros"``, ``"param"`` (a copy of the parameter) or a hyper-parameter's name (its
    value). shape: ``"param"`` (the parameter's) or ``"scalar"`` (0-dim; refused until kernels read it). when: the
    group key that must be non-zero for the slot to exist, or None.
    """

    name: str
    kind: Literal["signed", "nonnegative", "weight", "scalar"]
    init: str = "zeros"
    shape: Literal["param", "scalar"] = "param"
    when: str | None = None

    def __post_init__(self) -> None:
        if self.kind == "scalar" or self.shape == "scalar":
            raise NotImplementedError(f"slot {self.name!r}: scalar state is part of the contract but not built yet")


@dataclass(frozen=True)
class Rule:
    """An update rule; see the module's text for the four functions.

    hyper: group keys that ``scalars`` takes after lr and weight_decay, ``"betas.0"`` for an entry of a tuple.
    structure: group keys whose truth selects a compiled variant (amsgrad, nesterov, momentum ≠ 0 …).
    decay: ``"coupled"`` (L2, into the gradient), ``"decoupled"`` (lr·weight_decay·p, from the parameter) or
    ``"own"`` (the rule does it); a group's ``decoupled_weight_decay`` key, where torch has one, overrides it.
    counts_in_state: whether torch keeps ``step`` in this rule's state.
    """

    name: str
    hyper: tuple[str, ...]
    state: tuple[Slot, ...]
    n_scalars: int
    scalars: Any
    scalars_eager: Callable[..., tuple[float, ...]]
    update: Any
    update_eager: Callable[..., Any]
    structure: tuple[str, ...] = ()
    decay: Literal["coupled", "decoupled", "own"] = "coupled"
    counts_in_state: bool = True
    n_norms: int = 0
    measure: Any = None
    measure_eager: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        for what, have, room in (
            ("state slots", len(self.state), table.MAX_SLOTS),
            ("hyper-parameters", len(self.hyper), table.HYPER_WIDTH.value - table.RULE_HYPERS.value),
            ("scalars", self.n_scalars, table.SCALAR_WIDTH.value - table.RULE_SCALARS.value),
        ):
            if have > room:  # the next segment's row would be overwritten
                raise ValueError(f"rule {self.name!r} has {have} {what}; a row of the segment table holds {room}")

    def variant(self, group: Mapping[str, Any]) -> tuple[bool, ...]:
        """Structural switches of a group; a tensor counts as on, since its value may change on the device."""
        return tuple(switched_on(group[key]) for key in self.structure)

    def slots(self, group: Mapping[str, Any]) -> tuple[Slot, ...]:
        """Parameter-shaped slots that exist under a group's options."""
        return tuple(s for s in self.state if s.when is None or switched_on(group[s.when]))

    def decoupled(self, group: Mapping[str, Any]) -> bool:
        """Whether weight decay acts on the parameter directly under a group's options."""
        return bool(group.get("decoupled_weight_decay", self.decay == "decoupled")) and self.decay != "own"

    def hypers(self, group: Mapping[str, Any]) -> tuple[Any, ...]:
        """(lr, weight_decay, *hyper) of a group, as floats or tensors."""
        return (group["lr"], group.get("weight_decay", 0.0), *(lookup(group, key) for key in self.hyper))


def switched_on(value: Any) -> bool:
    """Truth of a structural option; tensors are on whatever they hold."""
    return True if isinstance(value, torch.Tensor) else bool(value)


def lookup(group: Mapping[str, Any], key: str) -> Any:
    name, _, index = key.partition(".")
    return group[name][int(index)] if index else group[name]
