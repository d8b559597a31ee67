"""What a run has come to: summary.json."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import torch

from .files import write_atomically
from .loop import Run
from .metrics import read
from .trainer import Trainer

METRICS = (
    "grad_norm", "clip_coefficient", "clipped_share", "param_norm", "update_norm", "update_ratio", "nonfinite_grads",
    "nonfinite_steps", "skipped_steps", "loss_scale",
)  # fmt: skip


def write(run: Run) -> dict[str, Any]:
    """The run so far, mostly from metrics.jsonl, also written to summary.json.

    Losses are in nats per `unit`; `loss_last` is the mean training loss of the last tenth of the steps. Times are
    medians in milliseconds, but for `seconds`, all steps without validations; bytes and times are those of rank 0;
    metrics are those that were read last.
    """
    job, config = run.job, run.job.config
    rows = read(job.folder)
    summary: dict[str, Any] = {
        "step": max((row["step"] for row in rows), default=0),
        "unit": job.task.unit,
        "ranks": str(job.ranks),
        "environment": job.environment,
        "stopped_early": run.stopping.stops,
        "restored_step": run.stopping.best_step if config.patience and not run.signal else None,
        "seconds": round(sum(row.get("step_ms", 0.0) for row in rows) / 1e3, 3),
        "runs": {
            library: _of_one([row for row in rows if row["run"] == library], trainer)
            for library, trainer in run.trainers.items()
        },
    }
    summary["runs"]["fusedopt"]["measured"] = run.measured
    compared = [row for row in rows if "largest_difference" in row and row["step"] > 0]
    if compared:
        keys = ("step", "largest_difference", "largest_difference_in")
        summary["parameter_difference"] = [{key: row[key] for key in keys} for row in (compared[0], compared[-1])]
    write_atomically(job.folder / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    return summary


def _of_one(rows: list[dict[str, Any]], trainer: Trainer) -> dict[str, Any]:
    validation = [(row["val_loss"], row["step"]) for row in rows if "val_loss" in row]
    averaged = [row["val_loss_ema"] for row in rows if "val_loss_ema" in row]
    best_loss, best_step = min([pair for pair in validation if pair[1]] or validation, default=(None, None))
    losses = [row["loss"] for row in rows if "loss" in row]
    timed = [row for row in rows if row["step"] > 1] or [row for row in rows if row["step"] > 0]
    held = trainer.held_bytes()
    count = sum(p.numel() for p in trainer.model.parameters())
    return {
        "optimizer": trainer.name,
        "val_loss_first": validation[0][0] if validation else None,
        "val_loss_last": validation[-1][0] if validation else None,
        "val_loss_best": best_loss,
        "best_step": best_step,
        "val_loss_ema_last": averaged[-1] if averaged else None,
        "loss_last": statistics.fmean(losses[-math.ceil(len(losses) / 10) :]) if losses else None,
        "metrics": {name: row[name] for row in rows for name in METRICS if name in row},
        "bytes_per_parameter": {name: round(size / count, 3) for name, size in held.items()},
        "held_bytes": sum(held.values()),
        "peak_bytes": None if trainer.device.type == "cpu" else torch.cuda.max_memory_allocated(trainer.device),
        "step_ms": statistics.median(row["step_ms"] for row in timed) if timed else None,
        "optimizer_ms": statistics.median(row["optimizer_ms"] for row in timed) if timed else None,
    }
