"""`fusedopt train --task translate`: a run, the same run resumed, and refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from train_command import Train, assert_refused, equal

from fusedopt.train.trainer import Trainer
from fusedopt.train.translate import corpus
from fusedopt.train.translate.task import load

TRANSLATE = ("--task", "translate", "--vocabulary-size", 300, "--dropout", 0.1, "--checkpoint-interval", 2)


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    return Train(tmp_path, capsys)


def ours(train: Train, out: str) -> dict[str, Any]:
    return json.loads((train.folder / out / "summary.json").read_text())["runs"]["fusedopt"]


def test_a_resumed_run_has_the_bits_and_scores_of_one_that_was_not_broken_off(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(*TRANSLATE, "--steps", 4, text=None, out="whole")
    assert result.status == 0, result.err
    assert "corpus: French catalogues of django" in result.out and "nats per token" in result.out
    measured = ours(train, "whole")["measured"]
    assert {"chrf_train", "chrf_held_out", "bleu_held_out", "chrf_copy_held_out", "samples"} <= measured.keys()
    original = Trainer.step

    def break_off(self: Trainer, measure: bool) -> object:
        if self.steps_done == 3:
            raise KeyboardInterrupt
        return original(self, measure)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", break_off)
        assert train(*TRANSLATE, "--steps", 4, text=None).status == 130
    result = train("--resume", text=None)
    assert result.status == 0 and "resuming at step 2" in result.out
    assert equal(train.state("whole")["runs"], train.state()["runs"])
    assert ours(train, "run")["measured"] == measured


def test_what_cannot_work_is_refused_in_one_line(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(train(*TRANSLATE, "--batch-size", 4000, text=None), "--batch-size 4000 is more than")
    assert_refused(train(*TRANSLATE, "--vocabulary-size", 100, text=None), "--vocabulary-size must be at least 259")
    assert_refused(train(*TRANSLATE, "--tokenizer", "words", text=None), "words")
    monkeypatch.setattr(corpus, "PACKAGES", ("django", "no_such_package"))
    load.cache_clear()
    missing = "needs no_such_package, not installed here: pip install 'fusedopt[translate]'"
    assert_refused(train(*TRANSLATE, text=None), missing)
    assert not (train.folder / "run").exists()
