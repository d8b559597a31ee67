"""Compile every variant that a step would use, on small stand-ins for the real tensors."""

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from fusedopt_kernels import table

from .encoded import keys
from .formats import SMALLEST, is_quantised
from .options import KEY
from .rule import Rule
from .source_sums import prepare
from .state import MASK

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


def compile_variants(optimizer: "FusedOptimizer", scaled: bool) -> int:
    """Number of kernels made ready; see `FusedOptimizer.warmup`."""
    distributed = dist.is_available() and dist.is_initialized()
    first = True
    if distributed:
        # documented, but not re-exported for type checkers
        local_rank: Any = dist.get_node_local_rank  # pyright: ignore[reportPrivateImportUsage]
        first = local_rank(fallback_rank=dist.get_rank()) == 0
    if distributed and not first:
        dist.barrier()
    try:
        return _compile(optimizer, scaled)
    finally:  # also when it fails: the others wait
        if distributed and first:
            dist.barrier()


def _compile(optimizer: "FusedOptimizer", scaled: bool) -> int:
    shadow = _shadow(optimizer)
    with torch.no_grad():
        shadow._build()
    ready = 0 if shadow._source is None or shadow._plan is None else prepare(shadow._plan, shadow._parts)
    given: list[dict[int, Any]] = [{}]
    if scaled:
        given = [{table.GRAD_SCALE.value: 1.0, table.CHECK.value: 1.0}]
        if optimizer._step_supports_amp_scaling:
            given.append({table.GRAD_SCALE.value: 1.0, table.FOUND_INF.value: 0.0})
    ready += sum(map(shadow._parts.prepare, given))
    if any(KEY in group and "ema_decay" in group[KEY] for group in shadow.param_groups):
        for p in (p for group in shadow.param_groups for p in group["params"]):
            p.grad = None  # averages of parameters without a gradient take kernels of their own
        with torch.no_grad():
            shadow._build()
        ready += shadow._parts.prepare({})
    return ready


def _shadow(optimizer: "FusedOptimizer") -> "FusedOptimizer":
    """An optimizer of the same class and options whose parameters are small stand-ins."""
    shadow = object.__new__(type(optimizer))
    groups: list[dict[str, Any]] = []
    stand_ins: list[tuple[Tensor, dict[str, Any]]] = []
    reals: dict[Tensor, Tensor] = {}
    for group in optimizer.param_groups:
        members, rule = [], optimizer.rule_of(group)
        for p in group["params"]:
            if p.requires_grad:
                members.append(_stand_in(p, rule, group.get(KEY, {})))
                reals[members[-1]] = p
                stand_ins.append((members[-1], _small_state(optimizer.state.get(p, {}), members[-1], rule)))
        groups.append({**group, "params": members})
    state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
    state.update({p: s for p, s in stand_ins if s})
    own = {"_offload_state": False, "state": state, "param_groups": groups, "_counters": {}}
    shadow.__setstate__({**optimizer.__getstate__(), **own})
    shadow._launcher, shadow._stand_ins = optimizer._launcher, reals
    return shadow


def _shape(p: Tensor, rule: Rule, chosen: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of a small parameter that takes the same kernels."""
    if rule.small:
        return rule.small(p)
    if is_quantised(p, chosen, rule):  # no smaller one would be, and rows are whole groups or not
        length = 1 if p.shape[1:].numel() % table.SCALE_GROUP else table.SCALE_GROUP
        return (SMALLEST // length, length, *(1,) * (p.dim() - 2))
    return (1,) * p.dim()


def _stand_in(p: Tensor, rule: Rule, chosen: Mapping[str, Any]) -> Tensor:
    shape = _shape(p, rule, chosen)
    small = torch.zeros(shape, dtype=p.dtype, device=p.device, requires_grad=True)
    if p.grad is not None and p.grad.layout == torch.sparse_coo:
        row = torch.zeros((1, 1), dtype=torch.int64, device=p.device)
        values = torch.ones((1, *shape[1:]), dtype=p.grad.dtype, device=p.device)
        small.grad = torch.sparse_coo_tensor(row, values, shape, check_invariants=True)
        return small
    dtype = p.grad.dtype if p.grad is not None else getattr(p, "grad_dtype", None) or p.dtype
    if dtype != p.dtype:
        small.grad_dtype = dtype
    small.grad = torch.zeros_like(small, dtype=dtype)
    return small


def _small_state(state: dict[str, Any], p: Tensor, rule: Rule) -> dict[str, Any]:
    shapes = {slot.name: slot.shape(p) or () for slot in rule.state if slot.shape is not None}
    whole = tuple(p.shape)
    for slot in rule.state:
        codes, scales = keys(slot.name)
        if codes in state:
            state = {key: value for key, value in state.items() if key not in (codes, scales)}
            state[slot.name] = torch.zeros(whole)  # what they stand for

    def shape_of(key: str, value: Tensor) -> tuple[int, ...]:
        return shapes.get(key, whole if value.dim() or key == MASK else ())

    return {
        key: torch.zeros(shape_of(key, value), dtype=value.dtype, device=p.device)
        for key, value in state.items()
        if isinstance(value, Tensor)
    }
