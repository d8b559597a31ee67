"""What `torch.distributed.checkpoint` needs of state dicts, and what it makes of them on their way back.

It reads into the tensors of the optimizer that loads, casting as it goes; whole state dicts it adds to what is there;
groups it puts together from those of the file, by the names of their parameters.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fusedopt_kernels.state.format import StateFormat

from .encoded import keys, recognise
from .formats import LOW, WEIGHTS, slot_storage
from .options import KEY
from .rule import Rule
from .shards import MOVED, here, is_dtensor
from .state import BESIDE
from .streams import STREAMS, of_name

State = Mapping[str, Any]
"""A parameter's state in a state dict."""


def movable(state: State) -> dict[str, Any]:
    """State of a DTensor in dtypes that collectives take, for state dicts; `taken_back` undoes it."""
    return {
        key: _like(value._local_tensor.to(MOVED[value.dtype]), value)
        if is_dtensor(value) and value.dtype in MOVED
        else value
        for key, value in state.items()
    }


def taken_back(state: State) -> dict[str, Any]:
    """Loaded state as it was before `movable`."""
    back = {}
    for key, value in state.items():
        dtype = _before(state, key, value) if isinstance(value, Tensor) and value.dim() else None
        if dtype is not None:
            local = here(value).to(dtype)
            value = _like(local, value) if is_dtensor(value) else local
        back[key] = value
    return back


def _before(state: State, key: str, value: Tensor) -> torch.dtype | None:
    """Dtype that a tensor had before `movable`; None: this one."""
    name = key.removesuffix("_q")
    if value.dtype == torch.int32:  # 4-bit codes are words of 32 bits themselves
        return torch.int16 if name == key else None
    coded = name != key and f"{name}_scale" in state
    return next((dtype for dtype, moved in MOVED.items() if coded and moved == value.dtype), None)


def _like(local: Tensor, t: Any) -> Any:
    """A DTensor with other local contents."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(local, t.device_mesh, t.placements, run_check=False, shape=t.shape, stride=t.stride())


# ------------------------------------------------------------------------------------------------------------ groups
def of_these(group: dict[str, Any], live: Mapping[str, Any], index: int) -> dict[str, Any]:
    """A loaded group with names and random streams of the live one's parameters.

    Raises:
        ValueError: it is of other parameters, and which streams are whose cannot be told.
    """
    names, wanted, streams = group.get("param_names"), live.get("param_names"), group.get(KEY, {}).get(STREAMS)
    count = len(live["params"])
    if len(group["params"]) != count:  # which torch refuses
        return group
    if names and wanted and names != wanted and (len(names) != len(wanted) or set(wanted) <= set(names)):
        group = {**group, "param_names": list(wanted)}
        made = [of_name(name) for name in wanted]
        if streams is None:
            return group
        if not {*made}.isdisjoint(streams):  # of one of the groups that it is made of: all go by their names
            return {**group, KEY: {**group[KEY], STREAMS: made}}
    elif streams is None or len(streams) <= count:  # fewer: others were stepped in its place (DeepSpeed's ZeRO-3)
        return group
    raise ValueError(
        f"param_groups[{index}] was put together from groups of other parameters, and which of their random streams "
        "belong to its parameters cannot be told: give the optimizer model.named_parameters(), with the same names "
        "when saving and when loading"
    )


# ------------------------------------------------------------------------------------------------------------- state
def without_own(rule: Rule, state: dict[str, Any], own: State) -> dict[str, Any]:
    """Loaded state without what is this optimizer's own and there in the file's format too.

    Of a whole state dict torch adds to the live state what that lacks: whole tensors beside DTensors.
    """

    def is_own(key: str, other: str) -> bool:
        return state[key] is own.get(key) or (is_dtensor(state[key]) and not is_dtensor(state[other]))

    pairs = [(slot.name, keys(slot.name)[0]) for slot in rule.state if slot.kind != "scalar"]
    gone: set[str] = set()
    for a, b in (*pairs, BESIDE):
        if all(isinstance(state.get(key), Tensor) for key in (a, b)):
            gone |= {a} if is_own(a, b) else {b} if is_own(b, a) else set()
    gone |= {key.removesuffix("_q") + "_scale" for key in gone if key.endswith("_q")}
    return {key: value for key, value in state.items() if key not in gone}


def check_formats(p: Tensor, rule: Rule, state: State, own: State, file: State, live: State) -> None:
    """Refuse numbers of one format that were read into tensors of another, and those that were not read at all.

    own: this optimizer's state; file, live: options of the group there and here.

    Raises:
        RuntimeError: names the option.
    """

    def is_own(key: str, other: str) -> bool:
        have = state.get(key)
        return have is not None and state.get(other) is None and (is_dtensor(have) or have is own.get(key))

    for slot in rule.state if file.get("state_dtype") != live.get("state_dtype") else ():
        saved, kept = (slot_storage(slot, p, options) for options in (file, live))
        if slot.kind == "scalar" or slot.shape is not None or saved is kept:
            continue
        codes = keys(slot.name)[0]
        if isinstance(kept, StateFormat):
            wrong = is_own(codes, slot.name) and recognise(state, slot, p.shape) is kept
        else:
            wrong = isinstance(saved, StateFormat) and is_own(slot.name, codes)
        if wrong:
            _refuse("state_dtype", file, live)
    saved, kept = (WEIGHTS.get(options.get("master_weights", "")) for options in (file, live))
    if saved is not kept and saved and kept and saved.key and kept.key and p.dtype in LOW:
        other = saved.key if saved.key != kept.key else ""
        if is_own(kept.key, other) and state[kept.key].dtype == kept.dtype_beside(p):
            _refuse("master_weights", file, live)


def _refuse(option: str, file: State, live: State) -> None:
    raise RuntimeError(
        f"state saved with {option}={file.get(option)!r} was read into tensors of {option}={live.get(option)!r}, in "
        "which the same numbers mean others: let torch.distributed.checkpoint read into a new optimizer of the file's "
        f"formats and set {option} in its group['fusedopt'] afterwards, or give a whole state dict to "
        "optimizer.load_state_dict() on every rank"
    )
