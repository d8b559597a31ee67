"""A study of `fusedopt tune`: outcomes of trials, resuming after a kill, several processes. Training is a stand-in."""

import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import tune_stub
from optuna.trial import TrialState
from tune_command import Tune, same, use_stub

from fusedopt.train.errors import BadInput, Stopped
from fusedopt.tune import plan, plot, study, team, training, worker

RANDOM = ["--sampler", "random", "--space", "lr=log:1e-4:1", "--space", "dropout=0:0.6"]
HERE = Path(__file__).parent


@pytest.fixture
def tune(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tune:
    use_stub(monkeypatch)
    return Tune(tmp_path, capsys)


def create(folder: Path, trials: int, sampler: str = "random", pruner: str = "none") -> None:
    """A study that nobody has worked on."""
    settings = {"lr": "0.001,0.01,0.1", "dropout": "0,0.1"} if sampler == "grid" else tune_stub.SPACE
    made = plan.Plan(settings, {}, sampler, 0, pruner, "val_loss_best", tune_stub.VALIDATIONS, trials)
    study.create(folder, made, overwrite=False)


@contextmanager
def program(folder: Path, jobs: int, hold: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of its own that works on the study of `folder`, and is held at a place."""
    (folder / "hold").write_text(hold)
    command = [sys.executable, str(HERE / "tune_stub.py"), str(folder), str(jobs)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ["PYTHONPATH"]])}
    with subprocess.Popen(command, env=env, stderr=subprocess.PIPE, start_new_session=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    (folder / "hold").unlink()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """While `process` runs."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.01)


def at(folder: Path, number: int) -> str:
    """The validation that a trial has come to."""
    progress = study.trial_folder(folder, number) / "progress"
    return progress.read_text() if progress.exists() else ""


def claimed(folder: Path, number: int) -> bool:
    """Whether a process is at work on a trial."""
    if (claim := study.claim(study.trial_folder(folder, number))) is not None:
        claim.close()
    return claim is None


def test_every_end_of_a_trial_is_reported_and_none_is_fatal(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    use_stub(monkeypatch, plots=True)
    space = ["--space", "lr=0.001,0.1,0.9", "--space", "dropout=0.2,0.45"]
    result = tune("--sampler", "grid", "--pruner", "none", *space)
    assert result.status == 0, result.err
    assert Counter(tune.outcomes()) == {"complete": 2, "diverged": 1, "failed": 3}
    for trial in tune.trials():
        lr, dropout = trial.params["lr"], trial.params["dropout"]
        name, reason = study.outcome(trial)
        if dropout == "0.45":  # lists hold texts
            assert (name, reason, trial.state) == ("failed", "--dropout 0.45 cannot work", TrialState.FAIL)
        elif lr == "0.9":
            assert (name, reason, trial.value) == ("diverged", "loss nan at step 15", 4.0)  # as before training
        assert f"trial {trial.number}: {reason and name}" in result.out
    assert "6 of 6 trials: " in result.out and "1 diverged" in result.out
    assert "val_loss_best 2.2000" in result.out
    for name in study.RESULTS:
        assert (tune.folder / name).stat().st_size > 0


def test_a_study_without_a_result_says_so(tune: Tune) -> None:
    result = tune("--sampler", "grid", "--space", "lr=0.8,0.9")
    assert result.status == 1 and "2 of 2 trials: 2 diverged" in result.out
    assert not (tune.folder / "best.json").exists()
    assert plot.importances(study.load(tune.folder)[0]) == "it needs two trials with different results"


def test_bad_trials_are_pruned_and_the_same_settings_are_trained_once(tune: Tune) -> None:
    dropouts = ",".join(str(i / 100) for i in range(20, 26))
    assert tune("--sampler", "grid", "--space", "lr=0.01,0.0001", "--space", f"dropout={dropouts}").status == 0
    ends = {trial.params["lr"]: set() for trial in tune.trials()}
    for trial in tune.trials():
        ends[trial.params["lr"]].add(study.outcome(trial)[0])
    assert "pruned" in ends["0.0001"] and "complete" in ends["0.01"]
    pruned = next(trial for trial in tune.trials() if study.outcome(trial)[0] == "pruned")
    assert pruned.last_step == 1  # the first at which it may be
    assert tune("--sampler", "random", "--space", "lr=0.01,0.1", "--trials", 6, "--overwrite").status == 0
    assert tune.outcomes().count("complete") == 2 and tune.outcomes().count("repeated") == 4


def test_a_resumed_study_makes_the_trials_of_one_that_was_not_stopped(tune: Tune, tmp_path: Path) -> None:
    assert tune(*RANDOM, "--trials", 2, "--pruner", "median").status == 0
    assert tune("--resume", "--trials", 5).status == 0
    assert [tune.starts(n) for n in range(5)] == [[-1]] * 5
    create(tmp_path / "whole", 5, pruner="median")
    team.run(tmp_path / "whole", 1, lambda: None, "tune_stub")
    assert same(tune.trials(), study.load(tmp_path / "whole")[0].get_trials())
    again = tune("--resume")
    assert again.status == 0 and "5 of 5 trials" in again.out and "trial 3:" not in again.out


def test_after_a_kill_the_trial_goes_on_and_no_finished_one_is_rerun(tune: Tune, tmp_path: Path) -> None:
    create(tune.folder, 4)
    with program(tune.folder, 1, hold="2 2") as process:
        wait_until(lambda: at(tune.folder, 2) == "2", process)
        assert claimed(tune.folder, 2)
        process.kill()
    assert [trial.state.name for trial in tune.trials()] == ["COMPLETE", "COMPLETE", "RUNNING"]
    assert tune("--resume").status == 0
    assert [tune.starts(n) for n in range(4)] == [[-1], [-1], [-1, 2], [-1]]
    create(tmp_path / "whole", 4)
    team.run(tmp_path / "whole", 1, lambda: None, "tune_stub")
    assert same(tune.trials(), study.load(tmp_path / "whole")[0].get_trials())


def test_a_stopped_study_keeps_its_trial_for_later(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise Stopped(signal.SIGINT)

    create(tune.folder, 2)
    with monkeypatch.context() as patch:
        patch.setattr(tune_stub, "run", stopped)
        for _ in range(2 * worker.DEATHS):  # however often: nothing was killed
            assert team.run(tune.folder, 1, lambda: None, "tune_stub") == (signal.SIGINT, "stopped")
        assert [trial.state for trial in tune.trials()] == [TrialState.RUNNING]
    with monkeypatch.context() as patch:
        patch.setattr(training, "run", stopped)
        result = tune("--resume")
        assert result.status == 130 and result.err == "fusedopt: stopped; continue with --resume\n"
    assert tune("--resume").status == 0
    assert [trial.state for trial in tune.trials()] == [TrialState.COMPLETE] * 2


def test_a_trial_that_always_kills_its_process_is_given_up(tune: Tune) -> None:
    arguments = ("--sampler", "grid", "--space", "clip=666,1")
    statuses = [tune(*arguments).status, *(tune("--resume").status for _ in range(worker.DEATHS))]
    assert statuses == [9] * worker.DEATHS + [0]
    assert sorted(tune.outcomes()) == ["complete", "failed"]


def test_a_run_that_cannot_be_continued_starts_anew(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(settings: dict[str, Any], folder: Path, *, resume: bool, watch: Any) -> Any:
        if resume and (folder / "checkpoint.pt").exists():
            raise BadInput("resuming would not be bit-exact")
        (folder / "checkpoint.pt").touch()
        if (tune.folder / "first").exists():
            (tune.folder / "first").unlink()
            raise Stopped(signal.SIGTERM)
        return tune_stub.run(settings, folder, resume=resume, watch=watch)

    create(tune.folder, 1)
    (tune.folder / "first").touch()
    monkeypatch.setattr(training, "run", run)
    assert tune("--resume").status == 128 + signal.SIGTERM
    assert tune("--resume").status == 0 and tune.outcomes() == ["complete"]
    assert tune.trials()[0].user_attrs["restarted"] == "resuming would not be bit-exact"


def test_a_storage_that_fails_gets_one_line(tune: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(settings: dict[str, Any], folder: Path, *, resume: bool, watch: Any) -> Any:
        with sqlite3.connect(tune.folder / study.FILE_NAME) as database:
            database.execute("DROP TABLE trial_values")
        database.close()
        return tune_stub.run(settings, folder, resume=resume, watch=watch)

    create(tune.folder, 1)
    monkeypatch.setattr(training, "run", run)
    result = tune("--resume")
    assert result.status == 2 and result.err.count("\n") == 1
    assert f"cannot use {tune.folder / study.FILE_NAME}: (sqlite3.OperationalError) no such table" in result.err


def test_processes_share_a_study_and_ctrl_c_ends_them_after_their_checkpoints(tune: Tune) -> None:
    create(tune.folder, 6, sampler="grid")
    with program(tune.folder, 2, hold="2 1") as process:
        wait_until(lambda: at(tune.folder, 2) == at(tune.folder, 3) == "1", process)  # both at a time
        process.send_signal(signal.SIGINT)  # which it hands on
        _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and not err
    assert [trial.state.name for trial in tune.trials()] == ["COMPLETE", "COMPLETE", "RUNNING", "RUNNING"]
    assert not claimed(tune.folder, 2) and not claimed(tune.folder, 3)
    assert tune("--resume").status == 0
    trials = tune.trials()
    assert len({tuple(trial.params.values()) for trial in trials}) == 6 and set(tune.outcomes()) == {"complete"}
    assert [tune.starts(n) for n in range(6)] == [[-1], [-1], [-1, 1], [-1, 1], [-1], [-1]]


@pytest.mark.long
def test_workers_end_when_the_process_that_started_them_is_killed(tune: Tune) -> None:
    create(tune.folder, 2, sampler="grid")
    with program(tune.folder, 2, hold="0 1") as process:
        wait_until(lambda: at(tune.folder, 0) == at(tune.folder, 1) == "1", process)
        process.kill()
        process.wait()
        assert claimed(tune.folder, 0) and claimed(tune.folder, 1)
        (tune.folder / "hold").write_text("9 9")  # they notice at the next validation
        end = time.monotonic() + 60
        while claimed(tune.folder, 0) or claimed(tune.folder, 1):
            assert time.monotonic() < end
            time.sleep(0.01)
    assert tune("--resume").status == 0 and tune.outcomes() == ["complete"] * 2
