"""`fusedopt tune` on the command line: refusals, damaged studies, and one study of real runs."""

import fcntl
import json
import shutil
import sqlite3
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import tune_stub
from train_command import SMALL, TEXT, Train, assert_refused
from tune_command import Tune, use_stub

from fusedopt.train.errors import BadInput
from fusedopt.tune import plan, study

ONE = ("--space", "lr=0.01,0.02", "--sampler", "grid")


@pytest.fixture
def tune(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Tune:
    use_stub(monkeypatch)
    return Tune(tmp_path, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "lrr=0:1"], "did you mean lr?"),
        (["--space", "lr=0.1,0.2", "--lr", "0.1"], "lr is searched, and fixed by an option too"),
        (["--space", "optimizer_args.eps=0:1", "--optimizer-arg", "eps=1e-8"], "optimizer_args.eps is searched, and"),
        (["--space", "dropout=0:1.5"], "at 1.5: --dropout must be at least 0 and less than 1"),
        (["--lr", "1", "--weight-decay", "0", "--warmup-steps", "1"], "nothing to search"),
        (["--sampler", "grid"], "lr=log:0.0002:0.02 has no points"),
        (["--sampler", "cmaes", "--space", "optimizer=adam,lion"], "is a list"),
        (["--objective", "chrf_held_out"], "is measured by --task translate, not by text"),
        (["--objective", "val_loss_ema_last"], "give --ema too"),
        (["--space", "vocabulary_size=100,200", "--task", "translate"], "--objective chrf_held_out"),
        (["--task", "translate", "--objective", "bleu_held_out", "--pruner", "median"], "--pruner none"),
        (["--resume"], "holds no study"),
        (["--resume", "--overwrite"], "choose one"),
        (["--optimizer", "adamx"], "did you mean adamax?"),
        (["--trials", "0"], "--trials"),
        (["--search-seed", str(2**32)], "--search-seed"),
        (["--config", "missing.json"], "no such file"),
    ],
)
def test_bad_input_gets_one_line_and_leaves_nothing(tune: Tune, arguments: list[str], message: str) -> None:
    assert_refused(tune(*arguments), message)
    assert not (tune.folder / study.FILE_NAME).exists()


def test_what_a_sampler_needs_is_asked_for_before_anything_is_written(
    tune: Tune, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cmaes", None)  # as if it were not installed
    result = tune("--sampler", "cmaes")
    assert_refused(result, "needs cmaes: pip install 'fusedopt[tune]'")
    assert not (tune.folder / study.FILE_NAME).exists()


def test_a_study_is_not_buried_and_is_resumed_as_it_was(tune: Tune) -> None:
    assert tune(*ONE).status == 0
    assert_refused(tune(*ONE), "already holds a study: add --resume or --overwrite")
    with pytest.raises(BadInput, match="already holds a study"):  # as when another command was faster
        study.create(tune.folder, study.load(tune.folder)[1], overwrite=False)
    assert_refused(tune("--resume", "--sampler", "tpe"), "--sampler was grid, now tpe")
    assert_refused(tune("--resume", "--dropout", 0.1), "dropout was left at its default, now 0.1")
    assert_refused(tune("--resume", "--lr", 0.1), "lr is searched, and fixed")
    assert tune("--resume", *ONE, "--trials", 5).status == 0
    assert len(tune.trials()) == 2
    foreign = tune.folder / study.TRIALS / "mine"
    foreign.mkdir()
    assert tune("--space", "lr=0.03,0.04", "--sampler", "grid", "--overwrite").status == 0
    assert {trial.params["lr"] for trial in tune.trials()} == {"0.03", "0.04"} and foreign.exists()
    with (study.trial_folder(tune.folder, 1) / study.CLAIM).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_refused(tune(*ONE, "--overwrite"), "is being trained by another process")
    assert len(tune.trials()) == 2


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:50_000])


def _garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:40_000] = b"\xff" * (40_000 - 4096)
    path.write_bytes(content)


def _one_page(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096] + b"\xff" * 4096)


