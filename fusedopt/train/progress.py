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
    """Progress bar with losses, lr, gradient norm and tokens/s of the newest step; under fp16 also the loss scale."""

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
        self._known: dict[str, Any] = {}  # newest value of each column: not every row has all of them
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
        for row in rows:
            if row["run"] == "fusedopt":
                self._known.update(row)
        self._progress.update(self._task, completed=ours["step"], state=self._state())
        if "val_loss" in ours:
            width = len(str(self._config.steps))
            line = f"step {ours['step']:>{width}}/{self._config.steps}  {self._state()}"
            other = next((row for row in reversed(rows) if row["run"] == "torch"), None)
            if other:
                line += f"  torch val {other['val_loss']:.3f}  max |dp| {ours['largest_difference']:.1e}"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _state(self) -> str:
        known = self._known
        parts = [f"loss {known['loss']:.3f}"] if "loss" in known else []
        parts += [f"val {known['val_loss']:.3f}"] if "val_loss" in known else []
        parts += [f"ema {known['val_loss_ema']:.3f}"] if "val_loss_ema" in known else []
        parts += [f"lr {known['lr']:.1e}"] if "lr" in known else []
        if "grad_norm" in known:
            parts.append("grad overflow" if known["grad_norm"] is None else f"grad {known['grad_norm']:.2f}")
        parts += [f"scale {known['loss_scale']:g}"] if "loss_scale" in known else []
        parts += [f"skipped {known['skipped_steps']}"] if known.get("skipped_steps") else []
        parts += [f"{known['tokens_per_s']:,} tok/s"] if "tokens_per_s" in known else []
        return " ".join(parts)


def around(metrics: dict[str, Any]) -> list[str]:
    """What clipping and overflows did to the steps of a run."""
    lines = []
    if metrics.get("clipped_share"):
        lines.append(f"{metrics['clipped_share']:.0%} of the steps clipped")
    if metrics.get("skipped_steps"):
        n = metrics["skipped_steps"]
        lines.append(f"{n} {'step' if n == 1 else 'steps'} skipped: gradients not finite, or too large")
    return lines


def report(console: Console, summary: dict[str, Any], measured: list[str], folder: Path, seconds: float) -> None:
    """Print the result: losses, what the task has measured, the comparison, if any, and where the files are."""
    runs = summary["runs"]
    minutes, rest = divmod(round(seconds), 60)
    lines = [f"step {summary['step']} after {minutes} min {rest} s"]
    if (best := summary["restored_step"]) is not None:
        found = "stopped early: no lower loss since" if summary["stopped_early"] else "lowest validation loss at"
        lines.append(f"{found} step {best}, whose weights are restored")
    for run in runs.values():
        if run["val_loss_first"] is not None:
            change = f"{run['val_loss_first']:.4f} -> {run['val_loss_last']:.4f}"
            average = run["val_loss_ema_last"]
            averaged = "" if average is None else f"; with averaged weights {average:.4f}"
            lines.append(f"{run['optimizer']}: validation loss {change} nats per {summary['unit']}{averaged}")
        lines += [f"{run['optimizer']}: {line}" for line in around(run["metrics"])]
        held = run["bytes_per_parameter"]
        parts = ", ".join(f"{name} {size:.3g}" for name, size in held.items())
        where = "" if summary["ranks"] == "1" else " on each rank"
        lines.append(f"{run['optimizer']}: {sum(held.values()):.3g} bytes per parameter{where}: {parts}")
    lines += measured
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
