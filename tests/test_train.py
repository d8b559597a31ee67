"""`fusedopt train`: what a run leaves behind, the comparison with torch.optim, the interpreter, and bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from train_command import SMALL, TEXT, Train, assert_refused, equal

from fusedopt import cli
from fusedopt.train import data, text
from fusedopt.train.config import resolve
from fusedopt.train.optimizers import DEFAULTS, make_schedule
from fusedopt.train.trainer import Trainer


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    return Train(tmp_path, capsys)


def test_a_run_learns_and_leaves_its_files(train: Train) -> None:
    result = train("--steps", 60, "--val-interval", 20, "--lr", 0.01, "--dropout", 0.1)
    assert result.status == 0, result.err
    rows = train.rows()
    assert [row["step"] for row in rows] == list(range(61))
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "optimizer_ms"} <= rows[1].keys()
    validation = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(validation) == [0, 20, 40, 60]
    assert validation[60] < validation[0] - 1.5
    assert "step 60/60" in result.out and f"val {validation[60]:.3f}" in result.out
    folder = train.folder / "run"
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 16
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["runs"]["fusedopt"]["val_loss_last"] == validation[60]


def test_compare_trains_both_and_does_not_disturb_ours(train: Train) -> None:
    options = ("--steps", 12, "--val-interval", 4, "--dropout", 0.1)
    assert train(*options).status == 0
    result = train(*options, "--compare", "torch", out="both")
    assert result.status == 0, result.err
    assert "largest parameter difference after step 12" in result.out and "torch.optim.AdamW" in result.out
    alone, both = train.state()["runs"], train.state("both")["runs"]
    assert equal(alone["fusedopt"], both["fusedopt"])
    theirs = both["torch"]["model"]
    exact = max(float((p - theirs[name]).abs().max()) for name, p in both["fusedopt"]["model"].items())
    differences = [row["largest_difference"] for row in train.rows("both") if "largest_difference" in row]
    assert differences[-1] == exact and 0 < exact < 1e-5
    assert differences[0] == 0.0  # the same seed gives the same weights
    ours, torchs = ([r["loss"] for r in train.rows("both") if r["run"] == run and "loss" in r] for run in both)
    np.testing.assert_allclose(ours, torchs, rtol=1e-4)  # the same data and dropout; lr 2e-3 moves the loss by 1e-2
    plots = [(train.folder / out / "loss.png").read_bytes() for out in ("run", "both")]
    assert plots[0] != plots[1]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.filterwarnings("ignore:state 'exp_avg_sq' takes its parameter's dtype")
def test_compare_in_bf16_uses_a_form_of_torch_that_works(train: Train, optimizer: str) -> None:
    """After one step they are a rounding of bf16 apart (2.4e-4), not the step itself (2e-3 and more)."""
    result = train("--steps", 1, "--compare", "torch", "--dtype", "bf16", "--optimizer", optimizer, "--lr", 0.01)
    assert result.status == 0, result.err
    assert train.rows()[-2]["largest_difference"] < 5e-4


def test_triton_without_a_gpu_runs_interpreted(train: Train) -> None:
    """A process without TRITON_INTERPRET replaces itself by one with it, and the kernels give eager's bits."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    options = ["--steps", "2", "--clip", "0", "--ema", "0.9"]
    command = [*SMALL, "--text", TEXT, "--backend", "triton", "--out", str(train.folder / "triton"), *options]
    done = subprocess.run([sys.executable, "-m", "fusedopt.cli", "train", *command], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert b"Triton kernels interpreted" in done.stdout
    assert train(*options, "--backend", "eager").status == 0
    assert equal(train.state()["runs"], train.state("triton")["runs"])


def test_the_interpreter_gets_a_smaller_model_and_a_gpu_a_larger_one() -> None:
    cpu, interpreted, gpu = (
        resolve(given, device, DEFAULTS)
        for given, device in (({}, "cpu"), ({"backend": "triton"}, "cpu"), ({}, "cuda"))
    )
    assert interpreted.hidden_size < cpu.hidden_size < gpu.hidden_size
    assert (cpu.backend, cpu.amp, gpu.backend, gpu.amp) == ("eager", "off", "triton", "bf16")


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedule(schedule: str) -> None:
    """Warm-up to the peak, then the named curve; cosine and linear meet at half way and end at min_lr."""
    given = dict(schedule=schedule, steps=20, warmup_steps=4, lr=1.0, min_lr=0.1)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_schedule(resolve(given, "cpu", DEFAULTS), optimizer, text.load((TEXT,)))
    lrs = []
    for _ in range(21):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    middle, end = (1.0, 1.0) if schedule == "constant" else (0.55, 0.1)
    np.testing.assert_allclose([*lrs[:5], lrs[12], lrs[20]], [0.2, 0.4, 0.6, 0.8, 1.0, middle, end], rtol=1e-12)


def test_standard_library_text_is_real_and_repeatable() -> None:
    text = data.load_text(())
    assert len(text.train) > 2e6 and b"def " in text.train[:100_000].tobytes()
    assert text.digest == data.load_text(()).digest


def test_each_epoch_visits_every_window_once_and_a_position_is_enough_to_continue() -> None:
    tokens = (np.arange(1000) % 251).astype(np.uint8)
    sampler = data.Sampler(tokens, batch_size=3, seq_len=10, seed=5)
    assert sampler.per_epoch == 98
    starts = [sampler._start(i) for i in range(2 * 98)]
    for epoch in (starts[:98], starts[98:]):
        assert sorted(np.diff(sorted(epoch))) == [10] * 97
        assert min(epoch) >= 0 and max(epoch) + 10 < 1000
    assert starts[:98] != starts[98:]
    batches = [sampler.next() for _ in range(80)]
    again = data.Sampler(tokens, batch_size=3, seq_len=10, seed=5)
    again.position = 70 * 3
    assert equal(batches[70:], [again.next() for _ in range(10)])
    (inputs, targets), predictions = batches[0]
    assert torch.equal(inputs[:, 1:], targets[:, :-1]) and predictions == targets.numel()


BAD = {
    "missing file": (["--text", "no_such_file.txt"], "no_such_file.txt does not exist"),
    "folder": (["--text", "."], "is a folder"),
    "unknown optimizer": (["--optimizer", "adamww"], "did you mean adamw?"),
    "hopeless optimizer": (["--optimizer", "xyz"], "known: adabelief, adadelta, adafactor"),
    "unknown option": (["--hiden-size", "8"], "--hidden-size"),
    "unknown schedule": (["--schedule", "cosin"], "cosine"),
    "negative lr": (["--lr", "-1"], "--lr must be a finite number of at least 0, not -1.0"),
    "lr not a number": (["--lr", "nan"], "--lr"),
    "lr no number": (["--lr", "fast"], "--lr"),
    "heads": (["--num-heads", "3"], "--num-heads 3 does not divide --hidden-size 16"),
    "odd heads": (["--num-heads", "16"], "odd size 1"),
    "no steps": (["--steps", "0"], "--steps must be at least 1"),
    "no batch": (["--batch-size", "0"], "--batch-size"),
    "negative seed": (["--seed", "-3"], "--seed"),
    "dropout": (["--dropout", "1"], "--dropout"),
    "clip": (["--clip", "-0.5"], "--clip"),
    "warm-up": (["--steps", "5", "--warmup-steps", "5"], "--warmup-steps 5 must be less than --steps 5"),
    "min lr": (["--lr", "0.1", "--min-lr", "0.2"], "--min-lr"),
    "short text": (["--batch-size", "4096"], "a batch of 4096 x 16 needs 65537"),
    "short validation": (["--max-seq-len", "2000", "--batch-size", "1"], "held-out tenth"),
    "optimizer argument": (["--optimizer-arg", "momentun=0.9", "--optimizer", "sgd"], "did you mean momentum?"),
    "reserved argument": (["--optimizer-arg", "lr=3"], "--optimizer-arg lr"),
    "unsupported argument": (["--optimizer-arg", "differentiable=True"], "differentiable=True is not supported"),
    "optimizer argument's value": (["--optimizer-arg", "betas=(0.9,2.0)"], "AdamW: "),
    "optimizer argument's form": (["--optimizer-arg", "betas"], "NAME=VALUE"),
    "bf16 twice": (["--dtype", "bf16", "--amp", "bf16"], "--amp bf16"),
    "both": (["--resume", "--overwrite"], "choose one"),
    "stray argument": (["--steps", "5", "stray.txt"], "stray.txt"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line_and_status_2(train: Train, args: list[str], message: str) -> None:
    assert_refused(train(*args), message)


def test_empty_text_is_refused(train: Train) -> None:
    empty = train.folder / "empty.txt"
    empty.touch()
    assert_refused(train(text=str(empty)), "empty.txt is empty")


def test_unwritable_folder_is_refused(train: Train) -> None:
    (train.folder / "file").touch()
    assert_refused(train(out="file"), "cannot write to output folder")
    assert_refused(train(out="file/below"), "cannot write to output folder")
    (train.folder / "run" / "checkpoint.pt").mkdir(parents=True)
    assert_refused(train("--overwrite"), "cannot delete")


def test_several_files_and_literal_arguments(train: Train) -> None:
    files = [TEXT, TEXT.replace("decoder", "encoder"), TEXT.replace("decoder", "scanner")]
    result = train(*files[1:], "--steps", 2, "--optimizer-arg", "betas=(0.8, 0.9)", "--optimizer-arg", "eps=1e-6")
    assert result.status == 0, result.err
    config = json.loads((train.folder / "run" / "config.json").read_text())
    assert config["text"] == files
    group = train.state()["runs"]["fusedopt"]["optimizer"]["param_groups"][0]
    assert group["betas"] == (0.8, 0.9) and group["eps"] == 1e-6 and group["weight_decay"] == 0.1


def test_divergence_stops_the_run_with_status_1(train: Train) -> None:
    result = train("--optimizer", "sgd", "--lr", 1e30, "--steps", 20)
    assert result.status == 1
    assert result.err.count("\n") == 1 and "try a lower --lr" in result.err
    assert all(np.isfinite(row.get("loss", 0.0)) for row in train.rows())


@pytest.mark.parametrize("module", ["click", "rich", "matplotlib"])
def test_missing_extra_names_the_remedy(module: str) -> None:
    program = f"import sys; sys.modules[{module!r}] = None; from fusedopt.cli import main; main(['train'])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"fusedopt: this command needs {module}: pip install 'fusedopt[cli]'\n"


def test_help_names_every_option_by_section_and_imports_no_torch() -> None:
    call = "try: main(['train', '--help'])\nfinally: assert 'torch' not in sys.modules"
    program = f"import sys; from fusedopt.cli import main\n{call}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = "text hidden-size num-layers num-heads max-seq-len dropout steps batch-size seed dtype clip ema amp lr "
    for name in (names + "optimizer schedule backend compare parallel out resume log-interval allow-inexact").split():
        assert f"--{name} " in done.stdout or f"--{name}\n" in done.stdout
    for section in ("Data:", "Model:", "Training:", "Optimizer:", "Run:"):
        assert f"\n{section}\n" in done.stdout


def test_top_level_help_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main([])
    shown = capsys.readouterr().out
    assert exit.value.code == 0 and all(name in shown for name in cli.COMMANDS)
    with pytest.raises(SystemExit) as exit:
        cli.main(["trian"])
    assert exit.value.code == 2 and capsys.readouterr().err.count("\n") == 1


def test_validation_sees_no_dropout_and_leaves_no_trace() -> None:
    given = dict(hidden_size=16, num_layers=1, num_heads=2, max_seq_len=16, batch_size=4, dropout=0.5)
    first, second = (Trainer(resolve(given, "cpu", DEFAULTS), "fusedopt", text.load((TEXT,))) for _ in range(2))
    assert first.evaluate() == first.evaluate() == second.evaluate()
    first.evaluate()
    for trainer in (first, second):
        trainer.step()
    assert equal(first.state_dict(), second.state_dict())
