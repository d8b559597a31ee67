"""The run: step, log, evaluate, save, until done or stopped. With a second trainer the two step side by side."""

from __future__ import annotations

import json
import math
import os
import signal
import statistics
import threading
from types import FrameType
from typing import Any, Protocol

import torch

from . import checkpoint
from .config import TrainConfig
from .errors import Diverged
from .job import Job
from .metrics import MetricsLog, read
from .parallel import Ranks
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


def run(job: Job, view: View) -> tuple[dict[str, Trainer], int]:
    """Train from where the job starts: the trainers, and 0 or the signal that stopped the run."""
    config, ranks = job.config, job.ranks
    make_deterministic(config.device)
    libraries = ("fusedopt", "torch") if config.compare == "torch" else ("fusedopt",)
    trainers = ranks.together(lambda: {library: Trainer(config, library, job.text, ranks) for library in libraries})
    if saved := job.saved:
        ranks.together(lambda: [checkpoint.restore(trainer, saved, job.folder) for trainer in trainers.values()])
    log = ranks.together(lambda: _open_log(job) if ranks.first else None)
    try:
        with StopRequest() as stop:
            stopped_by = _train(job, trainers, log, view, stop)
    finally:
        if log is not None:
            log.close()
    return trainers, stopped_by


def _open_log(job: Job) -> MetricsLog:
    if not job.saved:
        checkpoint.remove(job.folder)  # before the metrics that it belongs to
    log = MetricsLog(job.folder, job.start if job.saved else -1)
    checkpoint.write_atomically(job.folder / "config.json", json.dumps(job.config.as_dict(), indent=1).encode() + b"\n")
    return log


def _train(job: Job, trainers: dict[str, Trainer], log: MetricsLog | None, view: View, stop: StopRequest) -> int:
    """Step until done, or until a rank was asked to stop: by which signal, 0 if none."""
    config, step, stopped_by = job.config, trainers["fusedopt"].steps_done, 0
    if step == 0:
        _write(log, view, _evaluate(trainers, [{"run": library, "step": 0} for library in trainers]))
    pending: list[tuple[str, StepRecord]] = []
    while step < config.steps and not stopped_by:
        step += 1
        last = step == config.steps
        evaluate = last or step % config.val_interval == 0
        read = evaluate or step % config.log_interval == 0
        pending += [(library, trainer.step(measure=read)) for library, trainer in trainers.items()]
        stopped_by = job.ranks.largest(stop.signal_number)
        save = last or step % config.checkpoint_interval == 0 or bool(stopped_by)
        if read or save:
            rows = _rows(pending, config, job.ranks)
            pending.clear()
            if evaluate or step == 1:
                newest = rows[-len(trainers) :]
                _evaluate(trainers, newest) if evaluate else _compare(trainers, newest)
            _write(log, view, rows)
        if save:
            if log is not None:
                log.flush(sync=True)
            checkpoint.save(job, step, trainers)
    return stopped_by


def _rows(pending: list[tuple[str, StepRecord]], config: TrainConfig, ranks: Ranks) -> Rows:
    """Rows of metrics.jsonl; waits for the device, and for the other ranks, whose losses are averaged.

    Raises:
        Diverged: a loss, or a norm that nothing skips, is not finite.
    """
    if config.device != "cpu":
        torch.cuda.synchronize()
    losses = ranks.sum(torch.tensor([float(record.loss) for _, record in pending], dtype=torch.float64)) / ranks.world
    rows = []
    for (library, record), loss in zip(pending, losses.tolist(), strict=True):
        metrics = {name: float(value) for name, value in record.metrics.items()}
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


def _write(log: MetricsLog | None, view: View, rows: Rows) -> None:
    if log is not None:
        for row in rows:
            log.append(row)
        log.flush()
    view.update(rows)


def summarise(job: Job, trainers: dict[str, Trainer]) -> dict[str, Any]:
    """The run so far, mostly from metrics.jsonl, also written to summary.json. Times are medians in milliseconds,
    bytes and times those of rank 0; metrics are those that were read last.
    """
    rows = read(job.folder)
    last = max((row["step"] for row in rows), default=0)
    summary: dict[str, Any] = {"step": last, "ranks": str(job.ranks), "runs": {}}
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
    checkpoint.write_atomically(job.folder / "summary.json", json.dumps(summary, indent=1).encode() + b"\n")
    return summary
