"""What an optimizer holds: its state made over tensors without memory, and added up."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

import fusedopt

from ..average import EMA
from ..encoded import keys, recognise
from ..formats import WEIGHTS
from ..optimizer import FusedOptimizer
from ..rule import Rule
from ..rules import RULES
from .share import WHOLE, Share

MASTERS = {form.key for form in WEIGHTS.values()}
"""State keys of what low-precision weights keep beside themselves."""


@dataclass(frozen=True)
class Memory:
    """Bytes that stay allocated from step to step, by what they are for.

    parameters, trainable: elements, all and those that require a gradient. tensors: parameters as torch counts them.
    weights, gradients: of the model. state: by slot of the rule (``exp_avg`` …), codes where it is quantised. scales:
    of those codes. masters: what keeps low-precision weights exact (fp32 copies, residuals). ema: averaged weights.
    counters: step counts and other single numbers. formats: state by slot and then by what it is kept in.

    Not counted: activations, buffers of the model, the kernels' tables, copies made for parameters with gaps.
    """

    parameters: int
    trainable: int
    tensors: int
    weights: int
    gradients: int
    state: Mapping[str, int] = field(default_factory=dict)
    scales: int = 0
    masters: int = 0
    ema: int = 0
    counters: int = 0
    formats: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def optimizer(self) -> int:
        """Bytes of everything but weights and gradients."""
        return sum(self.state.values()) + self.scales + self.masters + self.ema + self.counters

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return self.weights + self.gradients + self.optimizer

    def per_parameter(self, count: int | None = None) -> float:
        """Some of the bytes, by default all, over the number of parameters."""
        return (self.total if count is None else count) / self.parameters

    def as_json(self) -> dict[str, Any]:
        """Every field but the formats, the total and the bytes per parameter."""
        return {
            **{name: value for name, value in vars(self).items() if name != "formats"},
            "state": dict(self.state),
            "total": self.total,
            "bytes_per_parameter": self.per_parameter(),
        }


def estimate(
    params: torch.nn.Module | Iterable[Any],
    optimizer: str | type[FusedOptimizer] | Rule,
    *,
    grad_dtype: torch.dtype | None = None,
    **options: Any,
) -> Memory:
    """Count what training ``params`` by ``optimizer`` holds; nothing is allocated and nothing of yours is touched.

    Args:
        params: a module, or what optimizers take: parameters, named parameters or groups. On any device; a model that
            fits nowhere is built under ``torch.device("meta")``. Tied parameters count once.
        optimizer: a class of this package, the name of a rule such as ``"adamw"``, or a rule of your own.
        grad_dtype: of the gradients; default: each parameter's ``grad_dtype``, else its own dtype.
        options: of the optimizer, as its class takes them.

    Raises:
        TypeError: no optimizer of this package; a distributed tensor. ValueError: an unknown rule, no parameters,
        parameters not initialised yet, and whatever the class refuses.
    """
    cls, first = _class(optimizer)
    twins = Twins(params)
    return twins.count(cls(twins.groups, *first, **options), grad_dtype)


def _class(optimizer: Any) -> tuple[Any, tuple[Rule, ...]]:
    """The class to call and what it takes after the parameters."""
    if isinstance(optimizer, Rule):
        return fusedopt.Optimizer, (optimizer,)
    if isinstance(optimizer, str):
        if optimizer not in RULES:
            raise ValueError(f"optimizer: unknown rule {optimizer!r}; known: {', '.join(RULES)}")
        return getattr(fusedopt, RULES[optimizer]), ()
    if isinstance(optimizer, type) and issubclass(optimizer, FusedOptimizer):
        return optimizer, ()
    raise TypeError(f"optimizer must be a class of fusedopt, the name of a rule or a Rule, got {optimizer!r}")


class Twins:
    """Parameters without memory in the place of given ones, one for all those of a group that are alike.

    groups: of them, for an optimizer; a parameter that stands twice is taken once. order: the twin of every parameter
    that was given, group by group.

    Raises:
        TypeError, ValueError: see `estimate`.
    """

    def __init__(self, params: torch.nn.Module | Iterable[Any]) -> None:
        entries = list(params.named_parameters() if isinstance(params, torch.nn.Module) else params)
        groups = entries if entries and isinstance(entries[0], dict) else [{"params": entries}]
        self._copies: Counter[Tensor] = Counter()
        self._seen: set[int] = set()
        self.order: list[list[Tensor]] = []
        self.groups = [{**group, "params": self._of(group["params"])} for group in groups]
        if not self._copies:
            raise ValueError("params holds no parameter; give a module, parameters or groups that do")

    def _of(self, params: Any) -> list[Any]:
        """The twins of a group's parameters, with a name where they have one."""
        made: dict[Any, Tensor] = {}
        found: list[Any] = []
        self.order.append([])
        for entry in [params] if isinstance(params, Tensor) else params:
            p = entry[1] if isinstance(entry, tuple) else entry
            _check(p)
            if id(p) in self._seen:
                continue
            self._seen.add(id(p))
            grad_dtype = getattr(p, "grad_dtype", p.dtype)  # torch 2.10 has no such thing
            kind = (p.shape, p.stride(), p.dtype, p.requires_grad, grad_dtype)
            if kind not in made:
                made[kind] = cast([p], p.dtype)[0]
                if grad_dtype != p.dtype:
                    made[kind].grad_dtype = grad_dtype
                found.append((entry[0], made[kind]) if isinstance(entry, tuple) else made[kind])
            self._copies[made[kind]] += 1
            self.order[-1].append(made[kind])
        return found

    def count(self, optimizer: FusedOptimizer, grad_dtype: torch.dtype | None = None, share: Share = WHOLE) -> Memory:
        """What an optimizer over `groups` would hold for all that they stand for, or a rank for its share of it; makes
        its state. Weights and gradients of a rank: as `fully_shard` pads them, to what the fullest has.

        Raises:
            RuntimeError, TypeError, ValueError: a parameter that the options do not go with.
        """
        optimizer.materialize_state()
        held, padded = _Sums(share), share.fullest()
        owned = self._copies if share.owned is None else share.owned
        for group in optimizer.param_groups:
            for p in group["params"]:
                held.add(p, optimizer.state.get(p, {}), optimizer.rule_of(group), owned[p])
        held.counters += sum(owned[p] * counter.nbytes for p, counter in optimizer._counters.items())
        trainable = [(p, n) for p, n in self._copies.items() if p.requires_grad]
        return Memory(
            parameters=sum(n * share.numel(p) for p, n in self._copies.items()),
            trainable=sum(n * share.numel(p) for p, n in trainable),
            tensors=self._copies.total(),
            weights=sum(n * padded.numel(p) * p.itemsize for p, n in self._copies.items()),
            gradients=sum(n * padded.numel(p) * _grad_dtype(p, grad_dtype).itemsize for p, n in trainable),
            **held.fields(),
        )


