"""State dicts of apex, Transformer Engine and bitsandbytes, turned into what `load_state_dict` here takes.

Layouts as read in apex 6424da3 (2026-07), Transformer Engine d0067d0 (2026-08) and v1.9–v2.9, bitsandbytes 0.32–0.50.2:

apex: moments by torch's names; the step count stands in the group. FusedNovoGrad keeps norms (not their squares) in
    the group: one tensor for fp16 parameters, one for fp32, in the group's order. Masters are in no state dict.
Transformer Engine: as apex, and ``master_param``; ``state_dict()`` gives fp32 whatever moments are kept in (fp8, fp16
    and bf16), but int16 under ``store_param_remainders``: the lower half of the master's bits, where the bf16 weight is
    the upper half, plus one where the lower is negative. What it holds for fp32 parameters is never updated.
bitsandbytes: see ``foreign_bitsandbytes.py``.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import foreign_bitsandbytes as bitsandbytes
from .foreign_bitsandbytes import Entry
from .formats import LOW
from .optimizer import FusedOptimizer
from .options import KEY
from .rule import Rule, lookup
from .state import number_tensor

BETAS = {"betas": "betas", "eps": "eps"}
SGD = {"momentum": "momentum", "dampening": "dampening", "nesterov": "nesterov"}
HYPERS: dict[str, dict[str, dict[str, str]]] = {
    "apex": {
        "adam": BETAS, "adamw": BETAS, "lamb": {**BETAS, "bias_correction": "bias_correction"},
        "novograd": {**BETAS, "grad_averaging": "grad_averaging"}, "sgd": SGD, "adagrad": {"eps": "eps"},
    },
    "transformer_engine": {"adam": BETAS, "adamw": BETAS, "sgd": SGD},
    "bitsandbytes": bitsandbytes.HYPERS,
}  # fmt: skip
"""By source and rule here: where each of our group keys (beside lr and weight_decay) stands in theirs."""

THEIRS = {
    "params", "step", "betas", "eps", "bias_correction", "grad_averaging", "max_grad_norm", "norm_type", "init_zero",
    "exp_avg_sq", "alpha", "t_alpha", "t_beta3", "momentum", "dampening", "nesterov",
}  # fmt: skip
"""Group keys that mean something to these libraries; others are a scheduler's or the user's and are kept."""


def import_state_dict(
    state_dict: Mapping[str, Any], optimizer: FusedOptimizer, source: str | None = None
) -> dict[str, Any]:
    """A state dict for ``optimizer.load_state_dict`` from one that another library saved.

    State comes as plain fp32 under torch's names, 8-bit codes multiplied out exactly as their library does;
    loading and the next step turn it into the formats of ``optimizer``. Parameters are matched by order, as torch does.
    Hyper-parameters that the other library's update uses come from the file (lr, betas, eps, weight_decay, …) and so do
    keys of schedulers; everything else stays as in ``optimizer``. A file does not say which class wrote it, nor what
    it keeps outside of its groups (``adam_w_mode``, clipping): it is read as one of the class of ``optimizer``. Load
    the model's weights first: masters are kept as what goes beside them.

    Args:
        state_dict: not modified; the result shares no tensor with it.
        optimizer: the one that will load the result; not modified.
        source: "apex", "transformer_engine" or "bitsandbytes"; None: told from the layout.

    Raises:
        TypeError: an argument that is no state dict, or no optimizer of this library.
        ValueError: an unknown or torch's own layout, another number of groups or parameters, state that is missing,
            of another shape or of another rule, settings that have no counterpart here.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(f"optimizer must be one of fusedopt's, got {type(optimizer).__name__}")
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise TypeError("state_dict must be what another optimizer's state_dict() gave: 'state' and 'param_groups'")
    if source is None:
        source = _recognise(state_dict)
    elif source not in HYPERS:
        raise ValueError(f"source must be None or one of {', '.join(HYPERS)}, got {source!r}")
    live, saved = optimizer.param_groups, state_dict["param_groups"]
    counts = [[len(group["params"]) for group in groups] for groups in (saved, live)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"state_dict has groups of {counts[0]} parameters, the optimizer has {counts[1]}: build it with the same "
            "parameters in the same groups"
        )
    state, groups = dict(state_dict["state"]), []
    for index, (group, theirs) in enumerate(zip(live, saved, strict=True)):
        rule = optimizer.rule_of(group)
        if rule.name not in HYPERS[source]:
            raise ValueError(
                f"{source} has no state for {rule.name} here; it can be imported into {', '.join(HYPERS[source])}"
            )
        groups.append(_group(source, rule, group, theirs, f"param_groups[{index}]"))
        names = group.get("param_names") or [f"{index}.{i}" for i in range(len(group["params"]))]
        entries = _entries(state_dict["state"], theirs["params"], group["params"], names)
        reader = bitsandbytes.read if source == "bitsandbytes" else _read
        for key, p, name, values, step in reader(source, rule, theirs, entries):
            state[key] = _finished(rule, groups[-1], p, name, values, step)
    return {"state": state, "param_groups": groups}


