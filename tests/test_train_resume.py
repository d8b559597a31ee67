"""`fusedopt train --resume`: bit-equality with an uninterrupted run, and refusal of everything that would break it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_command import SMALL, TEXT, Train, assert_refused, equal, reproducible

from fusedopt.train import checkpoint, metrics
from fusedopt.train.trainer import Trainer

STEPS = ("--steps", "24", "--val-interval", "5", "--checkpoint-interval", "7", "--dropout", "0.1")


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    return Train(tmp_path, capsys)


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break off, like a crash, in the middle of a step of the last trainer."""
    original = Trainer.step

    def break_off(self: Trainer, measure: bool) -> object:
        record = original(self, measure)
        if self.steps_done == step:
            raise KeyboardInterrupt
        return record

    monkeypatch.setattr(Trainer, "step", break_off)


@pytest.mark.parametrize(
    "options",
    [
        ("--schedule", "linear"),
        ("--optimizer", "sgd", "--lr", "0.05", "--schedule", "constant"),
        ("--optimizer", "adam", "--optimizer-arg", "amsgrad=True", "--warmup-steps", "0", "--clip", "0"),
        ("--dtype", "bf16",),
        ("--compare", "torch", "--amp", "bf16"),
        ("--compare", "torch", "--amp", "fp16", "--ema", "0.95", "--clip", "1.3", "--log-interval", "3"),
    ],
    ids=["adamw", "sgd", "amsgrad", "bf16", "compare", "around"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:state 'exp_avg_sq' takes its parameter's dtype")
def test_resumed_equals_uninterrupted(train: Train, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    assert train(*STEPS, *options, out="whole").status == 0
    with monkeypatch.context() as patch:
        interrupt_at(18, patch)
        assert train(*STEPS, *options).status == 130
    assert train.state()["step"] == 14
    assert max(row["step"] for row in train.rows()) == (15 if "--log-interval" in options else 17)
    result = train("--resume")  # everything else comes from the checkpoint
    assert result.status == 0 and "resuming at step 14" in result.out
    whole, resumed = train.state("whole"), train.state()
    assert equal(whole["runs"], resumed["runs"])
    assert reproducible(train.rows("whole")) == reproducible(train.rows())
    finished = train("--resume")
    assert finished.status == 0 and "nothing left to train" in finished.out
    assert equal(whole["runs"], train.state()["runs"])


KILLER = """
import os, sys
from fusedopt import cli
from fusedopt.train import checkpoint, trainer

owner, name = {"step": (trainer.Trainer, "step"), "rename": (checkpoint.Path, "replace")}[sys.argv[1]]
original, calls, call, number = getattr(owner, name), [], int(sys.argv[2]), int(sys.argv[3])

def kill(*args, **keywords):
    calls.append(args)
    if len(calls) == call:
        os.kill(os.getpid(), number)
    return original(*args, **keywords)

setattr(owner, name, kill)
cli.main(sys.argv[4:])
"""
"""`KILLER where n signal command…`: runs the command, which kills itself at the n-th step or renaming of a file."""


def test_killed_at_any_moment(train: Train) -> None:
    """kill -9 before the first checkpoint, then with one written but not yet renamed, then SIGTERM: the same bits."""
    options = ["--steps", "60", "--checkpoint-interval", "20", "--val-interval", "25", "--dropout", "0.1"]
    folder = train.folder / "run"
    command = ["train", *SMALL, "--text", TEXT, "--out", str(folder), *options, "--resume"]

    def killed(where: str, call: int, number: signal.Signals) -> tuple[int, str]:
        program = [sys.executable, "-c", KILLER, where, str(call), str(int(number)), *command]
        done = subprocess.run(program, capture_output=True, text=True)
        return done.returncode, done.stderr

    assert killed("step", 15, signal.SIGKILL) == (-signal.SIGKILL, "")
    assert not (folder / "checkpoint.pt").exists() and len(train.rows()) == 15
    # Files are renamed twice at the start (metrics.jsonl, config.json), so the fourth is the checkpoint of step 40.
    assert killed("rename", 4, signal.SIGKILL) == (-signal.SIGKILL, "")
    assert train.state()["step"] == 20 and len(train.rows()) == 41
    assert torch.load(folder / ".checkpoint.pt.tmp")["step"] == 40
    with (folder / metrics.FILE_NAME).open("a") as file:
        file.write('{"run": "fused')
    stopped = killed("step", 30, signal.SIGTERM)
    assert stopped == (128 + signal.SIGTERM, "fusedopt: stopped; continue with --resume\n")
    assert train.state()["step"] == 50
    assert train(*options, "--resume").status == 0
    assert train(*options, out="whole").status == 0
    assert equal(train.state("whole")["runs"], train.state()["runs"])
    assert reproducible(train.rows("whole")) == reproducible(train.rows())


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path: Path) -> None:
    rows = [{"run": "fusedopt", "step": step} for step in range(6)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / metrics.FILE_NAME).write_text(whole + '{"run": "fusedopt", "st')
    assert metrics.read(tmp_path) == rows
    metrics.MetricsLog(tmp_path, step=3).close()
    assert (tmp_path / metrics.FILE_NAME).read_text().splitlines() == whole.splitlines()[:4]


def test_checkpoint_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")
    synced: list[int] = []
    fsync = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), fsync(descriptor)))
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and len(synced) == 2  # the file before the rename, the folder after it

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_atomically(path, b"newer")
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "one bit", "another file"])
def test_damaged_checkpoint_is_refused(train: Train, damage: str) -> None:
    assert train("--steps", 2).status == 0
    path = train.folder / "run" / "checkpoint.pt"
    content = bytearray(path.read_bytes())
    weights = bytes(train.state()["runs"]["fusedopt"]["model"]["embedding.weight"].numpy().tobytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    elif damage == "garbage":
        content = bytearray(b"not a checkpoint at all" * 100)
    elif damage == "one bit":
        content[content.index(weights) + 1000] ^= 4
    path.write_bytes(content)
    if damage == "another file":
        torch.save({"model": torch.zeros(3)}, path)
    before = path.read_bytes()
    assert_refused(train("--resume"), "checkpoint")
    assert path.read_bytes() == before


def test_what_would_not_be_exact_is_refused_unless_allowed(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    text = train.folder / "text.py"
    text.write_bytes(Path(TEXT).read_bytes())
    with monkeypatch.context() as patch:
        interrupt_at(18, patch)
        assert train(*STEPS, text=str(text)).status == 130

    def resume(*args: object):
        return train("--resume", *args, text=None)

    for args in (("--lr", 0.01), ("--batch-size", 2), ("--dropout", 0), ("--seed", 1), ("--schedule", "linear")):
        assert_refused(resume(*args), f"resuming would not be bit-exact: {args[0]} was")
    for args in (("--hidden-size", 32), ("--optimizer", "sgd"), ("--compare", "torch")):
        assert_refused(resume(*args, "--allow-inexact"), f"the checkpoint does not fit: {args[0]} was")
    assert_refused(resume("--steps", 10), "past --steps 10")

    text.write_bytes(Path(TEXT).read_bytes().replace(b"self", b"this"))
    assert_refused(resume(), "the data has changed")
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert_refused(resume(), f"threads was {threads}, now {threads + 1}")
    finally:
        torch.set_num_threads(threads)
    with monkeypatch.context() as patch:
        patch.setattr("fusedopt.__version__", "9.9")
        assert_refused(resume(), "version of fusedopt was")
    result = resume("--allow-inexact", "--lr", 0.01)
    assert result.status == 0 and "not bit-exact: the data has changed" in result.out
    assert train.state()["step"] == 24


def test_an_earlier_run_is_not_buried(train: Train) -> None:
    assert train("--steps", 4).status == 0
    first = train.state()
    assert_refused(train("--steps", 4, "--seed", 1), "already holds a run: add --resume or --overwrite")
    assert_refused(train("--overwrite", "--lr", -1), "--lr")
    assert equal(first, train.state())
    assert train("--steps", 4, "--seed", 1, "--overwrite").status == 0
    assert not equal(first["runs"], train.state()["runs"])
    assert [row["step"] for row in train.rows()] == list(range(5))


def test_resume_without_a_checkpoint_starts_anew(train: Train) -> None:
    folder = train.folder / "run"
    folder.mkdir()
    (folder / metrics.FILE_NAME).write_text('{"run": "fusedopt", "step": 3}\n')
    (folder / ".checkpoint.pt.tmp").write_bytes(b"half a check")
    assert train("--steps", 4, "--resume").status == 0
    assert train("--steps", 4, out="fresh").status == 0
    assert equal(train.state()["runs"], train.state("fresh")["runs"])
    assert reproducible(train.rows()) == reproducible(train.rows("fresh"))


@pytest.mark.gpu
def test_resumed_equals_uninterrupted_on_a_gpu(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's own defaults: compiled kernels, bf16 autocast, losses read ten steps late."""
    options = (*STEPS, "--device", "cuda", "--hidden-size", "64", "--max-seq-len", "64")
    whole = train(*options, out="whole")
    assert whole.status == 0 and "Triton kernels compiled" in whole.out and "autocast bf16" in whole.out
    with monkeypatch.context() as patch:
        interrupt_at(18, patch)
        assert train(*options).status == 130
    assert train("--resume", "--device", "cuda").status == 0
    assert equal(train.state("whole")["runs"], train.state()["runs"])
    assert reproducible(train.rows("whole")) == reproducible(train.rows())
