"""Which format the numbers of a parameter are kept in: what the options say, slot by slot and for the weight.

Formats themselves, one file each, are in ``fusedopt_kernels.state`` and ``fusedopt_kernels.param``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt_kernels.param.format import WeightFormat
from fusedopt_kernels.param.kahan import KAHAN
from fusedopt_kernels.param.master import MASTER
from fusedopt_kernels.param.split8 import SPLIT8
from fusedopt_kernels.param.split16 import SPLIT16
from fusedopt_kernels.param.stochastic import STOCHASTIC
from fusedopt_kernels.state.float8 import E4M3, E4M3_NONNEGATIVE, E5M2, E5M2_NONNEGATIVE
from fusedopt_kernels.state.format import StateFormat
from fusedopt_kernels.state.int4 import INT4
from fusedopt_kernels.state.int8 import INT8
from fusedopt_kernels.state.uint4 import UINT4
from fusedopt_kernels.state.uint8 import UINT8

from .rule import Rule, Slot

WEIGHTS: dict[str, WeightFormat] = {f.name: f for f in (MASTER, SPLIT16, SPLIT8, KAHAN, STOCHASTIC)}
"""Values of ``master_weights``."""

WIDE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIGNED: dict[str, StateFormat] = {"int8": INT8, "float8_e4m3": E4M3, "float8_e5m2": E5M2, "int4": INT4}
NONNEGATIVE: dict[str, StateFormat] = {
    "int8": UINT8, "uint8": UINT8, "float8_e4m3": E4M3_NONNEGATIVE, "float8_e5m2": E5M2_NONNEGATIVE, "int4": UINT4,
}  # fmt: skip
QUANTISED = {"signed": SIGNED, "nonnegative": NONNEGATIVE, "weight": {}}
"""Quantised formats by kind of slot and name."""

ALIASES: dict[Any, str] = {
    "float8": "float8_e4m3", torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16",
    torch.int8: "int8", torch.uint8: "uint8", torch.float8_e4m3fn: "float8_e4m3", torch.float8_e5m2: "float8_e5m2",
}  # fmt: skip
NAMES = (*WIDE, *dict.fromkeys((*SIGNED, *NONNEGATIVE)))
"""Values of ``state_dtype``."""

SMALLEST = 4096
"""Elements; smaller parameters keep their state in fp32, and so do those of one dimension."""

LOW = (torch.bfloat16, torch.float16)
REAL = (torch.float32, *LOW)


def canonical(value: Any) -> Any:
    """``state_dtype`` as it is kept: names, in a dict by state key where it is one; checked by `check_state_dtype`."""
    if isinstance(value, Mapping):
        return {key: canonical(x) for key, x in value.items()}
    return ALIASES.get(value, value) if isinstance(value, str | torch.dtype) else value


def check_state_dtype(rule: Rule, value: Any) -> None:
    """Refuse a ``state_dtype`` that a rule's slots cannot take.

    Raises:
        ValueError: names what is wrong and what may stand there.
    """
    slots = {slot.name: slot for slot in rule.state}
    if isinstance(value, Mapping):
        for key, name in value.items():
            if key not in slots or slots[key].kind == "scalar":
                known = ", ".join(slot.name for slot in rule.state if slot.kind != "scalar") or "none"
                raise ValueError(f"state_dtype: {rule.name} has no state {key!r} to store so; it has: {known}")
            _check_name(name)
            _check_slot(rule, slots[key], name)
    else:
        _check_name(value)
        if value == "uint8":
            raise ValueError(
                "state_dtype='uint8' is for nonnegative state alone: name it, as in state_dtype={'exp_avg_sq': "
                "'uint8'}, or use 'int8', which does the right thing for both kinds"
            )
        if value not in WIDE and any(slot.shape is not None for slot in rule.state):
            raise ValueError(f"state_dtype={value!r} is not supported by {rule.name}; use one of {', '.join(WIDE)}")


def check_exact(rule: Rule, value: Any) -> None:
    """Refuse every ``state_dtype`` but fp32: a difference of rounded averages may be negative, and its root NaN.

    Raises:
        ValueError: names what is wrong.
    """
    for name in value.values() if isinstance(value, Mapping) else (value,):
        if name != "float32":
            raise ValueError(
                f"state_dtype={name!r}: {rule.name} with {rule.subtracts} takes differences of its averages, which "
                f"this would round; use 'float32', or leave {rule.subtracts} out"
            )


def check_weights(params: Any, chosen: Mapping[str, Any]) -> None:
    """Refuse a weight format that does not hold some parameter of a new group; params: as torch.optim takes them.

    Raises:
        ValueError: names format and dtype.
    """
    for entry in (params,) if isinstance(params, Tensor) else params:
        p = entry[-1] if isinstance(entry, tuple) else entry
        if isinstance(p, Tensor):
            weight_format(p, chosen)


def _check_name(name: Any) -> None:
    if name not in NAMES:
        raise ValueError(f"state_dtype must be one of {', '.join(NAMES)}, float8, or a dict of these, got {name!r}")


def _check_slot(rule: Rule, slot: Slot, name: str) -> None:
    if name in WIDE:
        return
    if slot.shape is not None or name not in QUANTISED[slot.kind]:
        able = ", ".join((*WIDE, *(() if slot.shape is not None else QUANTISED[slot.kind])))
        raise ValueError(
            f"state_dtype: {slot.name!r} of {rule.name} is {slot.kind} state and cannot be {name!r}; use one of {able}"
        )


def slot_storage(slot: Slot, p: Tensor, chosen: Mapping[str, Any]) -> StateFormat | torch.dtype:
    """What a slot of a parameter is kept in under a group's options: a quantised format, or a dtype."""
    asked = chosen.get("state_dtype")
    explicit = isinstance(asked, Mapping)
    name = asked.get(slot.name) if isinstance(asked, Mapping) else asked
    if name is None or p.dtype not in REAL or (slot.kind == "weight" and not explicit):
        fine = p.dtype in LOW and (chosen.get("master_weights") is not None or name is not None)
        return torch.float32 if fine else p.dtype
    if name in WIDE:
        return WIDE[name]
    return QUANTISED[slot.kind][name] if p.numel() >= SMALLEST and p.dim() >= 2 else torch.float32


