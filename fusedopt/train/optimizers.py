"""From an optimizer's and a schedule's name to the objects."""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

import fusedopt

from ..rules import RULES
from .config import TrainConfig
from .errors import BadInput

# What works on the default model; every other rule takes lr 1e-3 and its own constructor's defaults.
DEFAULTS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 2e-3},
    "adamw": {"lr": 2e-3, "weight_decay": 0.1},
    "muon": {"lr": 2e-3, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw", "adamw": {}},
    "sgd": {"lr": 0.1, "momentum": 0.9},
}

METRICS = ("grad_norm", "update_ratio")

# Arguments that the command sets itself.
RESERVED = (
    "params", "lr", "weight_decay", "backend", "clip_grad_norm", "ema_decay", "ema_warmup", "metrics", "master_weights",
    "master_rounding", "state_dtype", "state_rounding", "seed",
)  # fmt: skip


def rule_name(name: str) -> str:
    """`name` as `fusedopt.rules` spells it. BadInput with the closest known name otherwise."""
    if name.lower() == "sparse_adam":
        raise BadInput("sparse_adam takes sparse gradients only; this model's are dense")
    if name.lower() in RULES:
        return name.lower()
    close = difflib.get_close_matches(name.lower(), RULES, n=1, cutoff=0.5)
    hint = f": did you mean {close[0]}?" if close else ""
    raise BadInput(f"unknown optimizer {name}{hint} (known: {', '.join(sorted(RULES))})")


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """`("momentum=0.9", "betas=(0.9, 0.99)")` as keyword arguments."""
    arguments = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        if name in RESERVED:
            raise BadInput(f"--optimizer-arg {name}: the command sets it itself, see --help")
        try:
            arguments[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise BadInput(f"--optimizer-arg takes NAME=VALUE with a Python literal, not {pair!r}") from None
    return arguments


def parameter_groups(model: nn.Module, weight_decay: float | None, muon: bool = False) -> list[dict[str, Any]]:
    """Matrices with weight decay, norm gains without; None leaves it out.

    muon: embedding and head, matrices that Muon is not meant for, in a group of their own that AdamW updates.
    """
    named = list(model.named_parameters())
    outer = [(n, p) for n, p in named if p.ndim >= 2 and muon and not n.startswith("blocks.")]
    inner = [(n, p) for n, p in named if p.ndim >= 2 and not (muon and not n.startswith("blocks."))]
    gains = [(n, p) for n, p in named if p.ndim < 2]
    members = [(inner, weight_decay), (gains, 0.0), *([(outer, weight_decay)] if muon else [])]
    groups: list[dict[str, Any]] = [
        {"params": params, **({} if weight_decay is None else {"weight_decay": decay})} for params, decay in members
    ]
    for group in groups[1:] if muon else []:
        group["use_muon"] = False
    return groups


def switch_to_average(optimizer: torch.optim.Optimizer, average: bool) -> None:
    """Let a schedule-free optimizer's parameters hold the average, to evaluate, or what training needs."""
    switch = getattr(optimizer, "eval" if average else "train", None)
    if switch is not None:
        switch()


def make_optimizer(config: TrainConfig, library: str, model: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer over `model`, from `library`: "fusedopt" or "torch" (fused where that works)."""
    class_name = RULES[config.optimizer]
    optimizer_class = getattr(fusedopt if library == "fusedopt" else torch.optim, class_name, None)
    if optimizer_class is None:
        raise BadInput(f"--compare torch: torch.optim has no {class_name}")
    accepted = [name for name, p in inspect.signature(optimizer_class).parameters.items() if p.kind != p.VAR_KEYWORD]
    arguments = dict(config.optimizer_args, lr=config.lr)
    if library == "fusedopt":
        accepted.extend(fusedopt.Options.__annotations__)
        arguments.update(backend=config.backend, metrics=_metrics(config, optimizer_class))
        if config.clip > 0:
            arguments["clip_grad_norm"] = config.clip
        if config.ema > 0:
            arguments.update(ema_decay=config.ema, ema_warmup=True)
        arguments.update(formats(config))
    elif "fused" in accepted and not _fused_is_broken(config):
        arguments.setdefault("fused", True)
    for name in set(arguments) - set(accepted):
        close = difflib.get_close_matches(name, accepted, n=1)
        hint = f", did you mean {close[0]}?" if close else ""
        raise BadInput(f"--optimizer-arg {name}: {library}'s {class_name} takes no such argument{hint}")
    weight_decay = config.weight_decay if "weight_decay" in accepted else None
    if weight_decay is None and config.weight_decay:
        raise BadInput(f"--weight-decay: {class_name} has none")
    try:
        groups = parameter_groups(model, weight_decay, muon=config.optimizer == "muon" and library == "fusedopt")
        optimizer = optimizer_class(groups, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"{class_name}: {error}") from error
    if library == "fusedopt" and config.state != "auto" and not _keeps_averages(optimizer):
        raise BadInput(f"--state {config.state} does nothing: {class_name} keeps no averages with these arguments")
    return optimizer


def formats(config: TrainConfig) -> dict[str, Any]:
    """How fusedopt stores weights and state, as its optimizers' arguments; the run's seed where it draws numbers."""
    arguments: dict[str, Any] = {}
    if config.master != "off":
        arguments["master_weights"] = config.master
    if config.state != "auto":
        arguments["state_dtype"] = config.state
    for name in ("master_rounding", "state_rounding"):
        if getattr(config, name) != "none":
            arguments[name] = getattr(config, name)
    return {**arguments, "seed": config.seed} if config.rounds_at_random else arguments


def _keeps_averages(optimizer: fusedopt.FusedOptimizer) -> bool:
    """Whether there is state whose format can be chosen."""
    slots = (slot for group in optimizer.param_groups for slot in optimizer.rule.slots(group))
    return any(slot.kind in ("signed", "nonnegative") for slot in slots)


def _metrics(config: TrainConfig, optimizer_class: type[fusedopt.FusedOptimizer]) -> tuple[str, ...]:
    """What the step measures: in a comparison only the norm that clipping needs anyway, so that step times compare;
    for rules whose updates are not measured (Adafactor) the norm alone.
    """
    if config.compare == "torch":
        return ()
    return METRICS if optimizer_class.rule.measures else ("grad_norm",)


def _fused_is_broken(config: TrainConfig) -> bool:
    """torch's fused CPU SGD leaves most bf16 weights as they are (pytorch/pytorch#191763, found in 2.12 and 2.13)."""
    return config.optimizer == "sgd" and config.device == "cpu" and config.dtype == "bf16"


def describe(optimizer: torch.optim.Optimizer) -> str:
    """The optimizer as the report names it, such as `torch.optim.AdamW (fused)`."""
    library = "torch.optim" if type(optimizer).__module__.startswith("torch.") else "fusedopt"
    fused = " (fused)" if library == "torch.optim" and optimizer.defaults.get("fused") else ""
    return f"{library}.{type(optimizer).__name__}{fused}"


def make_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """Linear warm-up over `warmup_steps`, then constant, or linear or cosine down to `min_lr` at the last step."""
    length = max(1, config.steps - config.warmup_steps)
    final = config.min_lr / config.lr if config.lr > 0 else 1.0
    if config.schedule == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=length, eta_min=config.min_lr)
    elif config.schedule == "linear":
        main = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=final, total_iters=length)
    else:
        main = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if config.warmup_steps == 0:
        return main
    start = 1.0 / (config.warmup_steps + 1)
    warmup = lr_scheduler.LinearLR(optimizer, start_factor=start, total_iters=config.warmup_steps)
    return lr_scheduler.SequentialLR(optimizer, [warmup, main], milestones=[config.warmup_steps])
