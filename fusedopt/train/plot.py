"""loss.png: training and validation loss of one run, or of both runs of a comparison."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .checkpoint import write_atomically

FILE_NAME = "loss.png"
COLOURS = {"fusedopt": "tab:blue", "torch": "tab:orange"}
STYLES = {"fusedopt": "-", "torch": (0, (3, 3))}  # dashed on top: equal curves stay visible as two


def smooth(values: Sequence[float], width: int) -> np.ndarray:
    """The mean of each value's neighbourhood of `width` values, at the ends of as much of it as there is."""
    window = np.ones(min(width, len(values)))
    counts = np.convolve(np.ones(len(values)), window, mode="same")
    return np.convolve(np.asarray(values), window, mode="same") / counts


def plot_loss(folder: Path, rows: list[dict[str, Any]], names: dict[str, str]) -> None:
    """Draw `rows` of metrics.jsonl. `names` maps a run ("fusedopt", "torch") to its label."""
    curves: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        for key in ("loss", "val_loss"):
            if key in row:
                curves[row["run"], key].append((row["step"], row[key]))
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="cross-entropy (nats per byte)")
    for run, name in names.items():
        colour, style = COLOURS[run], STYLES[run]
        if curves[run, "loss"]:
            steps, losses = zip(*curves[run, "loss"], strict=True)
            if len(names) == 1:
                axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            smoothed = smooth(losses, width=max(1, len(losses) // 40))
            axes.plot(steps, smoothed, color=colour, linestyle=style, label=f"{name}: training, smoothed")
        if curves[run, "val_loss"]:
            steps, losses = zip(*curves[run, "val_loss"], strict=True)
            size = 7 if run == "fusedopt" else 4
            axes.plot(steps, losses, "o:", color=colour, linewidth=1, markersize=size, label=f"{name}: validation")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    write_atomically(folder / FILE_NAME, buffer.getvalue())
