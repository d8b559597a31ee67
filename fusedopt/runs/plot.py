"""Loss curves of several runs in one picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fusedopt.train.errors import BadInput

from .folders import METRICS, Run, number, read_rows
from .table import places

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SUFFIXES = ("png", "svg", "pdf")


def check_file(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is drawn."""
    if path.suffix[1:].lower() not in SUFFIXES:
        raise BadInput(f"--plot {path}: a picture ends in .{', .'.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise BadInput(f"--plot {path}: there is no folder {path.parent}")


def draw(runs: Sequence[Run]) -> Figure:
    """Training losses, smoothed, and validation losses at their points; a colour for each run."""
    from matplotlib.figure import Figure

    from fusedopt.train.plot import smooth

    figure = Figure(figsize=(9, 5), layout="constrained")
    units = {run.results["unit"] for run in runs}
    unit = f"nats per {units.pop()}" if len(units) == 1 and None not in units else "nats"
    axes = figure.add_subplot(xlabel="step", ylabel=f"cross-entropy ({unit})")
    for i, (run, place) in enumerate(zip(runs, places(runs)[1], strict=True)):
        rows = read_rows((run.folder / METRICS).read_bytes().splitlines())
        losses, validation = (
            {row["step"]: value for row in rows if (value := number(row.get(key))) is not None}
            for key in ("loss", "val_loss")
        )
        if losses:
            smoothed = smooth(list(losses.values()), max(1, len(losses) // 40))
            axes.plot(list(losses), smoothed, color=f"C{i}", linewidth=1, alpha=0.6)
        axes.plot(list(validation), list(validation.values()), "o", color=f"C{i}", markersize=5, label=place)
    axes.set_title("training, smoothed (lines) and validation (points)", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def write(figure: Figure, path: Path) -> None:
    """Write the picture, in the format that its name ends in."""
    from fusedopt.train.files import write_atomically

    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:].lower(), dpi=120)
    write_atomically(path, buffer.getvalue())
