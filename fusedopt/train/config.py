"""The settings of a run: defaults by machine, checks, and what a resumed run may change."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from .errors import BadInput

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp64": "float64"}
SCHEDULES = ("constant", "linear", "cosine")
MASTERS = ("off", "float32", "split16", "split8", "kahan", "stochastic")
STATES = ("auto", "float32", "bfloat16", "float16", "int8", "float8", "float8_e5m2", "int4")
ROUNDINGS = ("nearest", "stochastic")
DEFAULT_OUT = "runs/train"

# A resumed run can never change these: the saved tensors would not fit.
STRUCTURE = ("optimizer", "hidden_size", "num_layers", "num_heads", "dtype", "master", "state", "compare")
# These do not touch the weights; `text` is compared by its hash instead of its name.
FREE = ("out", "text", "val_interval", "val_batches", "log_interval", "checkpoint_interval")

SIZES: dict[str, dict[str, Any]] = {
    "cpu": dict(hidden_size=128, num_layers=4, num_heads=4, max_seq_len=128, batch_size=16, steps=1000, dropout=0.0),
    "gpu": dict(hidden_size=512, num_layers=8, num_heads=8, max_seq_len=512, batch_size=64, steps=2000, dropout=0.1),
    "interpreter": dict(
        hidden_size=32, num_layers=2, num_heads=2, max_seq_len=32, batch_size=8, steps=100, dropout=0.0
    ),
}


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run. Sizes are counts; `lr` is per step; `clip` is in gradient units; `clip` and `ema`:
    0 = off. The roundings are "none" where nothing is rounded.
    """

    text: tuple[str, ...]
    optimizer: str
    optimizer_args: dict[str, Any]
    lr: float
    schedule: str
    warmup_steps: int
    min_lr: float
    weight_decay: float
    clip: float
    ema: float
    steps: int
    batch_size: int
    max_seq_len: int
    hidden_size: int
    num_layers: int
    num_heads: int
    dropout: float
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
    """Fill what the user left open (None) with the defaults for this device.

    `optimizer_defaults` maps a rule to its default lr, weight decay and further constructor arguments.
    """
    values = {name: value for name, value in given.items() if value is not None}
    gpu = device != "cpu"
    backend = values.get("backend", "auto")
    if backend == "auto":
        backend = "triton" if gpu else "eager"
    size = SIZES["gpu" if gpu else "interpreter" if backend == "triton" else "cpu"]
    optimizer = values.get("optimizer", "adamw")
    rule = {"lr": 1e-3, "weight_decay": 0.0, **optimizer_defaults.get(optimizer, {})}
    steps = values.get("steps", size["steps"])
    lr = values.get("lr", rule.pop("lr"))
    dtype = values.get("dtype", "fp32")
    master, state = values.get("master", "off"), values.get("state", "auto")
    defaults: dict[str, Any] = dict(
        size, text=(), optimizer=optimizer, lr=lr, weight_decay=rule.pop("weight_decay"), schedule="cosine",
        warmup_steps=steps // 20, min_lr=lr / 10, clip=1.0, ema=0.0, seed=0, dtype=dtype, compare="none",
        master=master, state=state, **default_roundings(master, state),
        amp="bf16" if gpu and dtype == "fp32" else "off",
        val_interval=max(1, steps // 10), val_batches=8, log_interval=10 if gpu else 1,
        checkpoint_interval=max(1, steps // 10), out=DEFAULT_OUT,
    )  # fmt: skip
    optimizer_args = {**rule, **values.get("optimizer_args", {})}
    config = from_dict({**defaults, **values, "optimizer_args": optimizer_args, "device": device, "backend": backend})
    check(config)
    return config


def default_roundings(master: str, state: str) -> dict[str, str]:
    """How the optimizer rounds 24-bit weights and inexact state when nothing else is said."""
    return {
        "master_rounding": "stochastic" if master == "split8" else "none",
        "state_rounding": "none" if state in ("auto", "float32") else "nearest",
    }


def override(saved: TrainConfig, given: dict[str, Any]) -> TrainConfig:
    """The saved settings with those that the user gave again. `backend="auto"` keeps the saved one."""
    values = {name: value for name, value in given.items() if value is not None}
    if values.get("backend") == "auto":
        del values["backend"]
    values["optimizer_args"] = {**saved.optimizer_args, **values.get("optimizer_args", {})}
    before = saved.as_dict()
    if any(name in values and values[name] != before[name] for name in ("master", "state")):
        before.update(default_roundings(values.get("master", saved.master), values.get("state", saved.state)))
    config = from_dict({**before, **values})
    check(config)
    return config


def check(config: TrainConfig) -> None:
    """Raise BadInput for the first setting that cannot work."""
    counts = ("steps", "batch_size", "max_seq_len", "hidden_size", "num_layers", "num_heads")
    for name in (*counts, "val_interval", "val_batches", "log_interval", "checkpoint_interval"):
        if getattr(config, name) < 1:
            raise BadInput(f"{option(name)} must be at least 1, not {getattr(config, name)}")
    for name in ("lr", "min_lr", "weight_decay", "clip"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise BadInput(f"{option(name)} must be a finite number of at least 0, not {value}")
    for name in ("warmup_steps", "seed"):
        if getattr(config, name) < 0:
            raise BadInput(f"{option(name)} must not be negative: {getattr(config, name)}")
    if config.seed >= 2**63:
        raise BadInput(f"--seed must be less than 2^63: {config.seed}")
    if config.warmup_steps >= config.steps:
        raise BadInput(f"--warmup-steps {config.warmup_steps} must be less than --steps {config.steps}")
    if config.min_lr > config.lr:
        raise BadInput(f"--min-lr {config.min_lr} must not exceed --lr {config.lr}")
    if not 0.0 <= config.dropout < 1.0:
        raise BadInput(f"--dropout must be at least 0 and less than 1, not {config.dropout}")
    if not 0.0 <= config.ema < 1.0:
        raise BadInput(f"--ema must be at least 0 (off) and less than 1, such as 0.999, not {config.ema}")
    if config.hidden_size % config.num_heads:
        raise BadInput(f"--num-heads {config.num_heads} does not divide --hidden-size {config.hidden_size}")
    if config.hidden_size // config.num_heads % 2:
        raise BadInput(
            f"--hidden-size {config.hidden_size} over --num-heads {config.num_heads} gives heads of odd size "
            f"{config.hidden_size // config.num_heads}: rotary positions need an even one"
        )
    if config.amp != "off" and config.dtype != "fp32":
        raise BadInput(f"--amp {config.amp} is for fp32 weights, not for --dtype {config.dtype}")
    check_formats(config)


def check_formats(config: TrainConfig) -> None:
    """Raise BadInput for a format of weights or state that would do nothing."""
    if config.master != "off" and config.dtype != "bf16":
        raise BadInput(f"--master {config.master} is for bf16 weights, not for {config.dtype}: add --dtype bf16")
    if config.state != "auto" and config.dtype == "fp64":
        raise BadInput(f"--state {config.state} is for fp32 and bf16 weights, not for --dtype fp64")
    if config.master_rounding != "none" and config.master != "split8":
        raise BadInput(f"--master-rounding {config.master_rounding} does nothing without --master split8")
    if config.state_rounding != "none" and config.state in ("auto", "float32"):
        raise BadInput(
            f"--state-rounding {config.state_rounding} does nothing without a --state that rounds, such as int8"
        )


def option(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def differences(saved: TrainConfig, wanted: TrainConfig, names: tuple[str, ...] | None = None) -> list[str]:
    """One phrase per setting that differs, of `names`, else of all that influence the weights."""
    if names is None:
        names = tuple(field.name for field in fields(TrainConfig) if field.name not in FREE + STRUCTURE)
    pairs = [(name, getattr(saved, name), getattr(wanted, name)) for name in names]
    return [f"{option(name)} was {old}, now {new}" for name, old, new in pairs if old != new]
