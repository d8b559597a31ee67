"""Tuned learning rates: the search for them, and the files that keep them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..train.errors import BadInput
from ..train.files import write_atomically

FILE_NAME = "tuned.json"
SHIPPED = Path(__file__).with_name(FILE_NAME)

PLACE = (
    "task", "text", "tokenizer", "vocabulary_size", "hidden_size", "num_layers", "num_heads", "max_seq_len",
    "batch_size",
)  # fmt: skip
"""A learning rate is taken for another run when these settings are equal. That it depends on the number of steps, the
schedule and the rest, too, is not looked at: the report says what it was tuned with."""
SEED = 1000
"""Of the searches: no comparison uses it."""
REACH = 8
"""Half powers of ten that a search goes from where it began."""

Record = dict[str, Any]
"""lr, val_loss (at the end), tried (lr → that loss, null: diverged), steps, schedule, seed."""


def learning_rate(half_powers: int) -> float:
    """10^(k/2), to two digits."""
    return float(f"{10 ** (half_powers / 2):.2g}")


def search(usual: float, final_loss: Callable[[float], float]) -> dict[float, float]:
    """Losses by learning rate, over powers of √10 from the one nearest to `usual` on.

    The search follows the best one until the next lower and the next higher rate are both worse, or is stopped by
    `REACH`. `final_loss` gives infinity for a run that diverged; of equal losses the lower rate counts as the better.
    """
    start = round(2 * math.log10(usual))
    losses: dict[int, float] = {}
    best, before = start, None
    while best != before and abs(best - start) < REACH:
        for k in (best, best - 1, best + 1):
            if k not in losses:
                losses[k] = final_loss(learning_rate(k))
        before, best = best, min(losses, key=lambda k: (losses[k], k))
    return {learning_rate(k): loss for k, loss in sorted(losses.items())}


def record(losses: Mapping[float, float], conditions: Mapping[str, Any]) -> Record | None:
    """What a search found; None when every run diverged."""
    lr = min(losses, key=lambda rate: (losses[rate], rate))
    if not math.isfinite(losses[lr]):
        return None
    tried = {f"{rate:g}": loss if math.isfinite(loss) else None for rate, loss in losses.items()}
    return {"lr": lr, "val_loss": losses[lr], "tried": tried, **conditions}


def place(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a tuned learning rate is for, of a run's resolved ones."""
    found = {name: config[name] for name in PLACE}
    return json.loads(json.dumps(found))  # tuples become lists, as in the files


def read(paths: Sequence[Path], where: Mapping[str, Any]) -> dict[str, Record]:
    """The records for these settings by optimizer; a later file wins, a missing one holds nothing."""
    found: dict[str, Record] = {}
    for path in paths:
        for entry in _load(path):
            if entry["settings"] == where:
                found |= entry["optimizers"]
    return found


def write(path: Path, where: Mapping[str, Any], records: Mapping[str, Record]) -> None:
    """Add records to a file, in the place of older ones."""
    entries = _load(path)
    entry = next((entry for entry in entries if entry["settings"] == where), None)
    if entry is None:
        entries.append(entry := {"settings": dict(where), "optimizers": {}})
    entry["optimizers"] |= records
    write_atomically(path, json.dumps(entries, indent=1).encode() + b"\n")


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        entries = json.loads(path.read_bytes())
        damaged = not all(entry.keys() == {"settings", "optimizers"} for entry in entries)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise BadInput(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, TypeError, AttributeError):
        damaged, entries = True, []
    if damaged:
        raise BadInput(f"{path} is damaged: delete it to tune anew")
    return entries
