"""What a person sees of a study: a line per trial, the table of the best, and `best.json`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any

from optuna.trial import FrozenTrial
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..train.errors import BadInput
from ..train.files import write_atomically
from ..train.sizes import COMMON, SIZES
from . import plot, samplers, space
from .plan import Plan
from .study import load, outcome, results, trial_folder

SHOWN = 10
"""Rows of the table."""
RECORDED = ("task", *COMMON["translate"], *SIZES["text"]["cpu"], "optimizer", "lr", "weight_decay")
"""Settings in best.json that the search left at their defaults: those differ from machine to machine."""


def introduction(plan: Plan, jobs: int) -> list[str]:
    """What is about to be searched, and how."""
    fixed = "  ".join(f"{name}={value}" for name, value in plan.settings.items())
    blind = plan.pruner != "none" and plan.sampler not in samplers.SEE_PRUNED
    return [
        "search: " + "  ".join(f"{name}={text}" for name, text in plan.space.items()),
        f"fixed: {fixed or 'nothing, all at their defaults'}",
        f"{plan.trials} trials by {plan.sampler}, {jobs} at a time, best {plan.objective} ({plan.direction}); pruner "
        f"{plan.pruner}; seed of the search {plan.search_seed}",
        *([f"{plan.sampler} learns nothing from pruned trials, and may propose the like again"] if blind else []),
    ]


class View:
    """Prints each trial that ends; on a terminal, a bar with the best and the running ones."""

    def __init__(self, console: Console, folder: Path) -> None:
        self._console = console
        self._study, self._plan = load(folder)
        self._told = {trial.number for trial in results(self._study)}
        columns = (MofNCompleteColumn(), BarColumn(bar_width=8), TextColumn("{task.fields[state]}", markup=False))
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("tune", total=self._plan.trials, completed=len(self._told), state="")

    def __enter__(self) -> View:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def changed(self) -> None:
        """Look at the study again."""
        trials = self._study.get_trials(deepcopy=False)
        ended = [trial for trial in trials if trial.state.is_finished()]
        best = ranked(ended, self._plan)[:1]
        for trial in ended:
            if trial.number not in self._told:
                self._told.add(trial.number)
                line = f"trial {trial.number}: {describe(trial, self._plan)}  {drawn(trial)}"
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)
        state = [f"best {best[0].value:.4f} (trial {best[0].number})"] if best else []
        state += [f"{t.number}: {_newest(t)}" for t in trials if not t.state.is_finished()]
        self._progress.update(self._task, completed=len(ended), state=", ".join(state))


def ranked(trials: list[FrozenTrial], plan: Plan) -> list[FrozenTrial]:
    """Completed trials, the best first."""
    sign = 1 if plan.direction == "minimize" else -1
    found = [trial for trial in trials if outcome(trial)[0] == "complete"]
    return sorted(found, key=lambda trial: (sign * (trial.value or 0.0), trial.number))


def describe(trial: FrozenTrial, plan: Plan) -> str:
    """The result of a finished trial in a few words."""
    name, reason = outcome(trial)
    return f"{plan.objective} {trial.value:.4f}" if name == "complete" else f"{name}: {reason}"


def drawn(trial: FrozenTrial) -> str:
    """The searched settings of a trial."""
    return "  ".join(f"{name}={_number(value)}" for name, value in trial.params.items())


def conclude(console: Console, folder: Path) -> bool:
    """Write best.json and the plots, and print what came out. Whether any trial was completed."""
    study, plan = load(folder)
    trials = results(study)
    counts = Counter(outcome(trial)[0] for trial in trials)
    parts = ", ".join(f"{n} {name}" for name, n in counts.most_common())
    lines = [f"{len(trials)} of {plan.trials} trials: {parts}" if trials else "no trial has ended"]
    best = ranked(trials, plan)
    if best:
        console.print(_table(best[:SHOWN], plan))
        content = json.dumps(best_settings(folder, plan, best[0]), indent=1).encode() + b"\n"
        write_atomically(folder / "best.json", content)
        lines.append(f"the best, trial {best[0].number}: fusedopt train --config {folder / 'best.json'}")
    drawings = plot.plot_study(folder, study, plan) if trials else {}
    lines += [f"{name}: {reason}" for name, reason in drawings.items() if reason]
    files = [name for name, reason in drawings.items() if not reason]
    lines += [f"{folder}: {', '.join(files)}"] if files else []
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    return bool(best)


def best_settings(folder: Path, plan: Plan, best: FrozenTrial) -> dict[str, Any]:
    """The settings of a trial as `fusedopt train --config` takes them: what was fixed and drawn, and the sizes."""
    path = trial_folder(folder, best.number) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise BadInput(f"cannot read {path}, the settings of the best trial") from None
    chosen = space.settings(plan.settings, plan.dimensions, best.params)
    follows = {"lr": "lr_scaling", "steps": "epochs"}  # numbers that come of these, and would do so again
    recorded = {name: config[name] for name in RECORDED if name in config and follows.get(name) not in chosen}
    return {**recorded, **chosen}


def _table(best: list[FrozenTrial], plan: Plan) -> Table:
    table = Table("trial", plan.objective, *plan.space)
    for trial in best:
        table.add_row(str(trial.number), f"{trial.value:.4f}", *(_number(trial.params[name]) for name in plan.space))
    return table


def _newest(trial: FrozenTrial) -> str:
    step = trial.last_step
    return "starts" if step is None else f"val {trial.intermediate_values[step]:.3f} ({step})"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
