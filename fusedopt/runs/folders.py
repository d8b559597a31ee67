"""What is read of a run's folder: config.json, summary.json, and of metrics.jsonl the validations and the end."""

from __future__ import annotations

import difflib
import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fusedopt.train.errors import BadInput

ROOT = Path("runs")
CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "summary.json"
FROM_SUMMARY = {
    "loss_last": "training_loss", "val_loss_ema_last": "val_loss_ema", "optimizer_ms": "optimizer_ms",
    "held_bytes": "held_bytes", "peak_bytes": "peak_bytes",
}  # fmt: skip
"""Number of summary.json → result."""
RECENT = 120  # seconds: metrics written less long ago may be of a run that goes on
TIMED = 200  # the last rows, whose median is the step time of a run without a summary


@dataclass(frozen=True)
class Run:
    """A run's folder as far as it could be read.

    name: the folder as the user may name it. settings: those of config.json, objects flattened to "optimizer_args.eps".
    results: by the names that --sort and --filter take, None where unknown; losses in nats per unit, chrf and bleu of
    held-out pairs in percent. problem: what in the folder is damaged.
    """

    folder: Path
    name: str
    settings: dict[str, Any]
    results: dict[str, Any]
    summary: dict[str, Any]
    problem: str = ""

    def value(self, name: str) -> Any:
        """A result or a setting; None when this run has none of that name."""
        return {"name": self.name, **self.settings, **self.results}.get(name)


def find_runs(roots: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs anywhere below `roots`, and a phrase for each folder that could not be read in full."""
    folders = dict.fromkeys(folder for root in roots for folder in _folders(root))
    runs, problems = [], []
    for folder in folders:
        try:
            run = read_run(folder)
        except BadInput as error:
            problems.append(str(error))
            continue
        runs.append(run)
        problems += [run.problem] if run.problem else []
    return runs, problems


def find_run(name: str) -> Run:
    """The run in the folder `name`, else the only one below `runs` whose path ends so. BadInput: none, or several."""
    if (Path(name) / METRICS).is_file():
        return read_run(Path(name))
    below = list(_folders(ROOT))
    parts = Path(name).parts
    matches = [folder for folder in below if parts and folder.parts[-len(parts) :] == parts]
    if len(matches) == 1:
        return read_run(matches[0])
    if matches:
        shown = ", ".join(map(str, matches[:4])) + (", …" if len(matches) > 4 else "")
        raise BadInput(f"{name} may be any of {len(matches)} runs: {shown}: give more of its path")
    if inside := [str(folder) for folder in _folders(Path(name))]:
        raise BadInput(f"{name} is not a run but holds {len(inside)}, such as {inside[0]}: name one of them")
    close = difflib.get_close_matches(name, [str(folder) for folder in below] + [f.name for f in below], n=1)
    hint = f"did you mean {close[0]}?" if close else "fusedopt runs FOLDER lists the runs below a folder"
    raise BadInput(f"no run {name}: {hint}")


def _folders(root: Path) -> Iterator[Path]:
    """Folders that hold metrics, in the order of their names; hidden ones are left out."""
    for folder, inner, files in os.walk(root):
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        if METRICS in files:
            yield Path(folder)


def read_run(folder: Path) -> Run:
    """Read one folder. BadInput, naming it, when it is of no use; what is damaged beside that is in `problem`."""
    config = _object(folder / CONFIG)
    if not config:
        raise BadInput(f"{folder}: {CONFIG} is {'damaged' if (folder / CONFIG).exists() else 'missing'}")
    summary = _object(folder / SUMMARY) if (folder / SUMMARY).exists() else {}
    problem = f"{folder}: {SUMMARY} is damaged" if summary is None else ""
    try:
        written = (folder / METRICS).stat().st_mtime
        lines = (folder / METRICS).read_bytes().splitlines()
    except OSError as error:
        raise BadInput(f"{folder}: {METRICS} cannot be read: {error.strerror}") from None
    settings = dict(flat({name: value for name, value in config.items() if name != "out"}))
    results = _results(lines, summary or {}, settings.get("steps"), written)
    return Run(folder, str(folder), settings, results, summary or {}, problem)


def read_rows(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, those of our optimizer; what a kill cut short is left out."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row.get("run", "fusedopt") == "fusedopt":
            rows.append(row)
    return rows


def _results(lines: list[bytes], summary: dict[str, Any], steps: Any, written: float) -> dict[str, Any]:
    """Losses come from the metrics, so that a run without a summary has them too; the rest from its summary."""
    validations = read_rows(line for line in lines if b'"val_loss"' in line)
    losses = {row["step"]: loss for row in validations if (loss := number(row.get("val_loss"))) is not None}
    best = min(losses, key=lambda step: losses[step], default=None)
    end = read_rows(lines[-TIMED:])
    step = max((row["step"] for row in end), default=0)
    if summary.get("step") != step and (number(summary.get("diverged")) or 0) <= step:
        summary = {}  # it is of an earlier stop of this run
    own = _dig(summary, "runs", "fusedopt")
    times = [ms for row in end if (ms := number(row.get("step_ms"))) is not None]
    step_ms = number(own.get("step_ms")) or (statistics.median(times) if times else None)
    recent = time.time() - written < max(RECENT, (step_ms or 0.0) / 50)  # or within 20 steps
    measured = {name.removesuffix("_held_out"): number(value) for name, value in _dig(own, "measured").items()}
    return {
        "date": datetime.fromtimestamp(written).isoformat(" ", "seconds"),
        "status": _status(step, steps, summary, recent),
        "step": step,
        "val_loss": list(losses.values())[-1] if losses else None,
        "best_val_loss": losses[best] if best is not None else None,
        "best_step": best,
        "unit": unit if isinstance(unit := summary.get("unit"), str) else None,
        "seconds": number(summary.get("seconds")),
        "step_ms": step_ms,
        **{result: number(own.get(name)) for name, result in FROM_SUMMARY.items()},
        **{name: value for name, value in measured.items() if value is not None},
    }


def _status(step: int, steps: Any, summary: dict[str, Any], recent: bool) -> str:
    if summary.get("diverged"):
        return "diverged"
    if summary.get("stopped_early"):
        return "stopped-early"
    if isinstance(steps, int) and step >= steps:
        return "done"
    return "running" if recent and not summary else "stopped"


def number(value: Any) -> float | int | None:
    """`value` if it is a finite number, else None."""
    finite = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if finite else None


def _object(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None when there is none, or not one."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def _dig(value: dict[str, Any], *names: str) -> dict[str, Any]:
    """An object inside an object, empty when something else lies there."""
    for name in names:
        inner = value.get(name)
        value = inner if isinstance(inner, dict) else {}
    return value


def flat(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values, of objects inside as "optimizer_args.eps"."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
