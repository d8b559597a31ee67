"""Early stopping and the best weights; the watched learning rate; schedules that listen to validation."""

import json
from pathlib import Path

import pytest
import torch
from train_command import Train, assert_refused, equal, reproducible

from fusedopt.train import best, job, loop, session
from fusedopt.train.parallel import ALONE
from fusedopt.train.stopping import Stopping
from fusedopt.train.trainer import Trainer

WORSE = ("--steps", 60, "--lr", 0.2, "--schedule", "constant", "--clip", 0, "--val-interval", 3, "--patience", 2)
"""Learns for a while, then no longer."""


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    return Train(tmp_path, capsys)


def test_patience_counts_validations_without_a_lower_loss() -> None:
    stopping = Stopping(2)
    seen = [(stopping.see(step, loss), stopping.stops) for step, loss in enumerate((3.0, 2.0, 2.0, 1.5, 1.6, 1.7), 1)]
    assert seen == [(True, False), (True, False), (False, False), (True, False), (False, False), (False, True)]
    again = Stopping(3)
    again.load_state_dict(stopping.state_dict())
    assert not again.stops and not again.see(7, float("nan")) and again.stops and again.best_step == 4
    assert not Stopping(0).stops


def test_a_run_stops_with_its_best_weights(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    result = train(*WORSE)
    validation = {row["step"]: row["val_loss"] for row in train.rows() if "val_loss" in row and row["step"]}
    step = min(validation, key=lambda k: validation[k])
    last = step + 6
    assert result.status == 0 and max(validation) == last < 60
    assert f"stopped early: no lower loss since step {step}, whose weights are restored" in result.out
    summary = json.loads((train.folder / "run" / "summary.json").read_text())
    assert summary["stopped_early"] and summary["restored_step"] == step
    assert [file.name for file in (train.folder / "run").glob("best-*.pt")] == [f"best-{step}.pt"]

    settled = job.settle({"out": str(train.folder / "run")}, True, False, False, ALONE)
    run = loop.run(settled, session._View(None))  # over: restores and measures
    trainer = run.trainers["fusedopt"]
    assert trainer.evaluate()["val_loss"] == pytest.approx(validation[step], rel=1e-6)
    saved = torch.load(best.path(train.folder / "run", step), weights_only=True)
    assert equal(dict(trainer.model.state_dict()), dict(saved))
    assert not equal(dict(saved), dict(train.state()["runs"]["fusedopt"]["model"]))

    with monkeypatch.context() as patch:
        _interrupt_at(last - 1, patch)
        assert train(*WORSE, "--checkpoint-interval", 4, out="broken").status == 130
    assert train("--resume", out="broken").status == 0
    assert reproducible(train.rows("broken")) == reproducible(train.rows())
    assert equal(train.state("broken")["runs"], train.state()["runs"])
    again = train("--resume", out="broken")
    assert again.status == 0 and "stopped early" in again.out and max(r["step"] for r in train.rows("broken")) == last
    assert train("--resume", "--patience", 3, out="broken").status == 0
    assert max(row["step"] for row in train.rows("broken")) > last

    (train.folder / "run" / f"best-{step}.pt").write_bytes(b"damaged")
    assert_refused(train("--resume"), "the best weights of this run, is damaged")
    (train.folder / "run" / f"best-{step}.pt").unlink()
    assert_refused(train("--resume"), "the best weights of this run, is gone")


def test_the_best_weights_of_a_schedule_free_run_are_its_average(train: Train) -> None:
    options = ("--optimizer", "schedule_free_adamw", "--lr", 0.05, *WORSE[:2], *WORSE[6:], "--patience", 1)
    assert train(*options).status == 0
    validation = {row["step"]: row["val_loss"] for row in train.rows() if "val_loss" in row and row["step"]}
    settled = job.settle({"out": str(train.folder / "run")}, True, False, False, ALONE)
    trainer = loop.run(settled, session._View(None)).trainers["fusedopt"]
    step = json.loads((train.folder / "run" / "summary.json").read_text())["restored_step"]
    assert trainer._held_out_loss(trainer.model) == pytest.approx(validation[step], rel=1e-6)


def test_patience_may_begin_later(train: Train) -> None:
    assert train("--steps", 6, "--val-interval", 1).status == 0
    result = train("--resume", "--steps", 8, "--allow-inexact", "--patience", 4)
    assert result.status == 0 and "lowest validation loss at step 8" in result.out, result.err
    (train.folder / "run" / "best-3.pt").touch()
    assert train("--overwrite", "--steps", 2).status == 0
    assert not list((train.folder / "run").glob("best-*"))


def test_a_last_step_that_diverges_is_told(train: Train) -> None:
    result = train("--optimizer", "sgd", "--lr", 1e38, "--steps", 1, "--clip", 0, "--warmup-steps", 0)
    assert result.status == 1 and "validation loss" in result.err and "at step 1" in result.err
    assert json.loads((train.folder / "run" / "summary.json").read_text()) == {"diverged": 1}


def test_plateau_lowers_the_rate_and_resumes(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--steps", 40, "--lr", 0.2, "--clip", 0, "--val-interval", 2, "--checkpoint-interval", 5,
               "--schedule", "plateau", "--schedule-arg", "patience=0", "--schedule-arg", "factor=0.5")  # fmt: skip
    assert train(*options).status == 0
    rates = [row["lr"] for row in train.rows() if row["step"] > 2]
    assert rates == sorted(rates, reverse=True) and rates[-1] <= 0.05
    with monkeypatch.context() as patch:
        _interrupt_at(33, patch)
        assert train(*options, out="broken").status == 130
    assert train("--resume", out="broken").status == 0
    assert reproducible(train.rows("broken")) == reproducible(train.rows())
    assert_refused(train("--resume", "--val-interval", 4), "--val-interval was 2, now 4")  # it decides here
    assert train("--resume", "--steps", 44, "--allow-inexact").status == 0
    assert train.rows()[41]["lr"] <= rates[-1]  # what it has learnt stays


def test_a_file_changes_the_rate_of_a_running_job(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    file = train.folder / "lr"
    step = Trainer.step

    def write(self: Trainer, measure: bool = False) -> object:
        if self.steps_done in (4, 8):
            file.write_text({4: "0.0007\n", 8: ""}[self.steps_done])
        return step(self, measure)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", write)
        assert train("--steps", 12, "--schedule", "constant", "--warmup-steps", 0, "--lr-file", file).status == 0
    assert [row["lr"] for row in train.rows()[1:]] == [2e-3] * 5 + [7e-4] * 4 + [2e-3] * 3


def test_a_file_may_be_watched_from_a_resume_on_and_no_longer(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    file = train.folder / "lr"
    file.write_text("0.0007")
    options = ("--steps", 12, "--warmup-steps", 0, "--checkpoint-interval", 4)
    assert train(*options, out="plain").status == 0
    plain = [row["lr"] for row in train.rows("plain")[1:]]
    for out, before, after in (("no longer", ("--lr-file", file), ("--lr-file", "")), ("new", (), ("--lr-file", file))):
        with monkeypatch.context() as patch:
            _interrupt_at(10, patch)
            assert train(*options, *before, out=out).status == 130
        assert train("--resume", *after, out=out).status == 0
    assert [row["lr"] for row in train.rows("no longer")[1:]] == [7e-4] * 8 + plain[8:]
    assert [row["lr"] for row in train.rows("new")[1:]] == plain[:8] + [7e-4] * 4


def _interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Trainer.step

    def break_off(self: Trainer, measure: bool) -> object:
        if self.steps_done == step:
            raise KeyboardInterrupt
        return original(self, measure)

    monkeypatch.setattr(Trainer, "step", break_off)
