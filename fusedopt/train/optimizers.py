"""From an optimizer's and a schedule's name to the objects."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

import fusedopt

from .. import schedules
from ..rules import RULES
from .config import DTYPES, TrainConfig
from .errors import BadInput
from .parallel import ALONE, Ranks
from .task import Task

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
    if name.lower() in ("momentum", "nesterov"):
        more = "" if name.lower() == "momentum" else " --optimizer-arg nesterov=True"
        raise BadInput(f"{name} is not an optimizer's name here: --optimizer sgd --optimizer-arg momentum=0.9{more}")
    close = difflib.get_close_matches(name.lower(), RULES, n=1, cutoff=0.5)
    hint = f": did you mean {close[0]}?" if close else ""
    raise BadInput(f"unknown optimizer {name}{hint} (known: {', '.join(sorted(RULES))})")


def parameter_groups(
    model: nn.Module, decayed: dict[str, Any], kept: dict[str, Any], muon: bool = False
) -> list[dict[str, Any]]:
    """Matrices with the options `decayed`, norm gains with `kept`.

    muon: embedding and head, matrices that Muon is not meant for, in a group of their own that AdamW updates.
    """
    blocks: Any = model.blocks
    inside = {id(p) for block in blocks for p in block.parameters()}
    named = list(model.named_parameters())
    outer = [(n, p) for n, p in named if p.ndim >= 2 and muon and id(p) not in inside]
    inner = [(n, p) for n, p in named if p.ndim >= 2 and not (muon and id(p) not in inside)]
    gains = [(n, p) for n, p in named if p.ndim < 2]
    apart = {"use_muon": False} if muon else {}
    groups = [{"params": inner, **decayed}, {"params": gains, **kept, **apart}]
    return [*groups, {"params": outer, **decayed, **apart}] if muon else groups


def schedule_state(saved: TrainConfig, config: TrainConfig, state: dict[str, Any]) -> dict[str, Any] | None:
    """With which saved state a schedule goes on under changed settings; None: as if it had been there from the start.

    The number of steps means nothing to a schedule that waits for a plateau.
    """
    names = ["schedule", "schedule_args", "lr", "min_lr", "warmup_steps", "batch_size"]
    names += [] if config.schedule == "plateau" else ["steps"]
    if any(getattr(saved, name) != getattr(config, name) for name in names):
        return None
    own = state["schedule"] if "entry" in state else state
    return {**own, "run": {**own["run"], "steps": config.steps}}


def decay_arguments(config: TrainConfig, optimizer_class: type, accepted: Sequence[str]) -> dict[str, Any]:
    """Arguments that choose the kind of weight decay; none for the optimizer's own. BadInput for a kind it has not."""
    if config.decay == "own":
        return {}
    rule = getattr(fusedopt, RULES[config.optimizer]).rule
    decoupled = config.decay == "decoupled"
    if not _has_decay(config.optimizer, decoupled):
        known = ", ".join(sorted(name for name in RULES if _has_decay(name, decoupled)))
        raise BadInput(
            f"--decay {config.decay}: {optimizer_class.__name__} has none of this kind (these have: {known})"
        )
    if config.weight_decay == 0.0:
        raise BadInput(f"--decay {config.decay} does nothing without --weight-decay, which is 0")
    return {rule.decoupled_key: decoupled} if rule.decoupled_key in accepted else {}


def _has_decay(name: str, decoupled: bool) -> bool:
    cls = getattr(fusedopt, RULES[name])
    parameters = inspect.signature(cls).parameters
    own = cls.rule.decay == ("decoupled" if decoupled else "coupled")
    return "weight_decay" in parameters and (own or cls.rule.decoupled_key in parameters)


def switch_to_average(optimizer: torch.optim.Optimizer, average: bool) -> None:
    """Let a schedule-free optimizer's parameters hold the average, to evaluate, or what training needs."""
    switch = getattr(optimizer, "eval" if average else "train", None)
    if switch is not None:
        switch()


@contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, a schedule-free optimizer's parameters hold the average."""
    switch_to_average(optimizer, True)
    try:
        yield
    finally:
        switch_to_average(optimizer, False)


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
    if config.l1 and library == "torch":
        raise BadInput(f"--l1 with --compare torch: torch.optim's {class_name} has none")
    decayed: dict[str, Any] = {} if weight_decay is None else {"weight_decay": weight_decay}
    kept: dict[str, Any] = dict.fromkeys(decayed, 0.0)
    if config.l1:
        decayed["l1"] = config.l1
    arguments.update(decay_arguments(config, optimizer_class, accepted))
    try:
        groups = parameter_groups(model, decayed, kept, muon=config.optimizer == "muon" and library == "fusedopt")
        optimizer = optimizer_class(groups, **arguments)
    except (RuntimeError, TypeError, ValueError) as error:
        raise BadInput(f"{class_name}: {error}") from error
    if library == "fusedopt" and config.state != "auto" and not _keeps_averages(optimizer):
        raise BadInput(f"--state {config.state} does nothing: {class_name} keeps no averages with these arguments")
    return optimizer


class Smallest(nn.Module):
    """A matrix in a block, one outside, and a gain: what optimizers tell apart in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(2, 2), nn.LayerNorm(2, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(2, 2, bias=False)])


def check_optimizer(config: TrainConfig) -> None:
    """Raise BadInput for an optimizer that cannot be made, before there is a model."""
    model = Smallest().to(config.device, getattr(torch, DTYPES[config.dtype]))
    for library in ("fusedopt", "torch") if config.compare == "torch" else ("fusedopt",):
        make_optimizer(config, library, model)


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


def make_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, task: Task, ranks: Ranks = ALONE
) -> schedules.Schedule | schedules.Watched:
    """The configured schedule, which the file ``lr_file`` overrides where there is one."""
    schedule = schedules.make(
        config.schedule, optimizer, steps=config.steps, warmup_steps=config.warmup_steps, min_lr=config.min_lr,
        epoch_steps=epoch_steps(config, task), arguments=config.schedule_args,
    )  # fmt: skip
    if not config.lr_file:
        return schedule
    return schedules.Watched(schedule, optimizer, config.lr_file, agree=lambda entry: ranks.gather(entry)[0])


def check_schedule(config: TrainConfig, task: Task) -> None:
    """Raise BadInput for a schedule that cannot be."""
    try:
        schedules.check(
            config.schedule, config.steps, config.warmup_steps, config.lr, config.min_lr, epoch_steps(config, task),
            config.schedule_args,
        )  # fmt: skip
    except ValueError as error:
        raise BadInput(str(error)) from None


def epoch_steps(config: TrainConfig, task: Task) -> float:
    """Steps in which every training example is seen once."""
    return task.examples(config) / config.batch_size
