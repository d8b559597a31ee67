"""state_dict in and out: torch's format, without torch's casts.

`torch.optim.Optimizer.load_state_dict` casts every state tensor to its parameter's dtype. Here state keeps the dtype
it was saved with and only moves to the parameter's device; what is in another format than this optimizer's is converted
where state is taken over (``state.py``). Options that torch does not have live in one group key, ``"fusedopt"``, which
exists only when a group uses one; it carries the version of this format.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dcp import check_formats, of_these, taken_back, without_own
from .encoded import keys, recognise, values
from .formats import LOW, is_random
from .options import FORMAT_VERSION, FORMATS, KEY
from .rule import Rule
from .shards import here, is_dtensor, local_state, spread, take
from .state import BESIDE, MASK, held_format, number_tensor
from .streams import STREAMS

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer
    from .stepper import Stepper


class _Raw:
    """A parameter's state on its way through torch's loader, which casts tensors and dicts but not this."""

    def __init__(self, state: Any) -> None:
        self.state = state


def load(optimizer: "Stepper", state_dict: dict[str, Any], load_as_torch: Callable[[dict[str, Any]], None]) -> None:
    """Load through torch's own loader (checks, hooks, group handling) with the state hidden from its casts."""
    live = [group.get(KEY) for group in optimizer.param_groups]

    def hide(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        _check_version(loaded)
        pairs = zip(loaded["param_groups"], optimizer.param_groups, strict=False)
        groups = [of_these(dict(group), live_group, i) for i, (group, live_group) in enumerate(pairs)]
        groups += [dict(group) for group in loaded["param_groups"][len(groups) :]]
        loaded = {**loaded, "state": _readable(optimizer, loaded)}
        for index, (group, options) in enumerate(zip(groups, live, strict=False)):
            if gone := (options or {}).keys() - group.get(KEY, options or {}).keys() - {*FORMATS, STREAMS}:
                warnings.warn(
                    f"param_groups[{index}] takes its options from the file, as it takes its lr: not set there and off "
                    f"now are {', '.join(sorted(gone))}; to keep them set them in the group's 'fusedopt' after loading",
                    stacklevel=4,
                )
            if merged := _merged(group, options or {}):
                group[KEY] = merged
            else:
                group.pop(KEY, None)
        return {**loaded, "param_groups": groups, "state": {k: _Raw(v) for k, v in loaded["state"].items()}}

    handle = optimizer.register_load_state_dict_pre_hook(hide)  # appended: runs after the user's
    try:
        load_as_torch(state_dict)
    finally:
        handle.remove()


def _merged(group: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """What stands under the key of a loaded group: formats as they are here, streams and all else as in the file."""
    if KEY not in group:
        merged = dict(live)
        if "lr_initial" in live:  # that of the run that is loaded
            merged["lr_initial"] = float(group.get("initial_lr", group["lr"]))
        return merged
    file, random = group[KEY], ("seed", STREAMS)
    merged = {k: v for k, v in file.items() if k not in {*FORMATS, STREAMS, "version"}}
    merged |= {k: v for k, v in live.items() if k in FORMATS and k not in random}
    drawn = is_random(merged) and (STREAMS in file or is_random(file))
    merged |= {k: v for k, v in (file if drawn else live).items() if k in random}
    return {"version": FORMAT_VERSION, **merged} if merged else {}


def restore(optimizer: "FusedOptimizer") -> None:
    """After unpickling or loading: unwrap state, fill in options that older files lack."""
    for p, state in list(optimizer.state.items()):
        if isinstance(state, _Raw):
            state = optimizer.state[p] = state.state
            if not isinstance(p, Tensor):  # an entry that belongs to no parameter stays what it is
                continue
            state = _place(state, torch.device("cpu") if optimizer._offload_state else p.device)
            state = optimizer.state[p] = {key: take(value, p, key) for key, value in state.items()}
            optimizer._counters.pop(p, None)
            if isinstance(step := state.get("step"), int | float):
                state["step"] = number_tensor(step, p.device)
    _unify(optimizer)
    for group in optimizer.param_groups:
        for key, value in optimizer.defaults_of(group).items():
            group.setdefault(key, value)
        if optimizer.rule_of(group).decay == "decoupled" and "decoupled_weight_decay" in group:
            group["decoupled_weight_decay"] = True


def _unify(optimizer: "FusedOptimizer") -> None:
    """Groups that shared a tensor threshold for skipping share one again."""
    known: list[Tensor] = []
    for options in (group[KEY] for group in optimizer.param_groups if KEY in group):
        limit = options.get("skip_norm_above")
        if isinstance(limit, Tensor):
            same = next((x for x in known if x.device == limit.device and torch.equal(x, limit)), limit)
            options["skip_norm_above"] = same
            known.append(same)


def _place(value: Any, device: torch.device) -> Any:
    """Tensors on a device, in new dicts."""
    if isinstance(value, dict):
        placed = {key: _place(v, device) for key, v in value.items()}
        if isinstance(mask := placed.get(MASK), Tensor):  # torch.optim casts it on its way
            placed[MASK] = mask.bool()
        return placed
    return value.to(device) if isinstance(value, Tensor) else value


def _check_version(state_dict: dict[str, Any]) -> None:
    for index, group in enumerate(state_dict["param_groups"]):
        version = group.get(KEY, {}).get("version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"param_groups[{index}] was written in format version {version}; this fusedopt reads up to "
                f"{FORMAT_VERSION}: upgrade fusedopt"
            )


def _readable(optimizer: "Stepper", state_dict: dict[str, Any]) -> dict[Any, Any]:
    """State as this optimizer reads it; sizes of groups are checked by torch's loader.

    Raises:
        RuntimeError: quantised state or masters that cannot be read.
    """
    found = {k: taken_back(v) if isinstance(v, dict) else v for k, v in state_dict["state"].items()}
    live = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    saved = [(i, group) for group in state_dict["param_groups"] for i in group["params"]]
    for (p, group), (i, new) in zip(live, saved, strict=False) if len(live) == len(saved) else ():
        if isinstance(state := found.get(i), dict):
            rule = optimizer.rule_of({**group, **new})
            own = optimizer.state.get(p, {})
            state = found[i] = without_own(rule, state, own)
            _check_readable(rule, p, state)
            for key in BESIDE:
                if isinstance(have := state.get(key), Tensor):
                    _check_beside(p, key, have)
            if KEY in group and KEY in new:
                check_formats(p, rule, state, own, new[KEY], group[KEY])
    return found


def _check_beside(p: Tensor, key: str, have: Tensor) -> None:
    low = p.dtype if p.dtype in LOW else have.dtype if have.dtype in LOW else torch.bfloat16
    held_format(torch.empty(0, dtype=low), {key: have})
    if have.shape != p.shape:
        raise RuntimeError(
            f"optimizer state {key!r} of shape {tuple(have.shape)} does not fit a parameter of shape {tuple(p.shape)}; "
            "load a checkpoint of this model"
        )


def _check_readable(rule: Rule, p: Tensor, state: dict[str, Any]) -> None:
    slots = {slot.name: slot for slot in rule.state if slot.kind != "scalar"}
    for slot in slots.values():
        if any(state.get(key) is not None for key in keys(slot.name)) and slot.shape is None:
            recognise(state, slot, p.shape)
    for name in (key.removesuffix("_q") for key in state if key.endswith("_q") and key not in slots):
        if keys(name)[1] in state and (name not in slots or slots[name].shape is not None):
            raise RuntimeError(
                f"the state dict holds {keys(name)[0]!r} and {keys(name)[1]!r}, but {rule.name} keeps no quantised "
                f"{name!r}; load a checkpoint of the same class, or make the file plain with to_torch_state_dict()"
            )


def to_torch(optimizer: "Stepper") -> dict[str, Any]:
    """See `Stateful.to_torch_state_dict`."""
    _check_namesake(optimizer)
    packed = optimizer.state_dict()
    ours = {i for group in packed["param_groups"] for i in group["params"]}
    exported = {key: entry for key, entry in packed["state"].items() if key not in ours}
    for group, saved in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        saved.pop(KEY, None)
        for p, i in zip(group["params"], saved["params"], strict=True):
            if entry := _plain(optimizer, group, p, packed["state"].get(i, {})):
                exported[i] = entry
    return {**packed, "state": exported}


def _plain(optimizer: "Stepper", group: dict[str, Any], p: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state as torch's class keeps it; {} where it has none yet."""
    rule, local = optimizer.rule_of(group), local_state(taken_back(state), p)
    made: dict[str, Any] = {}
    for slot in rule.state:
        if slot.kind == "scalar" or slot.shape is not None:
            x = local.get(slot.name)
        else:
            x = values(local, slot, here(p).shape)
        if x is not None:
            x = x.to(torch.float32) if x.dtype in LOW else x
            made[slot.name] = spread(x, p) if is_dtensor(p) else x
    lacking = [s for s in rule.slots(group) if s.name not in made and (s.shape is None or s.shape(p) is not None)]
    if lacking:  # a parameter that was never stepped
        return {}
    if rule.counts_in_state and "step" in state:
        step, moved = state["step"], group.get("capturable") or group.get("fused")
        made["step"] = step.cpu() if isinstance(step, Tensor) and not moved else step
    return made


def _check_namesake(optimizer: "Stepper") -> None:
    """Refuse what no class of torch.optim could load."""
    names = [cls.__name__ for cls in type(optimizer).__mro__ if cls.__module__.startswith(f"{__package__}.rules.")]
    found = next((name for name in names if hasattr(torch.optim, name)), None)
    if found is None:
        raise RuntimeError(
            f"to_torch_state_dict: torch.optim has no {type(optimizer).__name__}; for plain state load this "
            "optimizer's state_dict() into one of its class without state_dtype and master_weights"
        )
    if any(optimizer.rule_of(group) is not optimizer.rule for group in optimizer.param_groups):
        raise RuntimeError(f"to_torch_state_dict: torch.optim.{found} has no groups of another rule, as these hold")
