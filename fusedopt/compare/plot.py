"""The plots of a comparison: mean lines, and bands from the lowest to the highest seed."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..train.files import write_atomically
from . import classes, results
from .results import Group

CURVES, SCHEDULES, BATCHES = "curves", "schedules", "batch-sizes"
_PAIRS = colormaps["tab20"].colors  # type: ignore[attr-defined]  # a listed colour map has them
COLOURS = [*_PAIRS[::2], *_PAIRS[1::2]]  # strong ones first
MARKERS = "osD^vP*X"
LINES = "-", "--", ":", "-."
LABEL = "validation loss (nats)"


def draw(groups: Sequence[Group], folder: Path, stem: str) -> dict[str, str]:
    """Write the plots that these groups allow, as `folder`/`stem`-NAME.png. Their file names by name."""
    finished = [group for group in groups if group.done]
    figures: dict[str, Figure] = {}
    if finished:
        figures[CURVES] = curves(finished)
    if any(group.batch_size is not None for group in finished):
        figures[BATCHES] = by_batch_size(finished)
    elif len({group.schedule for group in finished}) > 1:
        figures[SCHEDULES] = by_schedule(finished)
    for name, figure in figures.items():
        save(figure, folder / f"{stem}-{name}.png")
    return {name: f"{stem}-{name}.png" for name in figures}


def save(figure: Figure, path: Path) -> None:
    """As a PNG of 64 colours, which keeps it small."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=100, bbox_inches="tight")
    with Image.open(full) as image:
        image.convert("RGB").quantize(64).save(small, format="png", optimize=True)
    write_atomically(path, small.getvalue())


def curves(groups: Sequence[Group]) -> Figure:
    """Validation loss over steps: a column of panels per class, a row per schedule, or per batch size of the first
    schedule, on one scale.
    """
    if any(group.batch_size is not None for group in groups):
        groups = [group for group in sorted(groups, key=results.examples) if group.schedule == groups[0].schedule]
    rows = list(dict.fromkeys((group.schedule, group.batch_size) for group in groups))
    figure, panels = _panels(groups, [name if size is None else f"{name}, batch {size}" for name, size in rows])
    for (row, title), axes in zip(product(rows, _classes(groups)), panels.flat, strict=True):
        for name in classes.CLASSES[title]:
            for group in groups:
                if (group.optimizer, group.schedule, group.batch_size) == (name, *row):
                    _curve(axes, group)
        axes.set_xlabel("step")
    return _finish(figure, panels)


def _curve(axes: Axes, group: Group) -> None:
    """The steps that all finished seeds have: one that stopped early ends the line."""
    seeds = [dict(row["curve"]) for row in group.done]
    steps = sorted(set.intersection(*map(set, seeds)))
    values = [[curve[step] for curve in seeds] for step in steps]
    colour = _colour(group.optimizer)
    axes.plot(steps, [statistics.fmean(v) for v in values], color=colour, label=group.optimizer, linewidth=1.4)
    axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2, linewidth=0)


def by_schedule(groups: Sequence[Group]) -> Figure:
    """Final loss of each optimizer: a marker for each schedule, a bar from the lowest to the highest seed."""
    schedules = list(dict.fromkeys(group.schedule for group in groups))
    figure, panels = _panels(groups, [""])
    for title, axes in zip(_classes(groups), panels.flat, strict=True):
        names = [name for name in classes.CLASSES[title] if any(group.optimizer == name for group in groups)]
        for i, schedule in enumerate(schedules):
            own = [group for group in groups if group.optimizer in names and group.schedule == schedule]
            at = [names.index(group.optimizer) + (i - (len(schedules) - 1) / 2) * 0.5 / len(schedules) for group in own]
            _points(axes, at, own, color=COLOURS[i % 20], marker=MARKERS[i % 8], linestyle="", label=schedule)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_xlim(-0.6, len(names) - 0.4)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def by_batch_size(groups: Sequence[Group]) -> Figure:
    """Final loss over the examples in a mini-batch: a line for each optimizer and schedule."""
    schedules = list(dict.fromkeys(group.schedule for group in groups))
    figure, panels = _panels(groups, [""], len(schedules))
    for title, axes in zip(_classes(groups), panels.flat, strict=True):
        for name, (i, schedule) in product(classes.CLASSES[title], enumerate(schedules)):
            own = [group for group in groups if (group.optimizer, group.schedule) == (name, schedule)]
            own.sort(key=results.examples)
            at = [results.examples(group) for group in own]
            if own:
                style = dict(color=_colour(name), marker=MARKERS[i % 8], linestyle=LINES[i % 4])
                _points(axes, at, own, label=name if len(schedules) == 1 else f"{name}, {schedule}", **style)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("examples in a mini-batch")
    return _finish(figure, panels)


def _panels(groups: Sequence[Group], rows: Sequence[str], styles: int = 1) -> tuple[Figure, Any]:
    """A column of panels for each class, all with the same losses. styles: entries of an optimizer in the legend."""
    titles = _classes(groups)
    names = {group.optimizer for group in groups}
    lines = styles * max(len(names & classes.CLASSES[title].keys()) for title in titles)
    figure = Figure(figsize=(0.8 + 3.2 * len(titles), 0.6 + 2.5 * len(rows) + 0.1 * lines), layout="constrained")
    panels = figure.subplots(len(rows), len(titles), squeeze=False, sharey=True)
    for (row, title), axes in zip(product(rows, titles), panels.flat, strict=True):
        axes.set_title("\n".join(filter(None, (title, row))), fontsize="medium")
        axes.set_ylim(*_range(groups))
        axes.grid(alpha=0.3)
    for axes in panels[:, 0]:
        axes.set_ylabel(LABEL)
    return figure, panels


def _finish(figure: Figure, panels: Any) -> Figure:
    """Legends below the lowest panels: within, many names would hide the lines."""
    for axes in panels[-1]:
        axes.legend(fontsize="x-small", loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=2, frameon=False)
    return figure


def _points(axes: Axes, at: Sequence[float], groups: Sequence[Group], **style: Any) -> None:
    found = [spread for group in groups if (spread := group.spread("val_loss_last"))]
    means = [spread.mean for spread in found]
    error = [[spread.mean - spread.low for spread in found], [spread.high - spread.mean for spread in found]]
    axes.errorbar(at, means, error, capsize=3, markersize=5, linewidth=1.2, **style)


def _classes(groups: Sequence[Group]) -> list[str]:
    found = {classes.class_of(group.optimizer) for group in groups}
    return [title for title in classes.CLASSES if title in found]


def _range(groups: Sequence[Group]) -> tuple[float, float]:
    """From below the lowest loss to above the usual first one: what exploded leaves the panel, not the rest."""
    rows = [row for group in groups for row in group.done]
    low = min(row["val_loss_best"] for row in rows)
    high = statistics.median(row["val_loss_first"] for row in rows)
    margin = 0.05 * max(high - low, 0.01)
    return low - margin, high + margin


def _colour(name: str) -> tuple[float, ...]:
    """By place in the class: each class has panels of its own."""
    return COLOURS[list(classes.CLASSES[classes.class_of(name)]).index(name) % 20]