def _entries(
    state: Mapping[Any, Any], keys: Iterable[Any], params: Sequence[Tensor], names: Sequence[str]
) -> list[Entry]:
    """The parameters of a group that have state, without what is None in it."""
    every = zip(keys, params, names, strict=True)
    return [
        (key, {k: v for k, v in state[key].items() if v is not None}, p, s) for key, p, s in every if state.get(key)
    ]


def _recognise(state_dict: Mapping[str, Any]) -> str:
    """Which library wrote a state dict.

    Raises:
        ValueError: none of them, or more than one.
    """
    inner = {key for entry in state_dict["state"].values() if isinstance(entry, Mapping) for key in entry}
    groups = {key for group in state_dict["param_groups"] for key in group}
    torchs = KEY in groups or bool({"maximize", "foreach"} & groups) or ("step" in inner and "state1" not in inner)
    found = set()
    if {"state1", bitsandbytes.WRAPPED} & inner:
        found.add("bitsandbytes")
    if "master_param" in inner and KEY not in groups:
        found.add("transformer_engine")
    elif {"step", "exp_avg_sq"} & groups or (inner and inner <= {"momentum_buffer", "sum"} and not torchs):
        found.add("apex")
    if len(found) == 1:
        return found.pop()
    own = "; torch.optim's and fusedopt's own need no import: load_state_dict takes them" if torchs else ""
    raise ValueError(
        f"cannot tell what saved this state_dict: its groups have {sorted(groups)}, its state {sorted(inner)}; "
        "there is neither 'step' in the groups (apex; Transformer Engine with 'master_param' in the state) nor only "
        f"'momentum_buffer' or 'sum' (apex) nor 'state1' (bitsandbytes) in the state{own}; else name it by source="
    )