def _of_others(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE studies_of_mine (x)")
    database.close()


def _optuna_s(path: Path) -> None:
    path.unlink()
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    optuna.create_study(storage=storage, study_name="another")
    storage.engine.dispose()


def _without_plan(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("DELETE FROM study_user_attributes")
    database.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of nothing yet."""
    folder = tmp_path_factory.mktemp("tune")
    study.create(folder, plan.Plan(tune_stub.SPACE, {}, "random", 0, "none", "val_loss_best", 5, 2), overwrite=False)
    return folder / study.FILE_NAME


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_cut, "is damaged"),
        (_garble, "is damaged"),
        (_one_page, "is damaged"),
        (lambda path: path.write_text("not a database " * 100), "is damaged"),
        (lambda path: path.write_bytes(b""), "is not a study of fusedopt tune"),
        (_of_others, "is not a study of fusedopt tune"),
        (_optuna_s, "is not a study of fusedopt tune"),
        (_without_plan, "does not fit this version"),
    ],
)
def test_a_damaged_or_foreign_study_gets_one_line(tune: Tune, whole: Path, damage: Any, message: str) -> None:
    tune.folder.mkdir()
    path = Path(shutil.copy(whole, tune.folder))
    damage(path)
    content = path.read_bytes()
    result = tune("--resume")
    assert_refused(result, message)
    assert str(path) in result.err and path.read_bytes() == content


def test_settings_of_a_file_are_fixed_unless_they_are_searched(tune: Tune) -> None:
    config = tune.folder.parent / "config.json"
    config.write_text(json.dumps({"lr": 0.5, "clip": 2.0, "optimizer_args": {"betas": [0.5, 0.9]}}))
    result = tune(*ONE, "--config", config, "--space", "optimizer_args.betas.1=0.95,0.99")
    assert result.status == 0 and "fixed: clip=2.0" in result.out
    best = json.loads((tune.folder / "best.json").read_text())
    assert best["lr"] in (0.01, 0.02) and best["clip"] == 2.0
    assert best["optimizer_args"]["betas"] in ([0.5, 0.95], [0.5, 0.99])
    assert tune("--resume", "--config", config).status == 0
    config.write_text(json.dumps({"clip": 3.0}))
    assert_refused(tune("--resume", "--config", config), "clip was 2.0, now 3.0")


def test_real_runs_are_tuned_and_the_best_file_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tune = Tune(tmp_path, capsys)
    sizes = [*SMALL, "--text", TEXT, "--steps", 8, "--val-interval", 4, "--ema", 0.9]
    space = [
        "--space",
        "lr=log:1e-3:1e-1",
        "--space",
        "optimizer=adamw,lion",
        "--space",
        "optimizer_args.betas.1=0.9:0.999",
    ]
    result = tune(*sizes, *space, "--trials", 3, "--sampler", "random")
    assert result.status == 0, result.err
    folders = [study.trial_folder(tune.folder, n) for n in range(3)]
    for trial, folder in zip(tune.trials(), folders, strict=True):
        run = json.loads((folder / "summary.json").read_text())["runs"]["fusedopt"]
        config = json.loads((folder / "config.json").read_text())
        assert trial.value == run["val_loss_best"] and trial.params["lr"] == config["lr"]
        assert config["optimizer_args"]["betas"][1] == trial.params["optimizer_args.betas.1"]
        assert sorted(trial.intermediate_values) == [0, 1, 2]
        assert not (folder / "checkpoint.pt").exists()
    best = min(trial.values[0] for trial in tune.trials())
    done = Train(tmp_path, capsys)("--config", tune.folder / "best.json", "--val-interval", 4, text=None)
    assert done.status == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["runs"]["fusedopt"]["val_loss_best"] == best


def test_results_whose_files_are_gone_get_one_line(tune: Tune) -> None:
    assert tune(*ONE).status == 0
    for number in range(2):
        shutil.rmtree(study.trial_folder(tune.folder, number))
    assert_refused(tune("--resume"), "config.json, the settings of the best trial")
