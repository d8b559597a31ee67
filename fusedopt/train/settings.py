"""From what a user wrote to settings: names spelled out, and numbers for what depends on the data."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import schedules
from ..batch_size import scale_lr
from . import settings_file
from .checks import check_counts
from .config import TrainConfig
from .errors import BadInput
from .optimizers import DEFAULTS, RESERVED, rule_name
from .sizes import default_sizes
from .task import Task, task_name

BY_DATA = ("epochs", "lr_scaling", "base_batch_size", "batch_size", "lr", "steps")
"""What `sized` looks at."""


def from_options(options: dict[str, Any]) -> dict[str, Any]:
    """The settings that a command line asks for: those of ``--config``, and over them its own options."""
    given = {name: value for name, value in options.items() if value is not None and value != ()}
    if "optimizer_arg" in given:
        given["optimizer_args"] = parse_arguments(given.pop("optimizer_arg"))
    if "schedule_arg" in given:
        try:
            given["schedule_args"] = schedules.parse_arguments(given.pop("schedule_arg"))
        except ValueError as error:
            raise BadInput(f"--schedule-arg: {error}") from None
    read = settings_file.read(given.pop("config")) if "config" in given else {}
    if given.get("lr_scaling") == "none":
        read.pop("base_batch_size", None)
    elif "lr_scaling" in given and isinstance(read.get("batch_size"), int):
        read.setdefault("base_batch_size", read["batch_size"])  # the file's learning rate is for that
    if given.get("task", read.get("task", "text")) != read.get("task", "text"):
        for name in ("text", "tokenizer", "vocabulary_size"):
            read.pop(name, None)  # they are the other task's
    for one, other in (("epochs", "steps"), ("steps", "epochs")):
        if one in given and other not in given:
            read.pop(other, None)
    for name, chosen in (("optimizer_args", "optimizer"), ("schedule_args", "schedule")):
        usual = {"optimizer": "adamw", "schedule": "cosine"}[chosen]
        before = str(read.get(chosen, usual)).lower()
        same = str(given.get(chosen, before)).lower() == before
        if name in read and not same:
            del read[name]  # they are the other optimizer's, or schedule's
        elif name in read and name in given:
            given[name] = {**read[name], **given[name]}
    return {**read, **given}


def parse_arguments(pairs: Sequence[str]) -> dict[str, Any]:
    """`("momentum=0.9", "betas=(0.9, 0.99)")` as keyword arguments."""
    arguments = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        name = name.strip().replace("-", "_")
        try:
            arguments[name] = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            raise BadInput(f"--optimizer-arg takes NAME=VALUE with a Python literal, not {pair!r}") from None
    return arguments


def normalised(given: dict[str, Any]) -> dict[str, Any]:
    """Settings with names as they are spelled and absolute paths; what is None is left out."""
    given = {name: value for name, value in given.items() if value is not None}
    settings_file.check_names(given)
    if "optimizer" in given:
        given["optimizer"] = rule_name(given["optimizer"])
    if "task" in given:
        given["task"] = task_name(given["task"])
    if given.get("lr_file"):
        given["lr_file"] = str(Path(given["lr_file"]).absolute())
        if not Path(given["lr_file"]).parent.is_dir():
            raise BadInput(f"--lr-file {given['lr_file']}: its folder does not exist")
    if "text" in given:
        given["text"] = tuple(str(Path(name).absolute()) for name in given["text"])
    for name in ("optimizer_args", "schedule_args"):
        given[name] = dict(given.get(name, {}))
    for name in RESERVED:
        if name in given["optimizer_args"]:
            raise BadInput(f"--optimizer-arg {name}: the command sets it itself, see --help")
    return given


def sized(given: dict[str, Any], draft: TrainConfig, task: Task) -> dict[str, Any]:
    """`given` with numbers for ``epochs``, the batch size ``"full"`` and a learning rate for another batch size.

    draft: all settings but these.
    """
    usual = default_sizes(draft.task, draft.device, draft.backend)["batch_size"]
    given = dict(given)
    epochs, rule, base = (given.pop(name, None) for name in ("epochs", "lr_scaling", "base_batch_size"))
    if epochs is not None or given.get("batch_size") == "full":
        check_counts(draft, "max_seq_len")
    if given.get("batch_size") == "full":
        given["batch_size"] = task.examples(draft)
    batch_size = given.get("batch_size", draft.batch_size)
    if epochs is not None:
        if "steps" in given:
            raise BadInput("--epochs and --steps both say how long to train: choose one")
        if not (math.isfinite(epochs) and epochs > 0):
            raise BadInput(f"--epochs must be a finite number above 0, not {epochs}")
        if epochs * task.examples(draft) > 2**53:
            raise BadInput(f"--epochs {epochs} is too many")
        given["steps"] = math.ceil(epochs * task.examples(draft) / max(1, batch_size))
    if rule in (None, "none"):
        if base is not None:
            raise BadInput(f"--base-batch-size {base} does nothing without --lr-scaling linear or sqrt")
        return given
    base = usual if base is None else base
    if base < 1:
        raise BadInput(f"--base-batch-size must be at least 1, not {base}")
    lr = given.get("lr", DEFAULTS.get(draft.optimizer, {}).get("lr", 1e-3))
    try:
        return {**given, "lr": scale_lr(lr, base, batch_size, rule)}
    except ValueError as error:
        raise BadInput(f"--lr-scaling {rule}: {error}") from None
