"""Folders as `fusedopt train` leaves them, written by hand: for tests that only read them."""

import json
import os
import time
from pathlib import Path
from typing import Any

from fusedopt.train.config import fill

OPTIMIZERS = {"adamw": {"lr": 2e-3, "weight_decay": 0.1}, "sgd": {"lr": 0.1, "momentum": 0.9}}


def write_run(folder: Path, upto: int = 100, *, loss: float = 2.0, age: float = 1e4, **given: Any) -> Path:
    """A run of which `upto` steps are done. Its training loss falls to `loss`, its validation loss, every tenth of the
    steps, is 0.5 more; its metrics were written `age` seconds ago.
    """
    config = json.loads(json.dumps(fill({"steps": 100, **given, "out": str(folder)}, "cpu", OPTIMIZERS).as_dict()))
    rows: list[dict[str, Any]] = [{"run": "fusedopt", "step": 0, "val_loss": 6.0}]
    for step in range(1, upto + 1):
        row = {"run": "fusedopt", "step": step, "loss": loss + 3 / step, "lr": config["lr"], "step_ms": 12.0}
        rows.append(row | ({"val_loss": row["loss"] + 0.5} if step % config["val_interval"] == 0 else {}))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.utime(folder / "metrics.jsonl", (time.time() - age,) * 2)
    return folder


def write_summary(folder: Path, step: int = 100, measured: dict[str, Any] | None = None, **more: Any) -> None:
    """What a run that ended at `step` says of itself."""
    own = {
        "step_ms": 12.5,
        "optimizer_ms": 0.75,
        "held_bytes": 3_000_000,
        "loss_last": 2.25,
        "measured": measured or {},
    }
    summary = {"step": step, "unit": "byte", "stopped_early": False, "runs": {"fusedopt": own}, **more}
    (folder / "summary.json").write_text(json.dumps(summary))
