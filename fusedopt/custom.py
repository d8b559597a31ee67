"""A rule of your own: `make_rule` builds one from three functions, `Optimizer` runs it.

``docs/your_own_rule.md`` builds one step by step; the contract of the functions stands in ``rule.py``.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import triton.language as tl

from fusedopt_kernels import numerics

from .arguments import check_lr, check_nonnegative
from .optimizer import FusedOptimizer
from .options import DEFAULTS, KEY, Options
from .rule import Rule, Slot

_TWINS: dict[Any, Any] = {
    numerics.one_minus_power: numerics.one_minus_power_eager,
    numerics.average_weight: numerics.average_weight_eager,
    numerics.exp: numerics.exp_eager,
    numerics.log: numerics.log_eager,
    numerics.power: numerics.power_eager,
}
"""What stands for a kernel's function when `scalars` runs on the host."""

_TL = SimpleNamespace(
    where=lambda condition, a, b: a if condition else b,
    sqrt=lambda x: np.float64(math.sqrt(x)) if x >= 0.0 else np.float64(math.nan),
    minimum=lambda a, b: min(a, b),
    maximum=lambda a, b: max(a, b),
    abs=abs,
)
"""What stands for ``triton.language`` there."""


def make_rule(
    name: str,
    scalars: Any,
    update: Any,
    reference: Callable[..., Any],
    *,
    hyper: Mapping[str, float] | None = None,
    state: Iterable[Slot] = (),
    **more: Any,
) -> Rule:
    """A `Rule` from three functions; see ``rule.py`` for what each takes and returns.

    Args:
        name: of the rule, in messages and file names.
        scalars: ``@triton.jit``, ``(hyper, t) → numbers`` in float64 with ``hyper = (lr, weight_decay, *hyper)``. It
            runs on the device and, as plain Python, on the host: arithmetic, ``tl.where``, ``tl.sqrt``,
            ``tl.minimum``, ``tl.maximum``, ``tl.abs`` and the scalar functions of ``fusedopt_kernels.numerics``.
        update: ``@triton.jit``, ``(g, p, state, s, VARIANT, EXACT) → (descent, new_state)``, one block of elements.
        reference: the same in eager form, ``(g, p, state, s, VARIANT) → (descent, new_state)``, on values that
            know ``+ - * /``, comparisons, ``.sqrt()``, ``.abs()``, ``.sign()`` (``fusedopt.values`` has
            ``where_eager``, ``minimum_eager``, ``maximum_eager``). ``fusedopt verify`` compares it with ``update``.
        hyper: hyper-parameters beyond lr and weight_decay, with their defaults; each becomes a group key.
        state: slots of ``optimizer.state[p]``.
        more: further fields of `Rule` (decay, structure, n_norms, measure, measure_eager, grad_norm, defaults …).

    Raises:
        TypeError: functions that are not of the kind named above.
        ValueError: more state, hyper-parameters or scalars than a row of the segment table holds.
    """
    for what, function in (("scalars", scalars), ("update", update)):
        if not hasattr(function, "fn"):
            raise TypeError(f"make_rule: {what} must be decorated with @triton.jit, got {function!r}")
    if not callable(reference) or hasattr(reference, "fn"):
        raise TypeError(f"make_rule: reference must be a plain Python function, got {reference!r}")
    hyper, slots = dict(hyper or {}), tuple(state)
    taken = {"params", "lr", "weight_decay", "maximize", "backend", KEY, *DEFAULTS}
    if clash := sorted(taken & {*hyper, *more.get("defaults", {})}):
        raise ValueError(
            f"make_rule: {clash[0]!r} means something to every optimizer; give the hyper-parameter another name"
        )
    eager = _on_host(scalars.fn)
    rule = Rule(
        name=name,
        hyper=tuple(hyper),
        state=slots,
        n_scalars=0,
        scalars=scalars,
        scalars_eager=eager,
        update=update,
        update_eager=reference,
        **{**more, "defaults": {**hyper, **more.get("defaults", {})}},
    )
    object.__setattr__(rule, "n_scalars", _count(rule, tuple(hyper.values())))
    rule.__post_init__()
    return rule


def _on_host(function: FunctionType) -> Callable[..., Any]:
    """The Python function with host twins in the place of the kernels' functions, on float64 numbers."""
    names = {k: _TL if v is tl else _twin(v) for k, v in function.__globals__.items()}
    twin = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)

    def scalars(hyper: tuple[float, ...], t: float, *more: Any) -> Any:
        with np.errstate(all="ignore"):
            return twin(tuple(map(np.float64, hyper)), np.float64(t), *more)

    return scalars


def _twin(value: Any) -> Any:
    try:
        return _TWINS.get(value, value)
    except TypeError:  # not hashable, so not one of ours
        return value


def _count(rule: Rule, hyper: tuple[float, ...]) -> int:
    """How many numbers ``scalars`` returns."""
    state = tuple(1.0 for _ in rule.scalar_slots)
    more = (*((state,) if state else ()), *((1.0,) if rule.grad_norm else ()))
    returned = rule.scalars_eager((1e-3, 0.0, *hyper), 1.0, *more)
    return len(returned[0] if state else returned)


class Optimizer(FusedOptimizer):
    """Runs any `Rule`: one of your own (`make_rule`) or one of the library's (``fusedopt.rules.adamw.RULE``).

    Args:
        params: parameters, named parameters or groups, as torch.optim takes them.
        rule: what to run. To pickle the optimizer, keep the rule in a variable of a module.
        lr: learning rate, float or one-element tensor; default 1e-3. weight_decay: default 0; the rule says whether it
            is coupled (L2) or decoupled. maximize: ascend.
        more: the rule's own hyper-parameters and switches, and the options of every optimizer (`fusedopt.Options`).

    Raises:
        TypeError: a keyword that is neither, or a hyper-parameter without default that is missing.
    """

    rule: Rule  # pyright: ignore[reportIncompatibleVariableOverride] # the one class whose instances differ in it

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule,
        lr: float | torch.Tensor = 1e-3,
        weight_decay: float | torch.Tensor = 0.0,
        *,
        maximize: bool = False,
        **more: Any,
    ) -> None:
        if not isinstance(rule, Rule):
            raise TypeError(f"rule must be a fusedopt.Rule (see fusedopt.make_rule), got {rule!r}")
        check_lr(lr, foreach=None, capturable=True)
        check_nonnegative("weight_decay", weight_decay)
        if rule.kernel_part is not None:
            raise TypeError(f"rule {rule.name!r} is a matrix rule with a class of its own: use that")
        own = {key.partition(".")[0] for key in rule.hyper} | set(rule.structure) | set(rule.defaults)
        own |= {s.init for s in rule.state if isinstance(s.init, str)} - {"zeros", "param", "lr"}
        hyper = {**rule.defaults, **{key: more.pop(key) for key in list(more) if key in own}}
        if missing := sorted(own - hyper.keys()):
            raise TypeError(f"rule {rule.name!r} needs {', '.join(missing)}: pass it by keyword")
        self.rule = rule
        chosen: Options = more  # pyright: ignore[reportAssignmentType] # checked by the base class
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, maximize=maximize, **hyper), **chosen)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule": self.rule}
