"""`fusedopt train --parallel`: the loss curve of one process, checkpoints that any number of ranks reads, and an end
that all ranks share.

This file is also the program of its processes: of torchrun, and of those that run the command many times (`one_rank`).
"""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from train_command import SMALL, Train, assert_refused, equal, reproducible
from train_ranks import Rank, during_step, interrupt, restored

from fusedopt import cli
from fusedopt.train import parallel, plot
from fusedopt.train import text as text_task
from fusedopt.train.config import resolve
from fusedopt.train.optimizers import DEFAULTS
from fusedopt.train.parallel import ALONE, Ranks
from fusedopt.train.trainer import Trainer

STEPS = 8
# 25 held-out windows: the last batch of 4 has one, and a rank none.
CURVE = ("--steps", STEPS, "--val-interval", 4, "--val-batches", 100, "--ema", 0.9)
FORMATS = ("--hidden-size", 32, "--dtype", "bf16", "--master", "split8", "--state", "int8", "--ema", 0.9)
BROKEN = (*FORMATS, "--steps", 6, "--checkpoint-interval", 2, "--log-interval", 3, "--dropout", 0.1)
AGAIN = ("--resume", "--hidden-size", 32)
TRANSLATE = ("--task", "translate", "--max-seq-len", 12, "--steps", 6, "--val-interval", 1, "--val-batches", 3,
             "--label-smoothing", 0.1, "--dropout", 0, "--dtype", "fp64", "--lr", 0.3, "--patience", 1)  # fmt: skip
KILLED = ("--steps", STEPS, "--checkpoint-interval", 2, "--ema", 0.9)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Train:
    monkeypatch.setattr(plot, "plot_run", lambda *_: None)  # takes longer than the training
    text(tmp_path).write_bytes(Path(json.__file__).with_name("decoder.py").read_bytes()[:4020])
    return Train(tmp_path, capsys)


def text(folder: Path) -> Path:
    return folder / "text.py"


def test_killed_while_saving(train: Train) -> None:
    """torchrun ends the other rank, the checkpoint before stays, and one process goes on with it."""
    folder = train.folder / "run"
    command = [*SMALL, "--text", text(train.folder), "--out", folder, "--parallel", "fsdp", *KILLED]
    killed = subprocess.run([*TORCHRUN, "2", __file__, "killed", *map(str, command)], capture_output=True, timeout=300)
    assert killed.returncode == 1 and b"step 0/8  val 5." in killed.stdout, killed.stderr
    assert train.state()["step"] == 2
    assert {path.name for path in folder.glob("shards-*")} == {"shards-2", "shards-4"}
    source = str(text(train.folder))
    assert_refused(train("--resume", text=source), "ranks was 2 (fsdp), now 1")
    resumed = train("--resume", "--allow-inexact", text=source)
    assert resumed.status == 0 and "not bit-exact: ranks was 2 (fsdp), now 1" in resumed.out, resumed.err
    assert not list(folder.glob("shards-*")) and train.state()["shards"] is None
    assert train(*KILLED, out="alone", text=source).status == 0
    assert_one_curve(train.rows("alone"), train.rows(), 2.0**-24)


