"""The run: step, log, evaluate, save, until done or stopped. With a second trainer the two step side by side."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import threading
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch

from . import checkpoint
from .config import TrainConfig
from .data import Text
from .errors import Diverged
from .metrics import MetricsLog, read
from .trainer import StepRecord, Trainer, largest_difference, milliseconds

Rows = list[dict[str, Any]]
METRICS = (
    "grad_norm", "clip_coefficient", "clipped_share", "param_norm", "update_norm", "update_ratio", "nonfinite_grads",
    "nonfinite_steps", "skipped_steps", "loss_scale",
)  # fmt: skip
COUNTS = ("nonfinite_grads", "nonfinite_steps", "skipped_steps")


class View(Protocol):
    """Who watches a run."""

    def update(self, rows: Rows) -> None:
        """New rows of metrics.jsonl."""
        ...


class StopRequest:
    """While entered, SIGINT and SIGTERM ask for a stop after the current step; a second one acts at once."""

    signal_number = 0

    def __enter__(self) -> StopRequest:
        self._previous = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        signal.signal(number, self._previous[number])


def make_deterministic(device: str) -> None:
    """On a GPU, choose kernels whose results do not depend on timing, before the first one runs."""
    if device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def run(
    config: TrainConfig, text: Text, folder: Path, environment: dict[str, Any], saved: dict[str, Any] | None, view: View
) -> tuple[dict[str, Trainer], int]:
    """Train from `saved`, or from the start: the trainers, and 0 or the signal that stopped the run."""
    make_deterministic(config.device)
    libraries = ("fusedopt", "torch") if config.compare == "torch" else ("fusedopt",)
    trainers = {library: Trainer(config, library, text) for library in libraries}
    if saved:
        for trainer in trainers.values():
            checkpoint.restore(trainer, saved, folder)
    else:
        checkpoint.remove(folder)  # before the metrics that it belongs to
    log = MetricsLog(folder, saved["step"] if saved else -1)
    checkpoint.write_atomically(folder / "config.json", json.dumps(config.as_dict(), indent=1).encode() + b"\n")
    try:
        with StopRequest() as stop:
            _train(config, trainers, log, folder, environment, view, stop)
    finally:
        log.close()
    return trainers, stop.signal_number


def _train(
    config: TrainConfig,
    trainers: dict[str, Trainer],
    log: MetricsLog,
    folder: Path,
    environment: dict[str, Any],
    view: View,
    stop: StopRequest,
) -> None:
    step = trainers["fusedopt"].steps_done
    if step == 0:
        _write(log, view, _evaluate(trainers, [{"run": library, "step": 0} for library in trainers]))
    pending: list[tuple[str, StepRecord]] = []
    while step < config.steps and not stop.signal_number:
        step += 1
        last = step == config.steps
        evaluate = last or step % config.val_interval == 0
        read = evaluate or step % config.log_interval == 0
        pending += [(library, trainer.step(measure=read)) for library, trainer in trainers.items()]
        save = last or step % config.checkpoint_interval == 0 or bool(stop.signal_number)
        if read or save:
            rows = _rows(pending, config)
            pending.clear()
            if evaluate or step == 1:
                newest = rows[-len(trainers) :]
                _evaluate(trainers, newest) if evaluate else _compare(trainers, newest)
            _write(log, view, rows)
        if save:
            log.flush(sync=True)
            states = {library: trainer.state_dict() for library, trainer in trainers.items()}
            checkpoint.save(folder, config, environment, step, states)


def _rows(pending: list[tuple[str, StepRecord]], config: TrainConfig) -> Rows:
    """Rows of metrics.jsonl; waits for the device. Diverged when a loss, or a norm nothing skips, is not finite."""
    if config.device != "cpu":
        torch.cuda.synchronize()
    rows = []
    for library, record in pending:
        loss, metrics = float(record.loss), {name: float(value) for name, value in record.metrics.items()}
        grad_norm = metrics.get("grad_norm", 0.0)
        if not math.isfinite(loss) or not (math.isfinite(grad_norm) or config.skips_steps):
            norm = f", gradient norm {grad_norm}" if "grad_norm" in metrics else ""
            raise Diverged(
                f"{library}: loss {loss}{norm} at step {record.step}: try a lower --lr or more --warmup-steps"
            )
        step_ms = milliseconds(record.step_marks)
        rows.append(
            {
                "run": library,
                "step": record.step,
                "loss": loss,
                "lr": record.lr,
                **{name: _as_json(name, value) for name, value in metrics.items()},
                "step_ms": round(step_ms, 4),
                "optimizer_ms": round(milliseconds(record.optimizer_marks), 4),
                "tokens_per_s": round(1e3 * config.batch_size * config.max_seq_len / step_ms),
            }
        )
    return rows


def _as_json(name: str, value: float) -> float | int | None:
    """A metric as the file holds it: null when it is not finite, for which JSON has no number."""
    if not math.isfinite(value):
        return None
    return int(value) if name in COUNTS else value


def _evaluate(trainers: dict[str, Trainer], rows: Rows) -> Rows:
    """Add the validation losses (and the parameter difference) to one row per trainer."""
    for row in rows:
        row.update(trainers[row["run"]].evaluate())
    return _compare(trainers, rows)


def _compare(trainers: dict[str, Trainer], rows: Rows) -> Rows:
    if "torch" in trainers:
        difference, name = largest_difference(trainers["fusedopt"].model, trainers["torch"].model)
        rows[0].update(largest_difference=difference, largest_difference_in=name)
    return rows


def _write(log: MetricsLog, view: View, rows: Rows) -> None:
    for row in rows:
        log.append(row)
    log.flush()
    view.update(rows)


def summarise(folder: Path, trainers: dict[str, Trainer]) -> dict[str, Any]:
    """The run so far, mostly from metrics.jsonl, also written to summary.json. Times are medians in milliseconds;
    metrics are those that were read last.
    """
    rows = read(folder)
    summary: dict[str, Any] = {"step": max((row["step"] for row in rows), default=0), "runs": {}}
    for library, trainer in trainers.items():
        own = [row for row in rows if row["run"] == library]
        validation = [row["val_loss"] for row in own if "val_loss" in row]
        averaged = [row["val_loss_ema"] for row in own if "val_loss_ema" in row]
        timed = [row for row in own if row["step"] > 1] or [row for row in own if row["step"] > 0]
        summary["runs"][library] = {
            "optimizer": trainer.name,
            "val_loss_first": validation[0] if validation else None,
            "val_loss_last": validation[-1] if validation else None,
            "val_loss_ema_last": averaged[-1] if averaged else None,
            "metrics": {name: row[name] for row in own for name in METRICS if name in row},
            "bytes_per_parameter": trainer.bytes_per_parameter(),
            "step_ms": statistics.median(row["step_ms"] for row in timed) if timed else None,
            "optimizer_ms": statistics.median(row["optimizer_ms"] for row in timed) if timed else None,
        }
    compared = [row for row in rows if "largest_difference" in row and row["step"] > 0]
    if compared:
        keys = ("step", "largest_difference", "largest_difference_in")
        summary["parameter_difference"] = [{key: row[key] for key in keys} for row in (compared[0], compared[-1])]
    checkpoint.write_atomically(folder / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    return summary
