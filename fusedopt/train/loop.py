"""The run: step, log, evaluate, save, until done or stopped. With a second trainer the two step side by side."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Protocol

import torch

from . import best, checkpoint
from .config import TrainConfig
from .errors import Diverged
from .files import write_atomically
from .job import Job
from .metrics import MetricsLog
from .optimizers import averaged
from .parallel import Ranks
from .stopping import Stopping
from .trainer import StepRecord, Trainer, largest_difference, milliseconds

Rows = list[dict[str, Any]]
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


@dataclass
class Run:
    """A run under way, or over: signal: of what stopped it, else 0. measured: by the task, once it is over."""

    job: Job
    trainers: dict[str, Trainer]
    stopping: Stopping
    signal: int = 0
    measured: dict[str, Any] = field(default_factory=dict)


def run(job: Job, view: View) -> Run:
    """Train from where the job starts; when the run is over, restore the best weights if asked for, and measure."""
    config, ranks = job.config, job.ranks
    make_deterministic(config.device)
    if config.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    libraries = ("fusedopt", "torch") if config.compare == "torch" else ("fusedopt",)
    trainers = ranks.together(lambda: {library: Trainer(config, library, job.task, ranks) for library in libraries})
    state = Run(job, trainers, Stopping(config.patience))
    if saved := job.saved:
        ranks.together(lambda: [checkpoint.restore(trainer, saved, job.folder) for trainer in trainers.values()])
        if saved["config"].patience:  # else there are no best weights of the steps before
            state.stopping.load_state_dict(saved["stopping"])
    log = ranks.together(lambda: _open_log(job) if ranks.first else None)
    try:
        with StopRequest() as stop:
            _train(state, log, view, stop)
    except Diverged as error:
        if ranks.first:
            write_atomically(job.folder / "summary.json", json.dumps({"diverged": error.step}).encode() + b"\n")
        raise
    finally:
        if log is not None:
            log.close()
    if not state.signal:
        _conclude(state)
    return state


def _conclude(run: Run) -> None:
    trainer = run.trainers["fusedopt"]
    if run.stopping.patience and run.stopping.best_step:
        run.job.ranks.together(lambda: best.restore(trainer, run.job.folder, run.stopping.best_step))
        run.measured = trainer.measure()
    else:
        with averaged(trainer.optimizer):
            run.measured = trainer.measure()


def _open_log(job: Job) -> MetricsLog:
    if not job.saved:
        checkpoint.remove(job.folder)  # before the metrics that it belongs to
        (job.folder / "summary.json").unlink(missing_ok=True)
        best.remove_others(job.folder, 0)
    log = MetricsLog(job.folder, job.start if job.saved else -1)
    write_atomically(job.folder / "config.json", json.dumps(job.config.as_dict(), indent=1).encode() + b"\n")
    return log


def _train(run: Run, log: MetricsLog | None, view: View, stop: StopRequest) -> None:
    """Step until done, until validation shows no more progress, or until a rank was asked to stop."""
    config, trainers, ranks, stopping = run.job.config, run.trainers, run.job.ranks, run.stopping
    step = trainers["fusedopt"].steps_done
    if step == 0:
        _write(log, view, _evaluate(trainers, [{"run": library, "step": 0} for library in trainers]))
    pending: list[tuple[str, StepRecord]] = []
    while step < config.steps and not run.signal and not stopping.stops:
        step += 1
        last = step == config.steps
        evaluate = last or step % config.val_interval == 0
        read = evaluate or step % config.log_interval == 0
        pending += [(library, trainer.step(measure=read)) for library, trainer in trainers.items()]
        run.signal = ranks.largest(stop.signal_number)
        if read or run.signal or step % config.checkpoint_interval == 0:
            rows = _rows(pending, config, ranks)
            pending.clear()
            if evaluate or step == 1:
                newest = rows[-len(trainers) :]
                _validate(run, newest) if evaluate else _compare(trainers, newest)
            _write(log, view, rows)
        if last or step % config.checkpoint_interval == 0 or run.signal or stopping.stops:
            if log is not None:
                log.flush(sync=True)
            checkpoint.save(run.job, step, trainers, stopping.state_dict())
            if ranks.first:
                best.remove_others(run.job.folder, stopping.best_step)
    run.signal = run.signal or ranks.largest(stop.signal_number)  # one that came after the last step


def _validate(run: Run, rows: Rows) -> None:
    """Evaluate, tell schedules of the losses, and keep the weights when ours is the best one yet."""
    for row in _evaluate(run.trainers, rows):
        if not math.isfinite(row["val_loss"]):
            raise Diverged(f"validation loss {row['val_loss']} at step {row['step']}: try a lower --lr", row["step"])
        run.trainers[row["run"]].schedule.validated(row["val_loss"])
    ours = next(row for row in rows if row["run"] == "fusedopt")
    if run.stopping.see(ours["step"], ours["val_loss"]) and run.stopping.patience:
        trainer = run.trainers["fusedopt"]
        with averaged(trainer.optimizer):  # whose loss it is
            best.save(trainer, run.job.folder, ours["step"])


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
            who = f"{library}: " if config.compare == "torch" else ""
            raise Diverged(
                f"{who}loss {loss}{norm} at step {record.step}: try a lower --lr or more --warmup-steps",
                record.step,
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
                "tokens_per_s": round(1e3 * record.predictions / step_ms),
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
