"""A worker: takes one trial after another, trains it, and records what came out. Several may work on one study."""

from __future__ import annotations

import importlib
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO, cast

import optuna
from optuna.trial import FrozenTrial, Trial, TrialState

from ..train import best, checkpoint
from ..train.errors import BadInput, Diverged, Stopped
from . import samplers, space, swarm
from .study import choosing, claim, load, outcome, trial_folder

DEATHS = 3
"""So often may the process of a trial die without a new validation, before the trial counts as failed."""
WAIT = 0.5
"""Seconds between looks at what other workers do."""
TRAINING = "fusedopt.tune.training"


class Training(Protocol):
    """A module that checks and trains: `fusedopt.tune.training`."""

    def validated(self, settings: dict[str, Any]) -> Any: ...
    def run(self, settings: dict[str, Any], folder: Path, *, resume: bool, watch: Callable[..., None]) -> Any: ...


class Abandoned(Exception):
    """Nobody waits for this worker any more."""


class Worker:
    """Works on the study of `folder`. changed: called after each validation and trial; wanted: whether to go on."""

    def __init__(
        self,
        folder: Path,
        training: str = TRAINING,
        changed: Callable[[], None] = lambda: None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder, self.changed, self.wanted = folder, changed, wanted
        self.training = cast(Training, importlib.import_module(training))
        self.study, self.plan = load(folder)
        self.dimensions = self.plan.dimensions

    def work(self) -> None:
        """Until all trials are taken. Raises what ends a run early: Stopped by a signal, Abandoned."""
        while self.wanted() and self._step():
            self.changed()

    def _step(self) -> bool:
        """Run a trial, or wait for one; whether there was one."""
        with choosing(self.folder):
            taken = self._take()
        if taken == "wait":
            time.sleep(WAIT)
        elif taken is not None:
            trial, claimed = taken
            with claimed:
                self._run(trial)
        return taken is not None

    def _take(self) -> tuple[Trial, TextIO] | Literal["wait"] | None:
        """An interrupted trial, else a new one, with its claim; None when all are taken."""
        trials = self.study.get_trials(deepcopy=False)
        for number in [t.number for t in trials if not t.state.is_finished()]:
            if (claimed := claim(trial_folder(self.folder, number))) is None:
                continue
            frozen = self.study.get_trials(deepcopy=False)[number]  # it may have ended since
            if not frozen.state.is_finished():
                return self._again(frozen), claimed
            claimed.close()
        number = len(trials)
        if number >= self.plan.trials:
            return None
        if self.plan.sampler == "pso" and swarm.must_wait(self.study, number):
            return "wait"
        claimed = claim(trial_folder(self.folder, number))
        assert claimed is not None  # only the holder of the study's lock takes new numbers
        self._prepare(number)
        trial = self.study.ask({d.name: d.distribution for d in self.dimensions})
        return trial, claimed

    def _again(self, frozen: FrozenTrial) -> Trial:
        """A trial whose process is gone."""
        self._prepare(frozen.number)
        trial = Trial(self.study, frozen._trial_id)
        for dimension in self.dimensions:  # those that were not drawn any more
            trial._suggest(dimension.name, dimension.distribution)
        trial.set_user_attr("deaths", frozen.user_attrs.get("deaths", 0) + 1)
        return trial

    def _prepare(self, number: int) -> None:
        plan = self.plan
        self.study.sampler = samplers.make(plan.sampler, self.dimensions, plan.search_seed, number)
        self.study.pruner = samplers.make_pruner(plan.pruner, plan.validations)

    def _run(self, trial: Trial) -> None:
        """Train one trial and record how it ended."""
        if trial.user_attrs.get("deaths", 0) >= DEATHS:
            return self._end(trial, "failed", f"its process was killed {DEATHS} times without getting further")
        if same := next((t for t in self.study.get_trials(deepcopy=False) if _is_result(t, trial.params)), None):
            return self._end(trial, "repeated", f"trial {same.number}", same.value)
        settings = space.settings(self.plan.settings, self.dimensions, trial.params)
        try:
            finished = self._train(trial, settings)
        except (Abandoned, Stopped):
            trial.set_user_attr("deaths", -1)  # somebody asked for this end
            raise
        except optuna.TrialPruned:
            return self._end(trial, "pruned", f"after validation {self.frozen(trial).last_step}")
        except Diverged as error:
            return self._end(trial, "diverged", str(error))
        except BadInput as error:
            return self._end(trial, "failed", str(error))
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
                return self._end(trial, "failed", "out of memory")
            raise
        self._end(trial, "complete", "", measure(finished.summary, self.plan.objective))

    def _train(self, trial: Trial, settings: dict[str, Any]) -> Any:
        """Continue the run in the trial's folder; from its start when it cannot be continued to the same bits."""
        import torch

        threads = trial.user_attrs.get("threads")
        if threads is None:
            trial.set_user_attr("threads", torch.get_num_threads())
        folder, own = trial_folder(self.folder, trial.number), torch.get_num_threads()
        watch = Watch(self, trial, self.training.validated(settings).val_interval)
        torch.set_num_threads(threads or own)
        try:
            return self.training.run(settings, folder, resume=True, watch=watch)
        except BadInput as error:
            if not (folder / "checkpoint.pt").exists():
                raise
            trial.set_user_attr("restarted", str(error))
            return self.training.run(settings, folder, resume=False, watch=watch)
        finally:
            torch.set_num_threads(own)

    def _end(self, trial: Trial, name: str, reason: str, value: float | None = None) -> None:
        """Record a trial. One that diverged is worth what an untrained model is, so that every sampler avoids it."""
        if name == "complete" and not math.isfinite(value or 0.0):
            name, reason = "diverged", f"{self.plan.objective} is {value}"
        if name == "diverged":
            value = 0.0 if self.plan.direction == "maximize" else self.frozen(trial).intermediate_values.get(0)
        if value is None or not math.isfinite(value):
            state = TrialState.FAIL if name == "failed" else TrialState.PRUNED
            value = None
        else:
            state = TrialState.COMPLETE
        trial.set_user_attr("ended", {"outcome": name, "reason": reason})
        self.study.tell(trial, value, state)
        folder = trial_folder(self.folder, trial.number)
        checkpoint.remove(folder)  # nothing continues it, and they add up
        best.remove_others(folder, 0)

    def frozen(self, trial: Trial) -> FrozenTrial:
        """What the study holds of a trial."""
        return self.study.get_trials(deepcopy=False)[trial.number]


class Watch:
    """Reports validation losses of a run to the study, and ends it where the pruner says so.

    The k-th validation is reported as k, the one before training as 0: runs of different lengths compare.
    """

    def __init__(self, worker: Worker, trial: Trial, val_interval: int) -> None:
        self.worker, self.trial, self.val_interval = worker, trial, val_interval
        self.known = set(worker.frozen(trial).intermediate_values)  # a continued run repeats some

    def __call__(self, rows: list[dict[str, Any]]) -> None:
        if not self.worker.wanted():
            raise Abandoned
        for row in rows:
            if "val_loss" not in row:
                continue
            k = -(-row["step"] // self.val_interval)
            loss = math.nan if row["val_loss"] is None else row["val_loss"]
            if k not in self.known:
                self.trial.report(loss, k)
                self.known.add(k)
                if self.trial.user_attrs.get("deaths"):
                    self.trial.set_user_attr("deaths", 0)
            self.worker.changed()
            if k > 0 and self.trial.should_prune():
                raise optuna.TrialPruned


def _is_result(trial: FrozenTrial, params: dict[str, Any]) -> bool:
    """Whether a trial has measured these settings: runs repeat to the same bits."""
    return trial.state.is_finished() and outcome(trial)[0] == "complete" and trial.params == params


def measure(summary: dict[str, Any], objective: str) -> float:
    """What a run is judged by: a loss, or what its task measured."""
    run = summary["runs"]["fusedopt"]
    value = run[objective] if objective in run else run["measured"][objective]
    return math.nan if value is None else float(value)
