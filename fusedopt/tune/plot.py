"""history.png, importance.png, slices.png: what a study has found, and which settings it depends on."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.distributions import FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from ..train.files import write_atomically
from .plan import Plan
from .study import outcome, results

MARKS = {"pruned": ("v", "tab:gray"), "diverged": ("x", "tab:red"), "failed": ("|", "tab:purple")}
"""Outcome → marker and colour at the edge of a plot: these have no result to draw."""


def plot_study(folder: Path, study: optuna.Study, plan: Plan) -> dict[str, str]:
    """Draw what can be drawn: file name → "" or why it was left out."""
    trials = results(study)
    complete = [trial for trial in trials if outcome(trial)[0] == "complete"]
    _save(folder / "history.png", _history(trials, complete, plan))
    _save(folder / "slices.png", _slices(trials, complete, plan))
    importance = importances(study)
    if isinstance(importance, str):
        (folder / "importance.png").unlink(missing_ok=True)
        return {"history.png": "", "slices.png": "", "importance.png": f"not drawn, {importance}"}
    _save(folder / "importance.png", _importance(importance, plan, len(_valued(study))))
    return {"history.png": "", "slices.png": "", "importance.png": ""}


def importances(study: optuna.Study) -> dict[str, float] | str:
    """The share of each setting in how the best trials differ from all, by PED-ANOVA; or why it is not known."""
    if len({trial.value for trial in _valued(study)}) < 2:
        return "it needs two trials with different results"
    return optuna.importance.get_param_importances(study)


def _valued(study: optuna.Study) -> list[FrozenTrial]:
    """What Optuna counts as complete: the diverged trials too, the pruned ones not."""
    return [trial for trial in results(study) if trial.state == TrialState.COMPLETE]


def _history(trials: list[FrozenTrial], complete: list[FrozenTrial], plan: Plan) -> Figure:
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="trial", ylabel=plan.objective)
    values = [t.value or 0.0 for t in complete]
    better = min if plan.direction == "minimize" else max
    axes.plot([t.number for t in complete], values, "o", color="tab:blue", markersize=5, label="completed")
    best = [better(values[: i + 1]) for i in range(len(values))]
    axes.step([t.number for t in complete], best, where="post", color="tab:orange", label="best so far")
    _edge(axes, trials, lambda t: t.number)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _slices(trials: list[FrozenTrial], complete: list[FrozenTrial], plan: Plan) -> Figure:
    columns = min(3, len(plan.space))
    rows = math.ceil(len(plan.space) / columns)
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.2 * rows), layout="constrained")
    for i, dimension in enumerate(plan.dimensions):
        axes = figure.add_subplot(rows, columns, i + 1, xlabel=dimension.name)
        axes.set_ylabel(plan.objective if i % columns == 0 else "")
        places = {text: n for n, text in enumerate(dimension.choices)}

        def place(trial: FrozenTrial, name: str = dimension.name, places: dict[str, int] = places) -> float:
            drawn = trial.params[name]
            return places[drawn] if places else drawn

        drawn = axes.scatter(
            [place(t) for t in complete],
            [t.value or 0.0 for t in complete],
            c=[t.number for t in complete],
            cmap="viridis",
            s=25,
        )
        _edge(axes, [t for t in trials if dimension.name in t.params], place)
        if places:
            axes.set_xticks(list(places.values()), list(places))
        found = dimension.distribution
        if isinstance(found, FloatDistribution | IntDistribution) and found.log:
            axes.set_xscale("log")
        axes.grid(alpha=0.3)
        if i + 1 == len(plan.space) and complete:
            figure.colorbar(drawn, ax=figure.axes, label="trial")
    return figure


def _importance(importance: dict[str, float], plan: Plan, count: int) -> Figure:
    names = list(importance)[::-1]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(names)), layout="constrained")
    axes = figure.add_subplot(xlabel=f"share of the importance for {plan.objective}, by PED-ANOVA over {count} trials")
    bars = axes.barh(names, [importance[name] for name in names], color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.1)
    axes.grid(axis="x", alpha=0.3)
    return figure


def _edge(axes: Axes, trials: list[FrozenTrial], place: Callable[[FrozenTrial], float]) -> None:
    """Mark trials without a result along the upper edge."""
    for name, (marker, colour) in MARKS.items():
        found = [place(t) for t in trials if outcome(t)[0] == name]
        if found:
            heights = [1.03] * len(found)
            style: dict[str, Any] = dict(color=colour, linestyle="", clip_on=False, markersize=6, label=name)
            axes.plot(found, heights, marker=marker, transform=axes.get_xaxis_transform(), **style)


def _save(path: Path, figure: Figure) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(path, buffer.getvalue())
