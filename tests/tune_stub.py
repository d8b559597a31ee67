"""Stands in for training in tests of `fusedopt tune`: a loss that is a formula, at five validations of a "run".

It keeps what a run keeps: `config.json`, `progress` as its checkpoint, and in `starts`, each time it is started, where.
A file `hold` in the study's folder with "N K" lets trials from N on wait after validation K. Run as a program,
`tune_stub.py FOLDER JOBS`, it works on a study as the command does.
"""

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fusedopt.train.config import resolve
from fusedopt.train.errors import BadInput, Diverged, Stopped
from fusedopt.train.loop import StopRequest
from fusedopt.train.optimizers import DEFAULTS
from fusedopt.tune import team

VALIDATIONS = 5
SPACE = {"lr": "log:1e-4:1", "dropout": "0:0.6"}


def validated(settings: dict[str, Any]) -> Any:
    known = {name: value for name, value in settings.items() if name != "optimizer_args"}
    return resolve({"steps": 50, "val_interval": 10, "warmup_steps": 0, **known}, "cpu", DEFAULTS)


def loss_at(settings: dict[str, Any], k: int) -> float:
    """Best at lr 1e-2 and dropout 0.2; falls with k from 4."""
    distance = (math.log10(settings.get("lr", 0.01)) + 2) ** 2 + (settings.get("dropout", 0.2) - 0.2) ** 2
    return 4.0 if k == 0 else 1.0 + distance + 1 / k


def run(settings: dict[str, Any], folder: Path, *, resume: bool = True, watch: Any = None) -> Any:
    (folder / "config.json").write_text(json.dumps({"steps": 50, "hidden_size": 128, "out": "x", **settings}))
    progress = folder / "progress"
    done = int(progress.read_text()) if resume and progress.exists() else -1
    with (folder / "starts").open("a") as file:
        file.write(f"{done}\n")
    with StopRequest() as stop:
        for k in range(done + 1, VALIDATIONS + 1):
            if settings.get("lr", 0.01) > 0.5 and k == 2:
                raise Diverged("loss nan at step 15", 15)
            if settings.get("dropout") == 0.45:
                raise BadInput("--dropout 0.45 cannot work")
            if settings.get("clip") == 666.0:
                raise SystemExit(9)  # the process goes away
            watch([{"run": "fusedopt", "step": 10 * k, "val_loss": loss_at(settings, k)}])
            progress.write_text(str(k))
            while _held(folder, k) and not stop.signal_number:
                time.sleep(0.01)
            if stop.signal_number:
                raise Stopped(stop.signal_number)
    best = loss_at(settings, VALIDATIONS)
    run = {"val_loss_best": best, "val_loss_last": best, "loss_last": best, "measured": {}}
    return SimpleNamespace(summary={"runs": {"fusedopt": run}})


def _held(folder: Path, k: int) -> bool:
    hold = folder.parents[1] / "hold"
    if not hold.exists():
        return False
    number, validation = map(int, hold.read_text().split())
    return int(folder.name) >= number and k >= validation


if __name__ == "__main__":
    ended = team.run(Path(sys.argv[1]), int(sys.argv[2]), lambda: None, "tune_stub")
    sys.exit(128 + ended.signal if ended.signal else 0)
