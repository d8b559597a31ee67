"""Runs the cells of a comparison that have no result yet, one after the other."""

from __future__ import annotations

import json
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

from ..train import metrics, task
from ..train.errors import BadInput, Diverged
from ..train.files import write_atomically
from . import results
from .grid import Cell, differences

SETTINGS = "settings.json"
"""In the folder of a cell: what it was begun with."""

Run = Callable[..., Any]
"""`train.session.run`."""


class View(Protocol):
    """Who watches a comparison."""

    def begin(self, cell: Cell) -> None:
        """A cell is about to run."""
        ...

    def update(self, rows: list[dict[str, Any]]) -> None:
        """New rows of its metrics."""
        ...

    def end(self, row: results.Row) -> None:
        """It has ended."""
        ...


def pending(cells: Sequence[Cell], folder: Path, known: dict[str, results.Row]) -> list[Cell]:
    """The cells that must run. BadInput when something was run or begun with other settings."""
    for row in known.values():
        _check(f"{row['cell']} in the results", row["fixed"], cells[0].fixed)
    for cell in cells:
        row = known.get(cell.name)
        if row:
            _check(f"{cell.name} in the results", row["own"], cell.own)
        elif (path := folder / cell.name / SETTINGS).exists():
            try:
                begun = json.loads(path.read_bytes())
            except (OSError, ValueError):
                raise BadInput(f"{path} is damaged: delete {path.parent} to run it anew") from None
            _check(f"{cell.name} in {folder}", begun, _plain(cell.settings))
    return [cell for cell in cells if known.get(cell.name, {}).get("status") not in results.FINAL]


def _check(what: str, before: dict[str, Any], now: dict[str, Any]) -> None:
    if found := differences(before, _plain(now)):
        raise BadInput(f"{what} has other settings: {'; '.join(found)}: restore these, or choose another --out")


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(settings))  # tuples become lists, as in the files


def run_all(cells: Sequence[Cell], folder: Path, kept: results.Results, view: View, run: Run) -> None:
    """Run cells; the row of each is kept at once. A run that diverges or is refused gives a row, too."""
    for cell in cells:
        place = folder / cell.name
        view.begin(cell)
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"cannot write to output folder {place}: {error.strerror}") from None
        write_atomically(place / SETTINGS, json.dumps(cell.settings, indent=1).encode() + b"\n")
        row = describe(cell) | outcome(cell, place, view, run)
        kept.add(row)
        view.end(row)


def outcome(cell: Cell, place: Path, view: View, run: Run) -> results.Row:
    """What became of a run."""
    start = time.perf_counter()
    try:
        finished = run(cell.settings, place, watch=view.update)
    except Diverged as error:
        result: results.Row = {"status": "diverged", "step": error.step, "reason": str(error)}
    except BadInput as error:
        return {"status": "refused", "reason": str(error)}
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
            return {"status": "refused", "reason": "out of memory"}
        raise
    else:
        result = {"status": "done", **measured(finished)}
    rows = [row for row in metrics.read(place) if row.get("val_loss") is not None]
    seconds = round(time.perf_counter() - start, 1)
    return {**result, "curve": [[row["step"], row["val_loss"]] for row in rows], "seconds": seconds}


FROM_SUMMARY = (
    "val_loss_first", "val_loss_last", "val_loss_best", "best_step", "loss_last", "step_ms", "optimizer_ms",
    "held_bytes", "peak_bytes",
)  # fmt: skip


def measured(finished: Any) -> results.Row:
    """What a row says of a run that came to its end."""
    summary = finished.summary
    own = summary["runs"]["fusedopt"]
    config = {name: value for name, value in finished.config.as_dict().items() if name != "out"}
    scores = {name: value for name, value in own["measured"].items() if name != "samples"}
    values = {"step": summary["step"], "stopped_early": summary["stopped_early"], "config": config, "measured": scores}
    loaded = _task(finished.config.task, finished.config.text, config["tokenizer"], config["vocabulary_size"])
    values |= {"data": loaded.describe(finished.config), "unit": summary["unit"]}
    return values | {name: own[name] for name in FROM_SUMMARY}


@cache
def _task(*names: Any) -> Any:
    return task.load(*names)


def describe(cell: Cell) -> results.Row:
    """The part of a cell's row that is known before it runs."""
    axes = {name: getattr(cell, name) for name in ("optimizer", "schedule", "seed", "batch_size")}
    row = {"cell": cell.name, **axes, "fixed": cell.fixed, "own": cell.own, "tuned": cell.tuned}
    return {**row, "date": time.strftime("%Y-%m-%d"), "machine": machine()}


@cache
def machine() -> dict[str, Any]:
    """Processor, cores, threads, GPU and versions."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy")},
    }
