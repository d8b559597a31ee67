"""What a study is: settled from the command line, recorded in the study, and demanded again when it is resumed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..train.config import TrainConfig
from ..train.errors import BadInput
from . import samplers, space
from .names import OBJECTIVES, Direction
from .space import Dimension, Settings

Validated = Callable[[Settings], TrainConfig]

TRIALS = 20


@dataclass(frozen=True)
class Plan:
    """Everything that decides a study. space: name → range as given; settings: those that are fixed; validations: in a
    trial, which pruners count in; trials: in all, the only field that a resumed study may change.
    """

    space: dict[str, str]
    settings: Settings
    sampler: str
    search_seed: int
    pruner: str
    objective: str
    validations: int
    trials: int

    @property
    def dimensions(self) -> list[Dimension]:
        """The space as Optuna has it."""
        return space.parse(self.space)

    @property
    def direction(self) -> Direction:
        """Which way is better."""
        return OBJECTIVES[self.objective]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as the study stores them."""
        return json.loads(json.dumps(asdict(self)))


def settle(given: dict[str, Any], fixed: Settings, own: Settings, validated: Validated) -> Plan:
    """The plan that options ask for. given: those of the search; fixed: settings of the runs; own: those of them that
    are from the command line itself: the others, from ``--config``, may be searched instead.

    Raises:
        BadInput: a search that cannot work; before anything is trained.
    """
    wanted = space.split(given["space"]) if "space" in given else None
    for name in wanted or ():
        _refuse_fixed(name, own)
    if wanted is None:
        wanted = space.default(validated(fixed), own, _works(validated, fixed))
    fixed = {name: value for name, value in fixed.items() if name not in wanted}
    dimensions = space.parse(wanted)
    sampler = given.get("sampler", "tpe")
    samplers.check(sampler, dimensions)
    objective = given.get("objective", "val_loss_best")
    config = space.check(fixed, dimensions, validated)
    _check_objective(objective, wanted, config)
    judged = OBJECTIVES[objective] == "minimize" and sampler in samplers.SEE_PRUNED
    pruner = given.get("pruner", "median" if judged else "none")
    if pruner != "none" and OBJECTIVES[objective] == "maximize":
        raise BadInput(f"--pruner {pruner} judges trials by their validation loss, not by {objective}: --pruner none")
    trials = _trials(given.get("trials", TRIALS if sampler != "grid" else None), sampler, dimensions)
    validations = math.ceil(config.steps / config.val_interval)
    return Plan(wanted, fixed, sampler, given.get("search_seed", 0), pruner, objective, validations, trials)


def continued(plan: Plan, given: dict[str, Any], fixed: Settings, own: Settings) -> Plan:
    """A recorded plan, with a new number of trials. BadInput where options, as for `settle`, ask for another one."""
    for name in plan.space:
        _refuse_fixed(name, own)
    recorded, asked = plan.as_dict(), json.loads(json.dumps(given))
    if "space" in asked:
        asked["space"] = space.split(asked["space"])
    trials = asked.pop("trials", plan.trials)
    found = [
        f"--{name.replace('_', '-')} was {_shown(recorded[name])}, now {_shown(value)}"
        for name, value in asked.items()
        if recorded[name] != value
    ]
    saved = recorded["settings"]
    for name, value in json.loads(json.dumps(fixed)).items():
        if name not in plan.space and saved.get(name) != value:
            found.append(f"{name} was {saved.get(name, 'left at its default')}, now {value}")
    if found:
        raise BadInput(f"this folder holds another study: {'; '.join(found)}; leave that out or use another --out")
    return replace(plan, trials=_trials(trials, plan.sampler, plan.dimensions))


def _refuse_fixed(name: str, own: Settings) -> None:
    group, *rest = name.split(".")
    whole = len(rest) == 1 and rest[0] in own.get(group, ())  # one entry of a tuple is searched beside fixed ones
    if name in own or whole:
        raise BadInput(f"{name} is searched, and fixed by an option too: drop one")


def _works(validated: Validated, fixed: Settings) -> Callable[[Settings], bool]:
    def works(more: Settings) -> bool:
        try:
            validated({**fixed, **more})
        except BadInput:
            return False
        return True

    return works


def _check_objective(objective: str, wanted: dict[str, str], config: TrainConfig) -> None:
    loss = OBJECTIVES[objective] == "minimize"
    if not loss and config.task != "translate":
        raise BadInput(f"--objective {objective} is measured by --task translate, not by {config.task}")
    if objective == "val_loss_ema_last" and config.ema == 0:
        raise BadInput(f"--objective {objective} is the loss of averaged weights: give --ema too")
    unit = [name for name in space.UNIT if name in wanted]
    if loss and unit:
        raise BadInput(f"--space {unit[0]}: losses per token of other tokens do not compare: --objective chrf_held_out")


def _trials(wanted: int | None, sampler: str, dimensions: list[Dimension]) -> int:
    """The number of trials; of a grid no more than it has points."""
    if sampler != "grid":
        return TRIALS if wanted is None else wanted
    size = samplers.grid_size(dimensions)
    return size if wanted is None else min(wanted, size)


def _shown(value: Any) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
