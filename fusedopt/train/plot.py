"""loss.png: losses of one run, or of both runs of a comparison, and below them what the optimizer measured."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .files import write_atomically

FILE_NAME = "loss.png"
COLOURS = {"fusedopt": "tab:blue", "torch": "tab:orange"}
STYLES = {"fusedopt": "-", "torch": (0, (3, 3))}  # dashed on top: equal curves stay visible as two
PANELS = {
    "grad_norm": ("gradient norm", "log"),
    "clip_coefficient": ("clip coefficient", "linear"),
    "param_norm": ("parameter norm", "linear"),
    "update_norm": ("update norm", "log"),
    "update_ratio": ("update norm / parameter norm", "log"),
    "loss_scale": ("loss scale", "log"),
    "skipped_steps": ("skipped steps", "linear"),
}
"""Metric → title and scale of its panel."""

Curves = dict[tuple[str, str], list[tuple[int, float]]]
"""(run, column) → (step, value) of each row that has a number there."""


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """The mean of each value's neighbourhood of `width` values, at the ends of as much of it as there is."""
    window = np.ones(min(width, len(values)))
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(np.asarray(values), window, mode="same") / counts


def plot_run(folder: Path, rows: list[dict[str, Any]], names: dict[str, str], clip: float, unit: str) -> None:
    """Draw `rows` of metrics.jsonl. `names` maps a run ("fusedopt", "torch") to its label; `clip`: 0 = off; the loss is
    in nats per `unit`.
    """
    curves: Curves = defaultdict(list)
    for row in rows:
        for key, value in row.items():
            if isinstance(value, int | float) and key not in ("run", "step"):
                curves[row["run"], key].append((row["step"], value))
    panels = [name for name in PANELS if _is_worth_a_panel(curves, name, clip)]
    heights = [5.0, *[2.2] * -(-len(panels) // 2)]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    axes = figure.add_subplot(grid[0, :], xlabel="step", ylabel=f"cross-entropy (nats per {unit})")
    _draw_losses(axes, curves, names)
    for i, name in enumerate(panels):
        _draw_metric(figure.add_subplot(grid[1 + i // 2, i % 2], sharex=axes), curves, name, clip)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(folder / FILE_NAME, buffer.getvalue())


def _is_worth_a_panel(curves: Curves, name: str, clip: float) -> bool:
    values = [value for run in COLOURS for _, value in curves[run, name]]
    return bool(values) and (name != "clip_coefficient" or clip > 0) and (name != "skipped_steps" or max(values) > 0)


def _draw_losses(axes: Axes, curves: Curves, names: dict[str, str]) -> None:
    for run, name in names.items():
        colour, style = COLOURS[run], STYLES[run]
        if curves[run, "loss"]:
            steps, losses = zip(*curves[run, "loss"], strict=True)
            if len(names) == 1:
                axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            smoothed = smooth(losses, width=max(1, len(losses) // 40))
            axes.plot(steps, smoothed, color=colour, linestyle=style, label=f"{name}: training, smoothed")
        size = 7 if run == "fusedopt" else 4
        for key, marker, label in (("val_loss", "o:", "validation"), ("val_loss_ema", "s--", "averaged weights")):
            if curves[run, key]:
                steps, losses = zip(*curves[run, key], strict=True)
                axes.plot(steps, losses, marker, color=colour, linewidth=1, markersize=size, label=f"{name}: {label}")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_metric(axes: Axes, curves: Curves, name: str, clip: float) -> None:
    title, scale = PANELS[name]
    for run, colour in COLOURS.items():
        if curves[run, name]:
            steps, values = zip(*curves[run, name], strict=True)
            axes.plot(steps, values, color=colour, linestyle=STYLES[run], linewidth=0.8)
    if name == "grad_norm" and clip > 0:
        axes.axhline(clip, color="tab:red", linewidth=0.8, label=f"clipped at {clip:g}")
        axes.legend(fontsize="small")
    if name == "clip_coefficient" and curves["fusedopt", "clipped_share"]:
        steps, values = zip(*curves["fusedopt", "clipped_share"], strict=True)
        axes.plot(steps, values, color="tab:red", linewidth=1.2, label="share of steps clipped so far")
        axes.set_ylim(-0.05, 1.05)
        axes.legend(fontsize="small")
    axes.set_title(title, fontsize="medium")
    if scale == "log" and any(value > 0.0 for run in COLOURS for _, value in curves[run, name]):
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
