"""What settings cannot work, as far as it shows without data and model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .errors import BadInput

if TYPE_CHECKING:
    from .config import TrainConfig


def option(name: str) -> str:
    """The command-line spelling of a setting."""
    return "--" + name.replace("_", "-")


def check(config: TrainConfig) -> None:
    """Raise BadInput for the first setting that cannot work."""
    check_counts(config, "steps", "batch_size", "max_seq_len", "hidden_size", "num_layers", "num_heads")
    check_counts(config, "val_interval", "val_batches", "log_interval", "checkpoint_interval")
    for name in ("lr", "min_lr", "weight_decay", "l1", "clip"):
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= 0):
            raise BadInput(f"{option(name)} must be a finite number of at least 0, not {value}")
    for name in ("warmup_steps", "patience", "seed"):
        if getattr(config, name) < 0:
            raise BadInput(f"{option(name)} must not be negative: {getattr(config, name)}")
    if config.seed >= 2**63:
        raise BadInput(f"--seed must be less than 2^63: {config.seed}")
    if config.warmup_steps >= config.steps:
        raise BadInput(f"--warmup-steps {config.warmup_steps} must be less than --steps {config.steps}")
    if config.min_lr > config.lr:
        raise BadInput(f"--min-lr {config.min_lr} must not exceed --lr {config.lr}")
    for name in ("dropout", "label_smoothing"):
        if not 0.0 <= getattr(config, name) < 1.0:
            raise BadInput(f"{option(name)} must be at least 0 and less than 1, not {getattr(config, name)}")
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
    if config.patience and config.compare == "torch":
        raise BadInput("--patience stops one run, --compare torch trains two: choose one")
    check_task(config)
    check_formats(config)


def check_counts(config: TrainConfig, *names: str) -> None:
    """Raise BadInput for the first of these settings that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise BadInput(f"{option(name)} must be at least 1, not {getattr(config, name)}")


def check_task(config: TrainConfig) -> None:
    """Raise BadInput for settings of another task."""
    if config.task == "text" and config.tokenizer != "bytes":
        raise BadInput(f"--tokenizer {config.tokenizer} is for --task translate: text is read as bytes")
    if config.task != "text" and config.text:
        raise BadInput(f"--text is for --task text, not for {config.task}, which has its own corpus")
    if config.task == "text" and config.vocabulary_size:
        raise BadInput(f"--vocabulary-size {config.vocabulary_size} is for --task translate: text is read as bytes")
    if config.tokenizer == "bytes" and config.vocabulary_size:
        raise BadInput(f"--vocabulary-size {config.vocabulary_size} does nothing without --tokenizer bpe")


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
