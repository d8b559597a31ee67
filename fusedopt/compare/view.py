"""What a person sees of a comparison while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .grid import Cell
from .results import Row


class ProgressView:
    """A bar over all steps, with the run at hand, its newest loss and the time left; and a line for each run that has
    ended. steps: of each cell by name, those that have run left out; empty when it is not known which will run.
    """

    def __init__(self, console: Console, steps: Mapping[str, int]) -> None:
        self._console, self._steps = console, steps
        self._count = self._before = 0
        self._state = ""
        columns = TextColumn("{task.fields[state]}", markup=False), BarColumn(bar_width=10), TimeRemainingColumn()
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task("compare", total=sum(steps.values()) or None, state="")

    def __enter__(self) -> ProgressView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def begin(self, cell: Cell) -> None:
        """A cell is about to run."""
        self._count += 1
        of = f" of {len(self._steps)}" if self._steps else ""
        self._state = f"run {self._count}{of}: {cell.name}"
        self._progress.update(self._task, completed=self._before, state=self._state)

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Show the newest loss."""
        losses = [row["loss"] for row in rows if row.get("loss") is not None]
        state = f"{self._state}, loss {losses[-1]:.3f}" if losses else self._state
        self._progress.update(self._task, completed=self._before + rows[-1]["step"], state=state)

    def end(self, row: Row) -> None:
        """Say what became of the run."""
        self._before += self._steps.get(row["cell"], 0)
        if row["status"] == "done":
            text = f"final loss {row['val_loss_last']:.3f}, lowest {row['val_loss_best']:.3f} ({row['seconds']:.0f} s)"
        else:
            text = f"{row['status']}: {row['reason']}"
        self._console.print(f"{self._state}: {text}", highlight=False, markup=False, soft_wrap=True)
