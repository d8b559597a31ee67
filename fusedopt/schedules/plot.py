"""Schedules as small pictures: each is run, on an optimizer whose step does nothing."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .names import Run
from .schedule import make

COLUMNS = 4
VALIDATIONS = 50
"""Per run, for plateau: the loss falls over the first 40 % of them and then stays."""


def trace(name: str, run: Run, arguments: Mapping[str, Any]) -> list[float]:
    """The learning rate of each step of the run."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=run.lr)
    schedule = make(
        name, optimizer, steps=run.steps, warmup_steps=run.warmup_steps, min_lr=run.min_lr,
        epoch_steps=run.epoch_steps, arguments=arguments,
    )  # fmt: skip
    interval = max(1, run.steps // VALIDATIONS)
    rates = []
    for step in range(1, run.steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
        if step % interval == 0:
            schedule.validated(max(0.0, 1.0 - step / (0.4 * run.steps)))
    return rates


def draw(traces: Sequence[tuple[str, list[float]]], format: str) -> bytes:
    """A picture of (title, learning rates), one panel each."""
    columns = min(COLUMNS, len(traces))
    rows = -(-len(traces) // columns)
    figure = Figure(figsize=(3.0 * columns, 2.0 * rows), layout="constrained")
    panels: list[Axes] = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    top = max(max(rates) for _, rates in traces)
    for axes, (title, rates) in zip(panels, traces, strict=False):
        axes.plot(range(1, len(rates) + 1), rates, drawstyle="steps-mid", color="tab:blue", linewidth=1.2)
        axes.set_ylim(-0.04 * top, 1.08 * top or 1.0)
        axes.set_title(title, fontsize="medium")
        axes.tick_params(labelsize="small")
        axes.grid(alpha=0.3)
    for axes in panels[len(traces) :]:
        axes.remove()
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel("learning rate", fontsize="medium")
    content = io.BytesIO()
    figure.savefig(content, format=format, dpi=80)
    return content.getvalue()
