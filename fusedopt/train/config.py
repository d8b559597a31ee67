"""The settings of a run: defaults by machine, checks, and what a resumed run may change."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .. import schedules
from .checks import check, option
from .sizes import default_sizes

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}
MASTERS = ("off", "float32", "split16", "split8", "kahan", "stochastic")
STATES = ("auto", "float32", "bfloat16", "float16", "int8", "float8", "float8_e5m2", "int4")
ROUNDINGS = ("nearest", "stochastic")
DEFAULT_OUT = "runs/train"

# A resumed run can never change these: the saved tensors would not fit.
STRUCTURE = (
    "task", "tokenizer", "vocabulary_size", "optimizer", "hidden_size", "num_layers", "num_heads", "dtype", "master",
    "state", "compare",
)  # fmt: skip
# These do not touch the weights; `text` is compared by its hash instead of its name.
FREE = (
    "out", "text", "lr_file", "patience", "val_interval", "val_batches", "log_interval", "checkpoint_interval",
)  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Sizes are counts; `lr` is per step; `clip` is in gradient units; `clip`, `ema` and
    `patience`: 0 = off. The roundings are "none" where nothing is rounded.
    """

    task: str
    text: tuple[str, ...]
    tokenizer: str
    vocabulary_size: int
    optimizer: str
    optimizer_args: dict[str, Any]
    lr: float
    schedule: str
    schedule_args: dict[str, Any]
    warmup_steps: int
    min_lr: float
    lr_file: str
    weight_decay: float
    decay: str
    l1: float
    clip: float
    ema: float
    steps: int
    batch_size: int
    max_seq_len: int
    hidden_size: int
    num_layers: int
    num_heads: int
    dropout: float
    label_smoothing: float
    patience: int
    seed: int
    device: str
    dtype: str
    master: str
    master_rounding: str
    state: str
    state_rounding: str
    amp: str
    backend: str
    compare: str
    val_interval: int
    val_batches: int
    log_interval: int
    checkpoint_interval: int
    out: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values only, as config.json and the checkpoint store them."""
        return {**asdict(self), "text": list(self.text)}

    @property
    def skips_steps(self) -> bool:
        """Whether gradients that are not finite cost a step instead of the run."""
        chosen = self.optimizer_args
        return self.amp == "fp16" or bool(chosen.get("skip_nonfinite")) or chosen.get("skip_norm_above") is not None

    @property
    def rounds_at_random(self) -> bool:
        """Whether the optimizer draws random numbers."""
        return self.master == "stochastic" or "stochastic" in (self.master_rounding, self.state_rounding)


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of `as_dict`. KeyError when a setting is missing."""
    known = {field.name: values[field.name] for field in fields(TrainConfig)}
    return TrainConfig(**{**known, "text": tuple(known["text"])})


def resolve(given: dict[str, Any], device: str, optimizer_defaults: dict[str, dict[str, Any]]) -> TrainConfig:
    """Fill what the user left open (None) with the defaults for this task and device, and check the result.

    `optimizer_defaults` maps a rule to its default lr, weight decay and further constructor arguments.
    """
    config = fill(given, device, optimizer_defaults)
    check(config)
    return config


def fill(given: dict[str, Any], device: str, optimizer_defaults: dict[str, dict[str, Any]]) -> TrainConfig:
    """As `resolve`, unchecked."""
    values = {name: value for name, value in given.items() if value is not None}
    gpu = device != "cpu"
    backend = values.get("backend", "auto")
    if backend == "auto":
        backend = "triton" if gpu else "eager"
    task = values.get("task", "text")
    size = default_sizes(task, device, backend)
    optimizer = values.get("optimizer", "adamw")
    rule = {"lr": 1e-3, "weight_decay": 0.0, **optimizer_defaults.get(optimizer, {})}
    steps = values.get("steps", size["steps"])
    lr = values.get("lr", rule.pop("lr"))
    schedule = values.get("schedule", "cosine")
    min_lr = schedules.default_min_lr(schedule, lr) if schedule in schedules.NAMES else 0.0
    batch_size = max(1, values.get("batch_size", size["batch_size"]))
    dtype = values.get("dtype", "fp32")
    master, state = values.get("master", "off"), values.get("state", "auto")
    defaults: dict[str, Any] = dict(
        size, task=task, text=(), optimizer=optimizer, lr=lr, weight_decay=rule.pop("weight_decay"), decay="own",
        l1=0.0, schedule=schedule, schedule_args={},
        warmup_steps=schedules.default_warmup_steps(schedule, steps), min_lr=min_lr, lr_file="", clip=1.0,
        ema=0.0, patience=0, seed=0, dtype=dtype, compare="none",
        master=master, state=state, **default_roundings(master, state),
        amp="bf16" if gpu and dtype == "fp32" else "off",
        val_interval=max(1, steps // 10), val_batches=math.ceil(8 * size["batch_size"] / batch_size),
        log_interval=10 if gpu else 1,
        checkpoint_interval=max(1, steps // 10), out=DEFAULT_OUT,
    )  # fmt: skip
    if values.get("tokenizer") == "bytes":
        defaults["vocabulary_size"] = 0
    optimizer_args = {**rule, **values.get("optimizer_args", {})}
    return from_dict({**defaults, **values, "optimizer_args": optimizer_args, "device": device, "backend": backend})


def default_roundings(master: str, state: str) -> dict[str, str]:
    """How the optimizer rounds 24-bit weights and inexact state when nothing else is said."""
    return {
        "master_rounding": "stochastic" if master == "split8" else "none",
        "state_rounding": "none" if state in ("auto", "float32") else "nearest",
    }


def override(saved: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The saved settings with those that the user gave again, unchecked.

    `backend="auto"` keeps the saved one; with another schedule its arguments are given anew.
    """
    values = {name: value for name, value in given.items() if value is not None}
    if values.get("backend") == "auto":
        del values["backend"]
    values["optimizer_args"] = {**saved.optimizer_args, **values.get("optimizer_args", {})}
    before = saved.as_dict()
    if values.get("schedule", saved.schedule) != saved.schedule:
        before["schedule_args"] = {}
    values["schedule_args"] = {**before["schedule_args"], **values.get("schedule_args", {})}
    if any(name in values and values[name] != before[name] for name in ("master", "state")):
        before.update(default_roundings(values.get("master", saved.master), values.get("state", saved.state)))
    return from_dict({**before, **values})


def differences(saved: TrainConfig, wanted: TrainConfig, names: tuple[str, ...] | None = None) -> list[str]:
    """One phrase per setting that differs, of `names`, else of all that influence the weights."""
    if names is None:
        watched = ("val_interval", "val_batches") if "plateau" in (saved.schedule, wanted.schedule) else ()
        ignored = {*FREE, *STRUCTURE} - {*watched}
        names = tuple(field.name for field in fields(TrainConfig) if field.name not in ignored)
    pairs = [(name, getattr(saved, name), getattr(wanted, name)) for name in names]
    return [f"{option(name)} was {old}, now {new}" for name, old, new in pairs if old != new]
