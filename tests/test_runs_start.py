"""`fusedopt runs start`, and the settings that `--config` reads."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_folders import write_run
from train_command import SMALL, TEXT, Result, assert_refused, reproducible

from fusedopt import cli
from fusedopt.runs import start
from fusedopt.train import metrics, settings_file
from fusedopt.train.errors import BadInput
from fusedopt.train.settings import from_options

Command = Callable[..., Result]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `fusedopt` in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object) -> Result:
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in args])
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, captured.out, captured.err)

    return run


def config(folder: str) -> dict[str, Any]:
    return json.loads((Path("runs") / folder / "config.json").read_text())


def test_a_new_run_differs_by_what_was_asked_for_and_what_follows(command: Command) -> None:
    options = ("--text", TEXT, "--steps", 8, "--lr", 0.004, "--optimizer-arg", "betas=(0.8,0.9)", "--out", "runs/old")
    assert command("train", *SMALL, *options).status == 0
    again = command("runs", "start", "old", "--device", "cpu")
    assert again.status == 0, again.err
    assert "from runs/old to runs/old-device=cpu\n  with the same settings" in again.out
    old, new = (reproducible(metrics.read(Path("runs") / name)) for name in ("old", "old-device=cpu"))
    assert old == new  # the same bits: no setting was lost

    result = command("runs", "start", "runs/old", "--lr", 0.01, "--epochs", 0.01, "--optimizer-arg", "eps=1e-6")
    assert result.status == 0, result.err
    name = "old-lr=0.01,epochs=0.01,eps=1e-6"
    before, after = config("old"), config(name)
    changed = {key for key in before if before[key] != after[key]}
    assert changed == {"lr", "min_lr", "steps", "optimizer_args", "out"}
    assert (after["lr"], after["min_lr"], after["steps"]) == (0.01, 0.001, 2)
    assert after["optimizer_args"] == {"betas": [0.8, 0.9], "eps": 1e-6}
    introduction = result.out.split("text:")[0].splitlines()
    assert "  lr: 0.004 -> 0.01" in introduction and "  min_lr: 0.0004 -> 0.001 (follows)" in introduction
    assert "validation loss, last" in result.out and "min_lr (follows)" in result.out

    assert_refused(command("runs", "start", "old", "--out", f"runs/{name}"), "already holds a run")
    assert_refused(command("runs", "start", "old", "--optimizer", "adamx"), "did you mean adam")
    assert_refused(command("runs", "start", "old", "--lr", "-1"), "--lr must be")
    assert_refused(command("runs", "start", "old", "--optimizer-arg", "momentum=1"), "takes no such argument")
    assert_refused(command("runs", "start", "older", "--lr", "1"), "no run older: did you mean old?")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["old", "old-device=cpu", name]


@pytest.mark.parametrize(
    ("old", "options", "name"),
    [
        ("runs/mine", {"lr": 0.003, "steps": 500}, "mine-lr=0.003,steps=500"),
        ("runs/mine-lr=0.003,steps=500", {"steps": 900, "seed": 1}, "mine-lr=0.003,steps=900,seed=1"),
        ("runs/study/trials/3", {}, "study-trials-3"),
        ("elsewhere/a-b", {"text": ("x/y z.txt", "w.txt")}, "a-b-text=y_z.txt_w.txt"),
        ("runs/mine", {"schedule_arg": ("milestones=[1, 2]",)}, "mine-milestones=_1_2_"),
        ("runs/taken", {"lr": 0.1}, "taken-3-lr=0.1"),
    ],
)
def test_a_new_folder_is_named_after_the_old_one_and_the_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: str, options: dict[str, Any], name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for taken in ("taken-lr=0.1", "taken-2-lr=0.1"):
        (tmp_path / "runs" / taken).mkdir(parents=True)
    assert start.claim(Path(old), options) == Path("runs") / name
    assert (tmp_path / "runs" / name).is_dir()


def test_of_a_run_only_what_was_chosen_is_read(tmp_path: Path) -> None:
    given: dict[str, Any] = dict(lr=0.01, warmup_steps=7, steps=300, dtype="bf16", master="split8", seed=3, text=("a",))
    read = settings_file.read(write_run(tmp_path / "run", upto=1, **given) / "config.json")
    assert {name: read[name] for name in given} == given
    derived = {"min_lr", "val_interval", "weight_decay", "device", "backend", "amp", "master_rounding", "out"}
    assert not derived & read.keys()
    defaults = settings_file.read(write_run(tmp_path / "usual", upto=1) / "config.json")
    assert "lr" not in defaults and defaults["batch_size"] == 16
    chosen = write_run(tmp_path / "interpreted", upto=1, backend="triton", min_lr=0.5, lr=1.0) / "config.json"
    assert settings_file.read(chosen).items() >= {"backend": "triton", "min_lr": 0.5}.items()


def test_a_file_holds_what_options_would_give_and_options_win(tmp_path: Path) -> None:
    file = tmp_path / "best.json"
    content: dict[str, Any] = dict(
        lr=1, min_lr=0.1, steps=20, text=["a", "b"], device="cpu", optimizer_args={"betas": [0.9, 0.99]}, patience=None,
        batch_size="full", epochs=0.5, lr_scaling="sqrt", schedule="step", schedule_args={"gamma": 0.5},
    )  # fmt: skip
    file.write_text(json.dumps(content))
    read = settings_file.read(file)
    assert read == {
        **{name: value for name, value in content.items() if name != "patience"},
        "text": ("a", "b"), "optimizer_args": {"betas": (0.9, 0.99)},
    }  # fmt: skip
    assert isinstance(read["lr"], float)
    file.write_text('{"lr": 0.5, "steps": 7}')
    assert from_options({"config": str(file), "lr": 0.25, "seed": None}) == {"lr": 0.25, "steps": 7}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ('{"lr": 0.1', "is not a JSON object of settings: Expecting"),
        ("\xff", "is not a JSON object of settings"),
        ("[1]", "holds a list, not an object"),
        ('{"lr": 0.1, "lr": 0.2}', "lr is in it twice"),
        ('{"lr": NaN}', "JSON has no NaN"),
        ('{"learning_rat": 1}', "unknown setting learning_rat: fusedopt train --help lists them"),
        ('{"min-lr": 1}', "unknown setting min-lr: did you mean min_lr?"),
        ('{"resume": true}', "unknown setting resume"),
        ('{"lr": "0.1"}', "lr must be a number, not the string '0.1'"),
        ('{"lr": true}', "lr must be a number, not true"),
        ('{"steps": 10.5}', "steps must be a whole number, not 10.5"),
        ('{"optimizer": 3}', "optimizer must be a string, not 3"),
        ('{"dtype": "fp31"}', "dtype: 'fp31' is not one of"),
        ('{"batch_size": "all"}', "batch_size: 'all' is neither a whole number nor full"),
        ('{"batch_size": 2.5}', "batch_size: '2.5' is neither a whole number nor full"),
        ('{"batch_size": []}', "batch_size must be a string or a number, not a list"),
        ('{"text": "a.txt"}', "text must be a list of strings"),
        ('{"text": [1]}', "text must be a list of strings"),
        ('{"optimizer_args": ["betas"]}', "optimizer_args must be an object of arguments"),
        ('{"out": "x", "task": "translat"}', "unknown task translat: did you mean translate?"),
    ],
)
def test_a_file_that_cannot_be_used_gets_one_line(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "best.json"
    if content is not None:
        file.write_bytes(content.encode("latin-1"))
    with pytest.raises(BadInput) as error:
        settings_file.read(file)
    assert str(error.value).startswith(f"--config {file}") or "unknown task" in message
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_folder_is_no_file_of_settings(tmp_path: Path, command: Command) -> None:
    folder = write_run(tmp_path / "run", upto=1)
    assert_refused(command("train", "--config", folder), f"the settings of this run are in {folder}/config.json")
    with pytest.raises(BadInput, match="name a JSON file"):
        settings_file.read(tmp_path)