def _check(p: Any) -> None:
    if not isinstance(p, Tensor):
        raise TypeError(f"params holds a {type(p).__name__}, where a parameter should stand")
    if not p.is_leaf:
        raise ValueError("params holds a tensor that was computed from others, not a parameter")
    if is_lazy(p):
        raise ValueError("params holds a parameter that is not initialised yet: run the model once first")
    if hasattr(p, "to_local"):
        raise TypeError("params holds a DTensor; give the model before it is sharded")


def cast(params: Iterable[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Meta tensors like the parameters, but in another dtype; complex ones stay as they are."""
    return [
        torch.nn.Parameter(
            torch.empty_like(p.detach(), dtype=p.dtype if p.is_complex() else dtype, device="meta"),
            requires_grad=p.requires_grad,
        )
        for p in params
    ]


def _grad_dtype(p: Tensor, given: torch.dtype | None) -> torch.dtype:
    return given or getattr(p, "grad_dtype", None) or p.dtype


class _Sums:
    """State added up, by what it is for."""

    def __init__(self, share: Share) -> None:
        self._share = share
        self.formats: dict[str, Counter[str]] = {}
        self.scales = self.masters = self.ema = self.counters = 0

    def fields(self) -> dict[str, Any]:
        """Of a `Memory`."""
        rest = {name: getattr(self, name) for name in ("scales", "masters", "ema", "counters")}
        formats = {slot: dict(held) for slot, held in self.formats.items()}
        return {"state": {slot: sum(held.values()) for slot, held in formats.items()}, "formats": formats, **rest}

    def add(self, p: Tensor, state: Mapping[str, Any], rule: Rule, copies: int) -> None:
        """The state of a parameter that stands for ``copies``."""
        coded = {keys(slot.name)[0]: slot for slot in rule.state}
        scales = {keys(slot.name)[1] for slot in rule.state}
        numbers = {"step", "ema_step", *(slot.name for slot in rule.scalar_slots)}
        for key, value in state.items():
            if not isinstance(value, Tensor):
                continue
            bytes_ = copies * self._share.numel(value) * value.itemsize
            if key in numbers:
                self.counters += bytes_
            elif key in scales:
                self.scales += bytes_
            elif key in MASTERS:
                self.masters += bytes_
            elif key == EMA:
                self.ema += bytes_
            else:
                slot = coded.get(key)
                form = str(value.dtype)[6:] if slot is None else recognise(dict(state), slot, p.shape).name
                self.formats.setdefault(key if slot is None else slot.name, Counter())[form] += bytes_
