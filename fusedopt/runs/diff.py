"""Some runs in detail: the settings, versions and machines that differ, and all results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .folders import Run, number
from .table import described, differing, following, new_table, places, short, shown

RESULTS = {
    "val_loss": "validation loss, last", "best_val_loss": "validation loss, best", "best_step": "best at step",
    "val_loss_ema": "validation loss, averaged weights", "training_loss": "training loss, last tenth", "chrf": "chrF",
    "bleu": "BLEU", "step_ms": "step, median ms", "optimizer_ms": "optimizer step, median ms",
    "seconds": "all steps, s", "held_bytes": "held bytes", "peak_bytes": "peak bytes on the GPU",
}  # fmt: skip
"""Results → how they are named here; others that were measured keep their own names."""
ELSEWHERE = ("date", "status", "step", "unit")
DATA = ("task", "text", "tokenizer", "vocabulary_size")
"""Settings that change what a loss is measured on, or in."""


def show(console: Console, runs: Sequence[Run]) -> None:
    """Print runs beside each other, and say when their losses are not of the same thing."""
    names, follow = differing(runs), following(runs)
    table = new_table()
    table.add_column("")
    for place in places(runs)[1]:
        table.add_column(Text(place), overflow="fold")
    for name in names:
        title = f"{short(name)} (follows)" if name in follow else short(name)
        table.add_row(*map(Text, [title, *(shown(run.settings.get(name)) for run in runs)]))
    environments = [found for run in runs if isinstance(found := run.summary.get("environment"), dict)]
    if len(environments) == len(runs):
        table.add_section()
        _add(table, environments, only_differing=True)
    table.add_section()
    table.add_row("status", *(Text(described(run)) for run in runs))
    titles = RESULTS | {name: name for run in runs for name in run.results if name not in (*RESULTS, *ELSEWHERE)}
    _add(table, [{title: run.results.get(name) for name, title in titles.items()} for run in runs])
    console.print(table)
    same = len({name for run in runs for name in run.settings}) - len(names)
    console.print(f"{same} settings are the same", highlight=False)
    if data := [name for name in names if name in DATA]:
        console.print(f"their losses do not compare: {', '.join(data)} differ", highlight=False)


def _add(table: Table, records: Sequence[dict[str, Any]], only_differing: bool = False) -> None:
    for name in dict.fromkeys(name for record in records for name in record):
        values = [record.get(name) for record in records]
        if any(value is not None for value in values) and not (
            only_differing and values.count(values[0]) == len(values)
        ):
            table.add_row(*map(Text, [name, *(_precise(name, value) for value in values)]))


def _precise(name: str, value: Any) -> str:
    if number(value) is None:
        return shown(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if "loss" in name else f"{value:.4g}"
