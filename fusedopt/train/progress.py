"""What a person sees: a live bar on a terminal, a line per evaluation everywhere, and the report at the end."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .config import TrainConfig


class ProgressView:
    """Progress bar with loss, validation loss, lr, gradient norm and tokens/s of the newest step."""

    def __init__(self, console: Console, config: TrainConfig, step: int) -> None:
        self._console, self._config = console, config
        self._progress = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=8),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=config.steps, completed=step, state="")
        self._val_loss: float | None = None
        self._started = time.perf_counter()

    def __enter__(self) -> ProgressView:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @property
    def seconds(self) -> float:
        """Time since this view was made."""
        return time.perf_counter() - self._started

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Show the newest row of our run; print a line when it was evaluated."""
        ours = next(row for row in reversed(rows) if row["run"] == "fusedopt")
        self._val_loss = ours.get("val_loss", self._val_loss)
        self._progress.update(self._task, completed=ours["step"], state=self._state(ours))
        if "val_loss" in ours:
            width = len(str(self._config.steps))
            line = f"step {ours['step']:>{width}}/{self._config.steps}  {self._state(ours)}"
            other = next((row for row in reversed(rows) if row["run"] == "torch"), None)
            if other:
                line += f"  torch val {other['val_loss']:.3f}  max |dp| {ours['largest_difference']:.1e}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _state(self, row: dict[str, Any]) -> str:
        validation = "" if self._val_loss is None else f"val {self._val_loss:.3f}"
        if "loss" not in row:
            return validation
        return (
            f"loss {row['loss']:.3f} {validation} lr {row['lr']:.1e} grad {row['grad_norm']:.2f} "
            f"{row['tokens_per_s']:,} tok/s"
        )


def report(console: Console, summary: dict[str, Any], folder: Path, seconds: float) -> None:
    """Print the result: losses, the comparison when there was one, and where the files are."""
    runs = summary["runs"]
    minutes, rest = divmod(round(seconds), 60)
    lines = [f"step {summary['step']} after {minutes} min {rest} s"]
    for run in runs.values():
        if run["val_loss_first"] is not None:
            change = f"{run['val_loss_first']:.4f} -> {run['val_loss_last']:.4f}"
            lines.append(f"{run['optimizer']}: validation loss {change} nats per byte")
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    if "parameter_difference" in summary:
        table = Table("", *(run["optimizer"] for run in runs.values()), title="comparison, same seed")
        for label, key in (("optimizer step, median ms", "optimizer_ms"), ("training step, median ms", "step_ms")):
            table.add_row(label, *(f"{run[key]:.3f}" for run in runs.values()))
        console.print(table)
        for entry in summary["parameter_difference"]:
            line = f"largest parameter difference after step {entry['step']}: {entry['largest_difference']:.3e}"
            console.print(f"{line} in {entry['largest_difference_in']}", highlight=False, markup=False, soft_wrap=True)
    files = ", ".join(path.name for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    console.print(f"{folder}: {files}", highlight=False, markup=False, soft_wrap=True)
