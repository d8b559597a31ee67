"""The search space: `--space NAME=SPEC` as distributions of Optuna, and what was drawn from them as settings."""

from __future__ import annotations

import ast
import copy
import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

import fusedopt

from ..rules import RULES
from ..train.config import TrainConfig
from ..train.errors import BadInput

Settings = dict[str, Any]

NESTED = ("optimizer_args", "schedule_args")
NOT_SEARCHED = {
    "out", "text", "task", "device", "compare", "backend", "lr_file", "val_interval", "val_batches", "log_interval",
    "checkpoint_interval", *NESTED,
}  # fmt: skip
UNIT = ("tokenizer", "vocabulary_size")
"""What the unit of the loss depends on: losses of different values do not compare."""
KINDS: dict[str, str] = {
    **{field.name: str(field.type) for field in fields(TrainConfig) if field.name not in NOT_SEARCHED},
    "epochs": "float", "lr_scaling": "str", "base_batch_size": "int",
}  # fmt: skip
PARSERS: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
RANGE = re.compile(r"(?:(log|int):)?([^:,]+):([^:,]+)(?::([^:,]+))?")
FORMS = "LOW:HIGH, LOW:HIGH:STEP, log:LOW:HIGH, int:LOW:HIGH or a list A,B,C"


@dataclass(frozen=True)
class Dimension:
    """One searched setting. text: its range or list as it was given; choices: the values of a list by their text."""

    name: str
    text: str
    distribution: BaseDistribution
    choices: dict[str, Any]

    def value(self, drawn: Any) -> Any:
        """The setting's value for what the study holds: of a list Optuna knows the texts."""
        return self.choices[drawn] if self.choices else drawn

    def points(self) -> list[Any]:
        """Every value that can be drawn, in order. BadInput where they are not a handful."""
        found = self.distribution
        if self.choices:
            return list(self.choices)
        assert isinstance(found, IntDistribution | FloatDistribution)
        if found.log or found.step is None:
            raise BadInput(f"--sampler grid: {self.name}={self.text} has no points: list them, or give LOW:HIGH:STEP")
        count = round((found.high - found.low) / found.step) + 1
        points = [found.low + i * found.step for i in range(count)]
        return points if isinstance(found, IntDistribution) else [min(round(x, 12), found.high) for x in points]

    def ends(self) -> list[Any]:
        """The values of a list, the ends of a range: what a check tries."""
        found = self.distribution
        if isinstance(found, IntDistribution | FloatDistribution):
            return [found.low, found.high]
        return list(self.choices)


def parse(space: dict[str, str]) -> list[Dimension]:
    """The dimensions of a search space by name. BadInput for the first that cannot be searched."""
    dimensions = [_dimension(name, text) for name, text in space.items()]
    if not dimensions:
        raise BadInput("nothing to search: everything that is searched by default is fixed; give --space NAME=RANGE")
    for name in space:
        inside = next((other for other in space if other.startswith(name + ".")), None)
        if inside:
            raise BadInput(f"--space searches {inside} inside {name}, which it searches too: drop one")
    return dimensions


def split(entries: Iterable[str]) -> dict[str, str]:
    """`("lr=log:1e-4:1e-1", …)` as a dictionary, with names as settings are spelled."""
    space: dict[str, str] = {}
    for entry in entries:
        name, equals, text = entry.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not (name and equals and text.strip()):
            raise BadInput(f"--space {entry!r}: write NAME=RANGE, with {FORMS}")
        if name in space:
            raise BadInput(f"--space names {name} twice")
        space[name] = text.strip()
    return space


def settings(fixed: Settings, dimensions: Sequence[Dimension], drawn: dict[str, Any]) -> Settings:
    """The settings of a trial: the fixed ones and those that were drawn."""
    result = {name: _tuples(value) if name in NESTED else value for name, value in copy.deepcopy(fixed).items()}
    for dimension in sorted(dimensions, key=lambda d: "." in d.name):  # arguments after the class that they are of
        _assign(result, dimension.name, dimension.value(drawn[dimension.name]))
    return result


def default(config: TrainConfig, given: Settings, works: Callable[[Settings], bool]) -> dict[str, str]:
    """What is searched when nothing is said, without what was given: lr, weight decay where there is one, warm-up.

    works: whether runs accept a setting.
    """
    space = {"lr": f"log:{config.lr / 10:g}:{config.lr * 10:g}"}
    if works({"weight_decay": 0.1}):
        space["weight_decay"] = "log:0.001:1"
    if config.steps >= 10:
        space["warmup_steps"] = f"0:{config.steps // 5}"
    return {name: text for name, text in space.items() if name not in given}


def check(
    fixed: Settings, dimensions: Sequence[Dimension], validated: Callable[[Settings], TrainConfig]
) -> TrainConfig:
    """Refuse a value that no run accepts beside the other dimensions' first or last ones. A run that is accepted."""
    accepted: TrainConfig | None = None
    for dimension in dimensions:
        others = [d for d in dimensions if d is not dimension]
        for drawn in dimension.ends():
            problem = None
            for end in (0, -1):
                values = {**{d.name: d.ends()[end] for d in others}, dimension.name: drawn}
                try:
                    accepted = validated(settings(fixed, dimensions, values))
                    break
                except BadInput as error:
                    problem = problem or error
            else:
                raise BadInput(f"--space {dimension.name}={dimension.text}, at {drawn}: {problem}")
    assert accepted is not None
    return accepted