def weight_format(p: Tensor, chosen: Mapping[str, Any]) -> WeightFormat | None:
    """What a parameter is kept in; None: in its own dtype and nothing else.

    Raises:
        ValueError: the format does not hold this dtype.
    """
    name = chosen.get("master_weights")
    if name is None or p.dtype not in LOW:
        return None
    WEIGHTS[name].codec(p.dtype, False)
    return WEIGHTS[name]


def rounds_at_random(weight: WeightFormat | None, chosen: Mapping[str, Any]) -> bool:
    """Whether a weight is rounded stochastically."""
    if weight is None:
        return False
    return chosen.get("master_rounding", "stochastic") == "stochastic" if weight.random is None else weight.random


def is_random(chosen: Mapping[str, Any]) -> bool:
    """Whether a group's options may need random numbers."""
    state = chosen.get("state_rounding") == "stochastic"
    return state or rounds_at_random(WEIGHTS.get(chosen.get("master_weights", "")), chosen)


def needs_order(p: Tensor, chosen: Mapping[str, Any], rule: Rule) -> bool:
    """Whether a parameter's elements must lie in the order of its indices: for groups and random numbers."""
    return (is_random(chosen) and p.dtype in REAL) or is_quantised(p, chosen, rule)


def is_quantised(p: Tensor, chosen: Mapping[str, Any], rule: Rule) -> bool:
    """Whether some state of a parameter is."""
    storages = (slot_storage(slot, p, chosen) for slot in rule.state if slot.kind != "scalar")
    return "state_dtype" in chosen and any(isinstance(x, StateFormat) for x in storages)