def _group(source: str, rule: Rule, live: dict[str, Any], saved: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A group as the optimizer has it, with the file's hyper-parameters."""
    _check_group(source, rule, live, saved, where)
    group = {key: value for key, value in live.items() if key != KEY}
    group.update({key: value for key, value in saved.items() if key not in THEIRS})
    for ours, theirs in {**HYPERS[source][rule.name], "lr": "lr", "weight_decay": "weight_decay"}.items():
        if theirs.partition(".")[0] in saved:
            group[ours] = _like(lookup(saved, theirs) if "." in theirs else saved[theirs], live[ours])
    if source == "bitsandbytes":
        group.update(bitsandbytes.always(group, live))
    return {**group, "params": list(saved["params"])}


def _check_group(source: str, rule: Rule, live: Mapping[str, Any], saved: Mapping[str, Any], where: str) -> None:
    """Refuse settings under which state means something else than here; warn of what the file cannot carry over."""
    adam, corrects = rule.name in ("adam", "adamw"), saved.get("bias_correction", True)
    if source == "bitsandbytes":
        bitsandbytes.check_group(rule, saved, where)
    elif adam and not corrects:
        raise ValueError(f"{where} has bias_correction=False, which {rule.name} here does not have")
    elif rule.name == "lamb" and not saved.get("grad_averaging", True):
        raise ValueError(f"{where} has grad_averaging=False: its exp_avg is a sum, where lamb here keeps an average")
    elif rule.name == "novograd":
        if corrects or saved.get("norm_type", 2) != 2:
            raise ValueError(f"{where} needs bias_correction=False and norm_type=2 for novograd here")
        warnings.warn(
            f"{where}: FusedNovoGrad's file does not tell whether reg_inside_moment was set; it is read as if it was, "
            "exp_avg being an average of normalised gradients. Without it do not import this file",
            stacklevel=4,
        )
    limit = saved.get("max_grad_norm")
    if limit is not None and live.get(KEY, {}).get("clip_grad_norm") != limit:
        warnings.warn(
            f"{where} was clipped to a global norm of {float(limit):g} by FusedLAMB; clip_grad_norm is not that here",
            stacklevel=4,
        )


def _like(value: Any, live: Any) -> Any:
    """A hyper-parameter's value in the form it has here: number, bool, tuple or tensor."""
    if isinstance(value, tuple | list):
        live = live if isinstance(live, tuple | list) and len(live) == len(value) else [None] * len(value)
        return tuple(_like(v, old) for v, old in zip(value, live, strict=True))
    value = value.item() if isinstance(value, Tensor) else value
    if isinstance(live, Tensor):
        return torch.full_like(live.detach(), value)
    return bool(value) if isinstance(live, bool) else value


def _read(source: str, rule: Rule, saved: Mapping[str, Any], entries: list[Entry]) -> Iterable[tuple[Any, ...]]:
    """(key, parameter, name, values by slot, step count) of a group that apex or Transformer Engine saved."""
    step = saved.get("step")
    norms = _novograd_norms(saved, entries) if rule.name == "novograd" else {}
    known = {slot.name for slot in rule.state if slot.kind != "scalar"}
    for key, entry, p, name in entries:
        values = dict(entry)
        master = values.pop("master_param", None) if source == "transformer_engine" else None
        if unknown := values.keys() - known:
            raise ValueError(f"state of parameter {name} has {sorted(unknown)}, which {source} does not keep")
        if step is None and rule.counts_in_state and rule.name != "adagrad":
            raise ValueError(f"parameter {name} has state, but its group has no 'step'")
        if master is not None and p.dtype in LOW:
            if master.dtype == torch.int16:  # split16 counts from the middle of a bf16 step, this from its end
                values["param_residual"] = master ^ -0x8000
            else:
                values["master_param"] = master
        yield key, p, name, {**values, **norms.get(key, {})}, step


def _novograd_norms(saved: Mapping[str, Any], entries: list[Entry]) -> dict[Any, dict[str, Tensor]]:
    """Second moments by key: squares of the norms that the group keeps."""
    kinds = [[key for key, entry, _, _ in entries if (entry["exp_avg"].dtype == torch.float16) is half]
             for half in (True, False)]  # fmt: skip
    norms = saved.get("exp_avg_sq", ())
    if [len(norm) for norm in norms] != [len(keys) for keys in kinds]:
        raise ValueError(
            f"exp_avg_sq in the group must hold the norms of {len(kinds[0])} fp16 and {len(kinds[1])} fp32 parameters, "
            f"got {[len(norm) for norm in norms]}"
        )
    pairs = ((key, norm) for keys, each in zip(kinds, norms, strict=True) for key, norm in zip(keys, each, strict=True))
    return {key: {"exp_avg_sq": norm.double().square()} for key, norm in pairs}


def _finished(
    rule: Rule, group: Mapping[str, Any], p: Tensor, name: str, values: dict[str, Tensor], step: Any
) -> dict[str, Tensor]:
    """The state of a parameter in torch's form, checked against the parameter and the rule."""
    state: dict[str, Tensor] = {}
    if rule.counts_in_state and step is not None:
        state["step"] = number_tensor(float(step), torch.device("cpu"))
    elif rule.name == "adagrad" and group["lr_decay"] != 0:
        raise ValueError("the file has no step counts, which lr_decay needs: set lr_decay=0")
    slots = {slot.name: slot.kind for slot in rule.slots(group)}
    if lacking := [slot.name for slot in rule.slots(group) if slot.when is None and slot.name not in values]:
        raise ValueError(f"state of parameter {name} has no {' and no '.join(map(repr, lacking))}")
    for key in ("param_residual", "master_param", *slots):
        if (value := values.get(key)) is None:
            continue
        if value.shape != p.shape or not (value.is_floating_point() or key == "param_residual"):
            raise ValueError(
                f"{key} of parameter {name} is of shape {tuple(value.shape)} and dtype {value.dtype}; expected "
                f"floating point of shape {tuple(p.shape)}"
            )
        if slots.get(key) == "nonnegative" and bool((value < 0).any()):
            raise ValueError(f"{key} of parameter {name} is negative somewhere: not state of {rule.name}")
        state[key] = value.detach().to(value.dtype if key == "param_residual" else torch.float32, copy=True)
    return state | {slot.name: values[slot.name] for slot in rule.scalar_slots if slot.name in values}