def test_two_ranks_train_as_one_process(train: Train) -> None:
    source = str(text(train.folder))
    assert train(*CURVE, out="alone32", text=source).status == 0
    assert train(*CURVE, "--dtype", "fp64", out="alone64", text=source).status == 0
    assert train(*FORMATS, "--steps", 3, out="formats", text=source).status == 0
    assert train(*TRANSLATE, out="translate", text=None).status == 0
    ranks.agree(__file__, train.folder)

    assert_one_curve(train.rows("alone64"), train.rows("ddp64"), 2.0**-53)
    assert_one_curve(train.rows("alone32"), train.rows("fsdp32"), 2.0**-24)
    assert {"checkpoint.pt", "config.json", "loss.png", "metrics.jsonl", "summary.json"} == files(train, "ddp64")
    held = [summary(train, out)["bytes_per_parameter"] for out in ("ddp64", "fsdp32")]
    assert held[0]["weights"] == 8.0 and held[1]["weights"] == held[1]["gradients"] == 2.0
    assert max(row.get("largest_difference", 0.0) for row in train.rows("compared")) < 1e-5

    assert_one_translation(train)
    assert_resumed_and_moved(train)
    assert train.state("stopped")["step"] == train.rows("stopped")[-1]["step"] == 3

    shard = next((train.folder / "unbroken" / "shards-6").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 4
    shard.write_bytes(content)
    damaged = train("--resume", "--allow-inexact", "--hidden-size", 32, out="unbroken", text=source)
    assert_refused(damaged, f"is damaged (checksum of {shard.name})")


@pytest.mark.long
def test_three_ranks(train: Train) -> None:
    """Sums of three numbers depend on their order: a resumed run has to have that too."""
    assert train(*FORMATS, "--steps", 3, out="formats", text=str(text(train.folder))).status == 0
    ranks.agree(__file__, train.folder, 3)
    assert_resumed_and_moved(train)


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.gpu), pytest.param(2, marks=pytest.mark.gpu(2))])
@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_on_gpus(train: Train, mode: str, count: int) -> None:
    """Compiled kernels, nccl beside gloo: the curve of one GPU, and a checkpoint that it reads."""
    options = (*CURVE, "--device", "cuda", "--amp", "off", "--dropout", 0, "--log-interval", 1)
    assert train(*options, out="alone", text=str(text(train.folder))).status == 0
    command = ["train", *SMALL, "--text", text(train.folder), "--out", train.folder / "run", *options]
    launch = [*TORCHRUN, str(count), "-m", "fusedopt.cli", *map(str, command), "--parallel", mode]
    done = subprocess.run(launch, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_one_curve(train.rows("alone"), train.rows(), 2.0**-24)
    assert loaded(train, "run")["steps_done"] == STEPS


def assert_resumed_and_moved(train: Train) -> None:
    # A run broken off and resumed on as many ranks has the bits of one without a break.
    assert equal(loaded(train, "broken"), loaded(train, "unbroken"))
    assert reproducible(train.rows("broken")) == reproducible(train.rows("unbroken"))
    # What one process saved was read in parts, saved in parts, read by ddp and saved as one process does.
    assert train.state("parts")["shards"] and train.state("back")["shards"] is None
    for out in ("parts", "back"):
        assert equal(loaded(train, "formats"), loaded(train, out))


def assert_one_curve(alone: list[dict[str, Any]], together: list[dict[str, Any]], unit: float) -> None:
    """Losses and norms equal but for the order of sums, in a format with this unit roundoff.

    A gradient element is a sum over N = 4 · 16 bytes: in another order it moves by up to N · unit of the sum of its
    terms' sizes, which is some 10 times the sum itself. An update of size lr follows it; so after steps whose lr sum
    up to S the loss, whose gradient's 1-norm is at most √n · ‖g‖, moves by S · √n · ‖g‖ · 10 · N · unit.
    """
    n, norm = 256 * 16 + 12 * 16**2 + 3 * 16, max(row.get("grad_norm", 0.0) for row in alone)
    bound = sum(row.get("lr", 0.0) for row in alone) * math.sqrt(n) * norm * 10 * 64 * unit + 64 * unit
    assert [row.keys() for row in alone] == [row.keys() for row in together]
    for one, other in zip(alone, together, strict=True):
        for name in {"loss", "val_loss", "val_loss_ema", "grad_norm", "update_norm", "param_norm"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=bound), (name, one["step"])


def assert_one_translation(train: Train) -> None:
    """Rows of a batch differ in length, and so ranks in what they predict; the best weights come back on both."""
    alone, *together = (train.rows(out) for out in ("translate", "translate-ddp", "translate-fsdp"))
    measured = [summary(train, out)["measured"] for out in ("translate", "translate-ddp", "translate-fsdp")]
    assert 2 <= max(row["step"] for row in alone) < 6 and measured[0]["chrf_held_out"] >= 0
    for rows in together:
        assert [row["step"] for row in rows] == [row["step"] for row in alone]
        for one, other in zip(alone, rows, strict=True):
            for name in {"loss", "val_loss", "grad_norm"} & one.keys():
                assert other[name] == pytest.approx(one[name], rel=1e-9), (name, one["step"])  # fp64, 6 steps
    assert measured[0] == measured[1] == measured[2]


def files(train: Train, out: str) -> set[str]:
    return {path.name for path in (train.folder / out).iterdir()}


def summary(train: Train, out: str) -> dict[str, Any]:
    return json.loads((train.folder / out / "summary.json").read_text())["runs"]["fusedopt"]


def loaded(train: Train, out: str) -> dict[str, Any]:
    """The state of a run, read by one process."""
    return restored(train.folder / out, ALONE).state_dict()


def test_without_torchrun_there_is_nothing_parallel(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(
        train("--parallel", "ddp"), "--parallel ddp needs torchrun, which starts the ranks: torchrun --nproc"
    )
    for name, value in zip(parallel.VARIABLES, ("0", "0", "1", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert parallel.from_environment(None, os.environ).alone  # torchrun --nproc-per-node 1
    assert parallel.from_environment("fsdp", os.environ) == Ranks("fsdp")


def test_each_rank_and_step_has_its_own_dropout(train: Train) -> None:
    trainer = Trainer(resolve({}, "cpu", DEFAULTS), "fusedopt", text_task.load([str(text(train.folder))] * 5))
    seeds = []
    for rank, step in ((0, 0), (0, 1), (1, 0), (1, 1), (1, 1)):
        trainer.ranks, trainer.steps_done = Ranks("none", rank, 2), step
        trainer._seed_dropout()
        seeds.append(torch.initial_seed())
    assert len(set(seeds)) == 4 and seeds[3] == seeds[4]


# ---------------------------------------------------------------------------------------------- in the processes
def one_rank(rank: Rank) -> None:
    """What one of two processes does and checks."""
    said = rank.done(*CURVE, "--dtype", "fp64", "--parallel", "ddp", out="ddp64").out
    assert rank.number or "ranks: 2, ddp; 2 of each batch's rows on each" in said
    plot.plot_run = lambda *_: None  # takes longer than the training
    rank.done(*CURVE, "--parallel", "fsdp", out="fsdp32")
    rank.done(*CURVE, "--compare", "torch", "--parallel", "ddp", out="compared")
    for mode in ("ddp", "fsdp"):
        rank.done(*TRANSLATE, "--parallel", mode, out=f"translate-{mode}", text=None)
    _break_off_and_resume(rank, "fsdp", *BROKEN)
    rank.refused("ranks was 2 (fsdp), now 2 (ddp)", *AGAIN, "--parallel", "ddp", out="broken")
    rank.move("formats", "parts", "fsdp")
    rank.move("parts", "back", "ddp")
    _stop(rank)
    _refuse(rank)


def one_of_three(rank: Rank) -> None:
    """What one of three processes does and checks."""
    plot.plot_run = lambda *_: None
    rank.move("formats", "parts", "fsdp")
    rank.move("parts", "back", "ddp")
    _break_off_and_resume(rank, "ddp", *BROKEN, "--batch-size", 6)


def _break_off_and_resume(rank: Rank, mode: str, *options: object) -> None:
    rank.done(*options, "--parallel", mode, out="unbroken")
    with during_step(5, interrupt):
        assert rank(*options, "--parallel", mode, out="broken", silent=False).status == 130
    said = rank.done(*AGAIN, *options[-2:], "--parallel", mode, out="broken").out  # with the same --batch-size
    assert rank.number or "resuming at step 4" in said


def _stop(rank: Rank) -> None:
    """A signal to one rank stops both after the same step."""
    with during_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM) if rank.number else None):
        result = rank("--steps", 500, "--parallel", "ddp", out="stopped")
    assert result.status == 128 + signal.SIGTERM
    assert rank.number or result.err == "fusedopt: stopped; continue with --resume\n"


def _refuse(rank: Rank) -> None:
    """One line, from rank 0, also of what another rank has found; and no rank waits for another."""
    (rank.folder / "other.py").write_bytes(text(rank.folder).read_bytes().replace(b"self", b"this"))
    rank.refused("torchrun started 2 ranks, and each would train by itself: add --parallel ddp or fsdp")
    for message, mode, *args in (
        ("--batch-size 5 is shared out among 2 ranks: make it a multiple of that", "ddp", "--batch-size", 5),
        ("--lr must be a finite number of at least 0", "ddp", "--lr", -1),
        ("norm_at_backward does not work in a torch", "ddp", "--optimizer-arg", "norm_at_backward=True"),
        ("--compare torch trains whole copies of the model: use --parallel ddp", "fsdp", "--compare", "torch"),
        ("--parallel fsdp: Muon works on whole matrices", "fsdp", "--optimizer", "muon"),
    ):
        rank.refused(message, "--parallel", mode, *args)
    for name, message in (("nowhere.py", "does not exist"), ("other.py", "its data is not that of rank 0")):
        rank.refused(message, "--parallel", "ddp", text=name if rank.number else "text.py")


def be_killed(command: list[str]) -> None:
    """Rank 1 dies once it has written its part of the second checkpoint."""
    write, calls = FileSystemWriter.write_data, []

    def write_and_die(self: FileSystemWriter, plan: Any, planner: Any) -> Any:
        written = write(self, plan, planner)
        calls.append(plan)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return written

    FileSystemWriter.write_data = write_and_die
    cli.main(["train", *command])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "killed":
        be_killed(sys.argv[2:])
    store, number, world = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    {2: one_rank, 3: one_of_three}[world](Rank(store, number, world))
    ranks.finish()
