"""`--config FILE`: settings of a run as a JSON object, by the names of the options with `_` for `-`."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from .config import fill
from .errors import BadInput
from .options import OPTIONS
from .task import task_name

ARGUMENTS = ("optimizer_args", "schedule_args")
"""Settings that are objects themselves: on the command line --optimizer-arg NAME=VALUE and the like."""
COMMAND_ONLY = ("config", "parallel", "out", "resume", "overwrite", "allow_inexact", "optimizer_arg", "schedule_arg")
"""Options that say how to run, not what."""
FOLLOWING = ("min_lr", "warmup_steps", "val_batches", "val_interval", "checkpoint_interval", "log_interval")
"""Settings whose defaults follow from numbers among the others, or from the device."""
DERIVED = (
    *FOLLOWING, "lr", "weight_decay", "tokenizer", "vocabulary_size", "amp", "backend", "master_rounding",
    "state_rounding",
)  # fmt: skip
"""Settings whose defaults depend on others at all."""
TYPES: dict[click.ParamType, tuple[tuple[type, ...], str]] = {
    click.FLOAT: ((int, float), "a number"),
    click.INT: ((int,), "a whole number"),
    click.STRING: ((str,), "a string"),
    click.BOOL: ((bool,), "true or false"),
}
"""Type of an option → types of its value in the file, and their name. Any other takes a string or a number."""


def read(path: str | Path) -> dict[str, Any]:
    """The settings in `path`, as the options of the same names would give them. null stands for the default.

    Of a run's own config.json, which is known by its `out`, only what was chosen is left: neither its device, nor what
    would come out the same by default. So another lr, number of steps or machine takes along what depends on it.

    Raises:
        BadInput: no such file, not a JSON object, an unknown setting, a value of the wrong type.
    """
    source = f"--config {path}"
    content = _load(Path(path), source)
    known = {option.name: option for option in OPTIONS if option.name and option.name not in COMMAND_ONLY}
    settings: dict[str, Any] = {}
    for name, value in content.items():
        if name == "out" or value is None:
            continue
        if name not in (*known, *ARGUMENTS):
            close = difflib.get_close_matches(name, (*known, *ARGUMENTS), n=1)
            hint = f"did you mean {close[0]}?" if close else "fusedopt train --help lists them"
            raise BadInput(f"{source}: unknown setting {name}: {hint}")
        # Config.json says "none" where nothing is rounded, which on the command line is an absent option.
        if not (name.endswith("_rounding") and value == "none"):
            settings[name] = _checked(name, value, known.get(name), source)
    return _chosen(settings) if "out" in content else settings


def check_names(settings: Mapping[str, Any]) -> None:
    """Raise BadInput for a name that is no setting."""
    known = {*ARGUMENTS, "out", *(option.name for option in OPTIONS if option.name and option.name not in COMMAND_ONLY)}
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise BadInput(f"unknown setting {name}{f': did you mean {close[0]}?' if close else ''}")


def _chosen(settings: dict[str, Any]) -> dict[str, Any]:
    from .optimizers import DEFAULTS  # imports torch

    task_name(settings.get("task", "text"))
    default = by_default(settings, DEFAULTS)
    return {name: value for name, value in settings.items() if name not in default and name != "device"}


def by_default(settings: Mapping[str, Any], optimizer_defaults: dict[str, dict[str, Any]]) -> set[str]:
    """Which of DERIVED have the value that the rest of a run's settings, all of which are given, would give them."""
    device, found = settings.get("device", "cpu"), set()
    if settings.get("batch_size") == "full":  # nobody's config.json: there it is a number
        return found
    for name in DERIVED:
        rest = {other: value for other, value in settings.items() if other not in (name, "device")}
        default = getattr(fill(rest, device, optimizer_defaults), name)
        same = default == settings.get(name)
        if same or (isinstance(default, float) and math.isclose(default, settings.get(name, math.nan))):
            found.add(name)
    return found


def _load(path: Path, source: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes(), object_pairs_hook=_object, parse_constant=_refuse)
    except FileNotFoundError:
        raise BadInput(f"{source}: no such file") from None
    except IsADirectoryError:
        inside = path / "config.json"
        hint = f"the settings of this run are in {inside}" if inside.is_file() else "name a JSON file of settings"
        raise BadInput(f"{source} is a folder: {hint}") from None
    except OSError as error:
        raise BadInput(f"{source} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or one of the two below
        raise BadInput(f"{source} is not a JSON object of settings: {error}") from None
    if not isinstance(content, dict):
        raise BadInput(f'{source} holds {_kind(content)}, not an object of settings such as {{"lr": 0.003}}')
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is in it twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"JSON has no {constant}")


def _accepted(option: click.Parameter | None) -> tuple[tuple[type, ...], str]:
    if option is None:
        return (dict,), 'an object of arguments such as {"eps": 1e-8}'
    if option.multiple:
        return (list,), "a list of strings"
    return TYPES.get(option.type, ((str, int, float), "a string or a number"))


def _checked(name: str, value: Any, option: click.Parameter | None, source: str) -> Any:
    """`value` as its option would have given it; None: it has none, and is an object of arguments."""
    types, wanted = _accepted(option)
    fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if not fits or (isinstance(value, list) and not all(isinstance(item, str) for item in value)):
        raise BadInput(f"{source}: {name} must be {wanted}, not {_kind(value)}")
    if isinstance(value, dict):
        return {key: _tuples(argument) for key, argument in value.items()}
    if isinstance(value, list):
        return tuple(value)
    assert option is not None  # its value would be an object
    try:
        return option.type.convert(str(value), option, None)
    except click.BadParameter as error:
        raise BadInput(f"{source}: {name}: {error.message.rstrip('.')}") from None


def _tuples(value: Any) -> Any:
    """JSON has lists where Python's arguments, such as betas, are tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _kind(value: Any) -> str:
    """What was found instead, for a message."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "an object"
    return f"the string {value!r}" if isinstance(value, str) else json.dumps(value)
