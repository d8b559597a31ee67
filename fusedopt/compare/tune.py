"""`fusedopt compare --tune-lr`: runs at several learning rates, one optimizer after the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..train.errors import BadInput
from . import classes, runner, table, tuned
from .grid import Settings, tuning_cell
from .results import Results

FOLDER = "tune"


def tune(
    names: Sequence[str], schedule: str, fixed: Settings, folder: Path, view: runner.View, run: runner.Run
) -> tuple[dict[str, tuned.Record], list[str]]:
    """The records of those optimizers of which a run came to its end, and a line for each of the others.

    The runs and their rows lie in `folder`/tune; one that has a row is not run again.
    """
    folder = folder / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    kept = Results(folder / "results.jsonl")
    records, problems = {}, []
    for name in names:

        def final_loss(lr: float, name: str = name) -> float:
            cell = tuning_cell(name, schedule, tuned.SEED, lr, fixed)
            runner.run_all(runner.pending([cell], folder, kept.rows), folder, kept, view, run)
            row = kept.rows[cell.name]
            if row["status"] == "refused":
                raise BadInput(row["reason"])
            loss = row.get("val_loss_last")
            return loss if loss is not None and math.isfinite(loss) else math.inf

        try:
            losses = tuned.search(classes.ENTRIES[name].usual, final_loss)
        except BadInput as error:
            problems.append(f"{name} cannot be tuned: {error}")
            continue
        steps = max(row.get("step", 0) for row in kept.rows.values() if row["optimizer"] == name)
        found = tuned.record(losses, {"steps": steps, "schedule": schedule, "seed": tuned.SEED})
        if found is None:
            problems.append(f"{name} diverged at every learning rate from {min(losses):g} to {max(losses):g}")
        else:
            records[name] = found
    return records, problems


def report(records: Mapping[str, Mapping[str, Any]]) -> table.Table:
    """What was tried, and what came of it."""
    lines = [
        [name, f"{record['lr']:g}", f"{record['val_loss']:.3f}", tried(record)] for name, record in records.items()
    ]
    return table.Table("Learning rates", ["optimizer", "lr", "final loss", "tried"], lines)


def tried(record: Mapping[str, Any]) -> str:
    """Every learning rate with its final loss."""
    found = record["tried"].items()
    return ", ".join(f"{lr}: {'diverged' if loss is None else f'{loss:.3f}'}" for lr, loss in found)
