"""state_dict in and out: torch's format, without torch's casts.

`torch.optim.Optimizer.load_state_dict` casts every state tensor to its parameter's dtype. Here state keeps the dtype
it was saved with and only moves to the parameter's device. Options that torch does not have live in one group key,
``"fusedopt"``, which exists only when a group uses one; it carries the version of this format.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .options import FORMAT_VERSION, KEY
from .state import MASK, number_tensor

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer


class _Raw:
    """A parameter's state on its way through torch's loader, which casts tensors and dicts but not this."""

    def __init__(self, state: Any) -> None:
        self.state = state


def load(
    optimizer: "FusedOptimizer", state_dict: dict[str, Any], load_as_torch: Callable[[dict[str, Any]], None]
) -> None:
    """Load through torch's own loader (checks, hooks, group handling) with the state hidden from its casts."""
    live = [group.get(KEY) for group in optimizer.param_groups]

    def hide(_: Any, loaded: dict[str, Any]) -> dict[str, Any]:
        _check_version(loaded)
        groups = [dict(group) for group in loaded["param_groups"]]
        for index, (group, options) in enumerate(zip(groups, live, strict=False)):
            if gone := (options or {}).keys() - group.get(KEY, options or {}).keys():
                warnings.warn(
                    f"param_groups[{index}] takes its options from the file, as it takes its lr: not set there and off "
                    f"now are {', '.join(sorted(gone))}; to keep them set them in the group's 'fusedopt' after loading",
                    stacklevel=4,
                )
            if options is not None and KEY not in group:
                group[KEY] = dict(options)
                if "lr_initial" in options:  # that of the run that is loaded
                    group[KEY]["lr_initial"] = float(group.get("initial_lr", group["lr"]))
        return {**loaded, "param_groups": groups, "state": {k: _Raw(v) for k, v in loaded["state"].items()}}

    handle = optimizer.register_load_state_dict_pre_hook(hide)  # appended: runs after the user's
    try:
        load_as_torch(state_dict)
    finally:
        handle.remove()


def restore(optimizer: "FusedOptimizer") -> None:
    """After unpickling or loading: unwrap state, fill in options that older files lack."""
    for p, state in list(optimizer.state.items()):
        if isinstance(state, _Raw):
            state = optimizer.state[p] = state.state
            if not isinstance(p, Tensor):  # an entry that belongs to no parameter stays what it is
                continue
            state = optimizer.state[p] = _place(state, p)
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


def _place(value: Any, p: Tensor) -> Any:
    """Tensors on the parameter's device, in new dicts."""
    if isinstance(value, dict):
        placed = {key: _place(v, p) for key, v in value.items()}
        if isinstance(mask := placed.get(MASK), Tensor):  # torch.optim casts it on its way
            placed[MASK] = mask.bool()
        return placed
    return value.to(p.device) if isinstance(value, Tensor) else value


def _check_version(state_dict: dict[str, Any]) -> None:
    for index, group in enumerate(state_dict["param_groups"]):
        version = group.get(KEY, {}).get("version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"param_groups[{index}] was written in format version {version}; this fusedopt reads up to "
                f"{FORMAT_VERSION}: upgrade fusedopt"
            )