def _dimension(name: str, text: str) -> Dimension:
    kind = _kind(name)
    where = f"--space {name}={text}"
    if text.startswith(("log:", "int:")) or (":" in text and not text.startswith(("(", "[", "{"))):
        found = RANGE.fullmatch(text)
        if not found:
            raise BadInput(f"{where}: write {FORMS}")
        return Dimension(name, text, _range(where, kind, *found.groups()), {})
    texts = [item.strip() for item in re.split(r",(?![^(\[]*[)\]])", text)]
    full = ("full",) if name == "batch_size" else ()
    choices = {item: item if item in full else _value(where, kind, item) for item in texts}
    if len(texts) == 1:
        raise BadInput(f"{where} is a single value, which is nothing to search: fix it as an option, or write {FORMS}")
    if len(choices) < len(texts) or any(
        a == b for i, a in enumerate(choices.values()) for b in list(choices.values())[:i]
    ):
        raise BadInput(f"{where} names a value twice")
    return Dimension(name, text, CategoricalDistribution(list(choices)), choices)


def _kind(name: str) -> str:
    """The type of a setting: "int", "float", "str" …, "any" for an argument of the optimizer or the schedule."""
    parts = name.split(".")
    if parts[0] in NESTED and len(parts) in (2, 3) and all(parts) and (len(parts) == 2 or parts[2].isdigit()):
        return "any"
    if name in KINDS:
        return KINDS[name]
    if name in NOT_SEARCHED:
        example = f": name one of its arguments, such as {name}.eps" if name in NESTED else ""
        raise BadInput(f"--space {name}: this setting is not searched{example}")
    raise BadInput(f"--space: unknown setting {name}; {_hint(name)} (known: {', '.join(sorted(KINDS))})")


def _hint(name: str) -> str:
    arguments = {argument for class_name in RULES.values() for argument in _parameters(class_name)}
    if beta := re.fullmatch(r"beta_?([1-9])", name):
        return f"write optimizer_args.betas.{int(beta[1]) - 1}, counted from 0"
    if name in arguments:
        return f"an argument of the optimizer is optimizer_args.{name}"
    close = difflib.get_close_matches(name, KINDS, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else "arguments of the optimizer are optimizer_args.NAME"


def _range(where: str, kind: str, scale: str | None, *texts: str | None) -> IntDistribution | FloatDistribution:
    if kind not in ("int", "float", "any"):
        raise BadInput(f"{where}: this setting is not a number; list its values: A,B,C")
    whole = "int" in (kind, scale)
    low, high, step = (None if text is None else _value(where, "int" if whole else "float", text) for text in texts)
    assert low is not None and high is not None
    if low > high:
        raise BadInput(f"{where} is empty: {low} is more than {high}")
    if low == high:
        raise BadInput(f"{where} holds a single value: fix it as an option instead")
    if scale == "log" and low <= 0:
        raise BadInput(f"{where}: a logarithmic range begins above 0")
    if step is not None:
        steps = (high - low) / step if step > 0 else 0.5
        if scale == "log":
            raise BadInput(f"{where}: a logarithmic range has no step; list the values instead")
        if not abs(steps - round(steps)) < 1e-9:
            raise BadInput(f"{where}: steps of {step} do not lead from {low} to {high}")
    log = scale == "log"
    return IntDistribution(low, high, log, step or 1) if whole else FloatDistribution(low, high, log, step)


def _value(where: str, kind: str, text: str) -> Any:
    if kind in PARSERS:
        try:
            value = PARSERS[kind](text)
        except ValueError:
            raise BadInput(f"{where}: {text!r} is not {'a whole number' if kind == 'int' else 'a number'}") from None
        if kind == "float" and not math.isfinite(value):
            raise BadInput(f"{where}: {text} is not finite")
        return value
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def _tuples(value: Any) -> Any:
    """What JSON has made of tuples, such as betas, as it was."""
    if isinstance(value, dict):
        return {name: _tuples(item) for name, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _assign(target: Settings, name: str, value: Any) -> None:
    """Set `lr`, `optimizer_args.eps` or, of a tuple, one entry: `optimizer_args.betas.1`."""
    group, *rest = name.split(".")
    if not rest:
        target[group] = value
        return
    arguments = target.setdefault(group, {})
    if len(rest) == 1:
        arguments[rest[0]] = value
        return
    entries, index = arguments.get(rest[0]) or _class_default(target, group, rest[0]), int(rest[1])
    if not isinstance(entries, tuple | list) or index >= len(entries):
        raise BadInput(f"--space {name}: {rest[0]} of {target.get('optimizer', 'adamw')} has no entry {index}")
    arguments[rest[0]] = tuple(value if i == index else entry for i, entry in enumerate(entries))


def _class_default(target: Settings, group: str, name: str) -> Any:
    """The default of an argument of the optimizer's class, None without one."""
    class_name = RULES.get(target.get("optimizer", "adamw").lower())
    if group != "optimizer_args" or class_name is None or name not in _parameters(class_name):
        return None
    return _parameters(class_name)[name].default


def _parameters(class_name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(getattr(fusedopt, class_name)).parameters
