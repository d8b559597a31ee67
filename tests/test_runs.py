"""`fusedopt runs`: the list, filters, sorting, damage; `diff` and its picture. Folders are written by hand."""

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_folders import write_run, write_summary
from train_command import Result, assert_refused

from fusedopt import cli
from fusedopt.runs import plot
from fusedopt.runs.folders import find_run

Runs = Callable[..., Result]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Runs:
    """Runs the command in a folder of its own, on a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*args: str) -> Result:
        with pytest.raises(SystemExit) as exit:
            cli.main(["runs", *args])
        captured = capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def four(runs: Runs, tmp_path: Path) -> Path:
    """Two runs of AdamW, one of SGD that translates, one that was stopped."""
    root = tmp_path / "runs"
    write_summary(write_run(root / "train"))
    write_summary(write_run(root / "mine", lr=0.003, loss=1.5, age=9e3))
    folder = write_run(root / "study" / "3", optimizer="sgd", task="translate", loss=4.0, age=8e3)
    write_summary(folder, unit="token", measured={"chrf_held_out": 12.25, "samples": ["a"]})
    write_run(root / "cut", upto=45, lr=0.01, age=7e3)
    return root


def listed(result: Result) -> list[dict[str, Any]]:
    assert result.status == 0, result.err
    return json.loads(result.out)


def names(result: Result) -> list[str]:
    return [Path(record["name"]).name for record in listed(result)]


def test_results_and_settings_of_every_run_newest_first(runs: Runs, four: Path) -> None:
    records = listed(runs("--json"))
    assert [record["name"] for record in records] == ["runs/cut", "runs/study/3", "runs/mine", "runs/train"]
    cut, sgd, mine, _ = records
    assert (cut["status"], cut["step"], cut["best_step"], cut["step_ms"]) == ("stopped", 45, 40, 12.0)
    assert cut["val_loss"] == cut["best_val_loss"] == pytest.approx(2.0 + 3 / 40 + 0.5)
    assert (sgd["status"], sgd["chrf"], sgd["unit"]) == ("done", 12.25, "token")
    assert sgd["settings"]["optimizer_args.momentum"] == 0.9
    assert (mine["held_bytes"], mine["training_loss"], mine["step_ms"]) == (3_000_000, 2.25, 12.5)
    assert mine["settings"]["min_lr"] == 0.003 / 10 and "out" not in mine["settings"]


def test_a_wide_terminal_shows_a_column_per_setting_that_differs(runs: Runs, four: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    header, _, *lines = runs("--filter", "task=text").out.splitlines()
    assert header.split() == "run date status optimizer lr val loss best step ms held MB".split()
    assert lines[0].split() == [
        "cut",
        *lines[0].split()[1:3],
        "stopped",
        "at",
        "45",
        "adamw",
        "0.01",
        *["2.5750"] * 2,
        "12",
    ]
    assert lines[1].split()[-6:] == ["adamw", "0.003", "2.0300", "2.0300", "12.5", "3"]
    assert lines[-1] == "3 runs in runs; losses in nats per byte"
    everything = runs("--filter", "task=text", "--all-settings").out
    assert "min_lr" in everything.splitlines()[0] and "the same in all: task=text" in everything


def test_80_columns_show_every_number_too(runs: Runs, four: Path) -> None:
    out = runs().out
    assert max(map(len, out.splitlines())) <= 80
    for word in ("study/3", "task=translate", "momentum=0.9", "4.5300", "12.2", "12.5", "stopped at 45", "lr=0.003"):
        assert word in out, out
    assert "unless said otherwise: task=text" in out
    assert out.count("task=text") == 1  # where it is not unusual it is not repeated
    assert "min_lr" not in out and "warmup_steps" not in out  # they follow from lr and steps


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--sort", "val_loss"], ["mine", "train", "cut", "3"]),
        (["--sort", "chrf"], ["3", "cut", "mine", "train"]),
        (["--sort", "lr", "--limit", "2"], ["train", "mine"]),
        (["--sort", "name"], ["cut", "mine", "3", "train"]),
        (["--sort", "momentum", "--limit", "1"], ["3"]),
        (["--filter", "optimizer=adamw lr<0.01"], ["mine", "train"]),
        (["--filter", "optimizer=adamw", "--filter", "lr>=3e-3"], ["cut", "mine"]),
        (["--filter", "status!=done"], ["cut"]),
        (["--filter", "momentum>0"], ["3"]),
        (["--filter", "date>2000-01-01 steps=100", "--limit", "1"], ["cut"]),
        (["runs/study"], ["3"]),
        (["runs/mine", "runs", "--limit", "2", "--sort", "best_val_loss"], ["mine", "train"]),
    ],
)
def test_sorting_and_filters(runs: Runs, four: Path, options: list[str], expected: list[str]) -> None:
    assert names(runs(*options, "--json")) == expected


def test_how_a_run_ended(runs: Runs, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "goes-on", upto=30, age=1)
    write_summary(write_run(tmp_path / "runs" / "asked-to-stop", upto=30, age=1), step=30)
    write_summary(write_run(tmp_path / "runs" / "resumed-since", upto=30, age=1), step=20)
    write_summary(write_run(tmp_path / "runs" / "early", upto=60), step=60, stopped_early=True)
    write_summary(write_run(tmp_path / "runs" / "nan", upto=7), step=7, diverged=8)
    write_run(tmp_path / "runs" / "no-summary")
    found = {Path(record["name"]).name: record["status"] for record in listed(runs("--json"))}
    assert found == {
        "goes-on": "running", "asked-to-stop": "stopped", "resumed-since": "running", "early": "stopped-early",
        "nan": "diverged", "no-summary": "done",
    }  # fmt: skip
    assert "running? at 30" in runs().out and "stopped early at 60" in runs().out


def test_damaged_and_older_folders_are_named_or_shown_without_what_they_lack(runs: Runs, four: Path) -> None:
    (four / "train" / "summary.json").write_text('{"step": 100, "runs"')
    (four / "mine" / "summary.json").write_text('{"step": 100, "runs": [], "unit": 3, "seconds": "x"}')
    (four / "mine" / "config.json").write_text('{"lr": "high", "optimizer": null, "text": [["a"]], "odd [red]": NaN}')
    with (four / "cut" / "metrics.jsonl").open("ab") as file:
        file.write(
            b'[1]\n{"step": "x"}\n\xff\xfe\n{"run": "torch", "step": 99, "val_loss": 0}\n{"run": "fusedopt", "st'
        )
    (four / "study" / "3" / "config.json").write_text("{")
    write_run(four / "lost").joinpath("config.json").unlink()
    (four / "model").mkdir()
    (four / "model" / "config.json").write_text("{}")  # somebody else's: no metrics beside it
    for options in ((), ("--all-settings",), ("--csv", "-"), ("--json",)):
        result = runs(*options)
        assert result.status == 0
        (line,) = result.err.splitlines()
        assert line == (
            "fusedopt: damaged: runs/lost: config.json is missing; runs/study/3: config.json is damaged; "
            "runs/train: summary.json is damaged"
        )
    assert sorted(names(result)) == ["cut", "mine", "train"]
    assert {record["step"] for record in listed(result)} == {45, 100}
    assert names(runs("--sort", "lr", "--json"))[-1] == "mine"  # words after numbers


def test_csv_has_a_column_for_everything(runs: Runs, four: Path, tmp_path: Path) -> None:
    assert "4 runs" in runs("--csv", "all.csv", "--sort", "val_loss").out
    text = (tmp_path / "all.csv").read_text()
    assert runs("--csv", "-", "--sort", "val_loss").out == text
    records = list(csv.DictReader(text.splitlines()))
    assert [record["name"] for record in records] == ["runs/mine", "runs/train", "runs/cut", "runs/study/3"]
    assert [record["optimizer_args.momentum"] for record in records] == ["", "", "", "0.9"]
    assert records[3]["chrf"] == "12.25" and json.loads(records[0]["text"]) == []


def test_diff_shows_what_differs_and_every_result(runs: Runs, four: Path) -> None:
    for name, versions in (("train", "2.12"), ("mine", "2.13")):
        write_summary(four / name, environment={"version of torch": versions, "threads": 2})
    result = runs("diff", "train", "runs/mine")
    rows = {line.rsplit(maxsplit=2)[0].strip(): line.split()[-2:] for line in result.out.splitlines() if line.strip()}
    assert rows["lr"] == ["0.002", "0.003"]
    assert rows["min_lr (follows)"] == ["0.0002", "0.0003"]
    assert rows["version of torch"] == ["2.12", "2.13"]
    assert rows["validation loss, last"] == ["2.5300", "2.0300"]
    assert rows["held bytes"] == ["3,000,000", "3,000,000"]
    assert not {"optimizer", "steps", "threads", "out"} & rows.keys()
    assert "do not compare" not in result.out
    both = runs("diff", "train", "3")
    assert "their losses do not compare: task, tokenizer, vocabulary_size differ" in both.out


def test_diff_draws_the_losses_of_each(runs: Runs, four: Path, tmp_path: Path) -> None:
    assert runs("diff", "mine", "cut", "--plot", "both.png").status == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    (axes,) = plot.draw([find_run("mine"), find_run("cut")]).axes
    training, points, _, cut_points = (np.asarray(line.get_xydata()) for line in axes.get_lines())
    assert points[:, 0].tolist() == list(range(0, 101, 10)) and points[-1, 1] == pytest.approx(2.03)
    assert len(training) == 100 and training[-1, 1] == pytest.approx(1.53, abs=0.01)
    assert cut_points[:, 0].tolist() == [0, 10, 20, 30, 40]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["elsewhere"], "no folder elsewhere"),
        (["dif"], "no folder dif: did you mean fusedopt runs diff?"),
        (["empty"], "no runs below empty: fusedopt train makes one"),
        (["--sort", "vall_loss"], "--sort: no run has a vall_loss: did you mean val_loss?"),
        (["--filter", "optimiser=adamw"], "--filter: no run has a optimiser: did you mean optimizer?"),
        (["--filter", "adamw"], "--filter takes conditions such as optimizer=adamw"),
        (["--filter", "lr<low"], "'low' is not a number"),
        (["--filter", "lr>5"], "--filter: none of 4 runs satisfies lr>5"),
        (["--csv", "-", "--json"], "choose one"),
        (["--csv", "no/where.csv"], "cannot write no/where.csv"),
        (["--limit", "0"], "--limit"),
        (["diff", "train"], "diff compares two runs or more"),
        (["diff", "train", "runs/train"], "each named once"),
        (["diff", "train", "min"], "no run min: did you mean mine?"),
        (["diff", "train", "rain"], "no run rain: did you mean train?"),
        (["diff", "train", "runs"], "runs is not a run but holds 5, such as runs/cut"),
        (["diff", "mine", "3"], "3 may be any of 2 runs: runs/other/3, runs/study/3: give more of its path"),
        (["diff", "train", "mine", "--plot", "both.jpeg"], "--plot both.jpeg: a picture ends in .png, .svg, .pdf"),
        (["diff", "train", "mine", "--plot", "no/x.png"], "there is no folder no"),
    ],
)
def test_bad_input_gets_one_line(runs: Runs, four: Path, tmp_path: Path, args: list[str], message: str) -> None:
    (tmp_path / "empty").mkdir()
    if args[0] == "diff":
        write_run(four / "other" / "3")
    assert_refused(runs(*args), message)


def test_the_list_needs_no_torch(runs: Runs, four: Path) -> None:
    program = (
        "import sys; from fusedopt import cli\ntry: cli.main(['runs'])\nfinally: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "4 runs in runs" in result.stdout
