"""`fusedopt train` with low-precision weights and state."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from train_command import SMALL, TEXT, Train, assert_refused, equal, reproducible

from fusedopt.train import checkpoint, optimizers
from fusedopt.train.config import override, resolve
from fusedopt.train.errors import BadInput
from fusedopt.train.optimizers import DEFAULTS, formats
from fusedopt.train.trainer import Trainer

# Wide enough that embedding (8192 elements) and feed-forward (4096) are quantised, the attention (3072) is not.
WIDE = ("--hidden-size", 32)
HEADLINE = ("--dtype", "bf16", "--master", "split8", "--state", "int8")


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    return Train(tmp_path, capsys)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (dict(), dict()),
        (dict(dtype="bf16"), dict()),
        (dict(state="float32"), dict(state_dtype="float32")),
        (dict(state="int8"), dict(state_dtype="int8", state_rounding="nearest")),
        (dict(dtype="bf16", master="kahan"), dict(master_weights="kahan")),
        (dict(dtype="bf16", master="split16", seed=7), dict(master_weights="split16")),
        (dict(dtype="bf16", master="stochastic", seed=7), dict(master_weights="stochastic", seed=7)),
        (
            dict(dtype="bf16", master="split8", seed=7),
            dict(master_weights="split8", master_rounding="stochastic", seed=7),
        ),
        (
            dict(dtype="bf16", master="split8", master_rounding="nearest", state="int4", state_rounding="stochastic"),
            dict(
                master_weights="split8", master_rounding="nearest", state_dtype="int4", state_rounding="stochastic",
                seed=0,
            ),
        ),
        (
            dict(dtype="bf16", master="split8", master_rounding="nearest", seed=7),
            dict(master_weights="split8", master_rounding="nearest"),
        ),
    ],
)  # fmt: skip
def test_what_the_optimizer_is_given(given: dict[str, Any], expected: dict[str, Any]) -> None:
    """Nothing that was not asked for; the run's seed where random numbers are drawn."""
    assert formats(resolve(given, "cpu", DEFAULTS)) == expected


BAD = {
    "fp32 weights": (["--master", "split8"], "--master split8 is for bf16 weights, not for fp32: add --dtype bf16"),
    "fp64 weights": (["--master", "kahan", "--dtype", "fp64"], "--master kahan is for bf16 weights, not for fp64"),
    "autocast": (["--master", "float32", "--amp", "bf16"], "--master float32 is for bf16 weights, not for fp32"),
    "fp64 state": (["--state", "int8", "--dtype", "fp64"], "--state int8 is for fp32 and bf16 weights, not for"),
    "rounding of no master": (
        ["--master-rounding", "nearest"],
        "--master-rounding nearest does nothing without --master split8",
    ),
    "rounding of another master": (
        ["--dtype", "bf16", "--master", "split16", "--master-rounding", "stochastic"],
        "--master-rounding stochastic does nothing without --master split8",
    ),
    "rounding of no state": (
        ["--dtype", "bf16", "--state-rounding", "nearest"],
        "--state-rounding nearest does nothing without a --state that rounds",
    ),
    "rounding of exact state": (["--state", "float32", "--state-rounding", "stochastic"], "--state-rounding"),
    "no averages": (
        ["--optimizer", "sgd", "--optimizer-arg", "momentum=0", "--state", "int8"],
        "SGD keeps no averages",
    ),
    "unknown master": (["--dtype", "bf16", "--master", "split12"], "split16"),
    "unknown state": (["--state", "int2"], "int4"),
    "unknown rounding": (["--state", "int8", "--state-rounding", "up"], "nearest"),
    "reserved": (["--optimizer-arg", "state_dtype='int8'"], "--optimizer-arg state_dtype: the command sets it itself"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(train: Train, args: list[str], message: str) -> None:
    assert_refused(train(*args), message)
    assert not (train.folder / "run" / "metrics.jsonl").exists()


def test_formats_come_from_the_checkpoint_and_stay() -> None:
    given = dict(dtype="bf16", master="split8", master_rounding="nearest", state="int4", state_rounding="stochastic")
    config = resolve(given, "cpu", DEFAULTS)
    saved = {"config": config, "step": 3, "environment": {}}

    def resume(allow_inexact: bool = False, **again: Any) -> list[str]:
        return checkpoint.check_continues(saved, override(config, again), {}, allow_inexact)

    assert override(config, {}) == config and resume() == []
    with pytest.raises(BadInput, match="does not fit: --state was int4, now float32"):
        resume(allow_inexact=True, state="float32")
    with pytest.raises(BadInput, match="does not fit: --master was split8, now kahan"):
        resume(allow_inexact=True, master="kahan")
    with pytest.raises(BadInput, match="not be bit-exact: --state-rounding was stochastic, now nearest"):
        resume(state_rounding="nearest")
    assert resume(allow_inexact=True, state_rounding="nearest", master_rounding="stochastic")


def test_a_run_without_formats_reports_its_bytes(train: Train) -> None:
    """Four of each: weights, gradients and AdamW's two averages, and a step count per parameter."""
    result = train(*WIDE, "--steps", 2, "--ema", 0.9, "--compare", "torch")
    assert result.status == 0, result.err
    runs = json.loads((train.folder / "run" / "summary.json").read_text())["runs"]
    for run in runs.values():
        held = run["bytes_per_parameter"]
        assert (held["weights"], held["gradients"]) == (4.0, 4.0) and 12.0 <= held["state"] < 12.01
    assert "fusedopt.AdamW: 20 bytes per parameter: weights 4, gradients 4, state 12" in result.out


def test_the_headline_command_learns_in_half_the_memory(train: Train) -> None:
    result = train(*WIDE, *HEADLINE, "--steps", 60, "--val-interval", 20, "--lr", 0.01)
    assert result.status == 0, result.err
    validation = [row["val_loss"] for row in train.rows() if "val_loss" in row]
    assert validation[-1] < validation[0] - 1.5
    assert "master weights split8 (rounded at random), state int8 (rounded to nearest)" in result.out
    run = train.state()["runs"]["fusedopt"]
    options = run["optimizer"]["param_groups"][0]["fusedopt"]
    assert options["master_weights"] == "split8" and options["state_dtype"] == "int8"
    embedding = run["optimizer"]["state"][0]
    assert embedding["param_residual"].dtype == torch.uint8 and embedding["exp_avg_q"].dtype == torch.int8
    held = json.loads((train.folder / "run" / "summary.json").read_text())["runs"]["fusedopt"]["bytes_per_parameter"]
    assert (held["weights"], held["gradients"]) == (2.0, 2.0)
    assert 1.0 + 2.0 < held["state"] < 1.0 + 8.0  # the residual, and codes or, of the small parameters, fp32


COMBINED = {
    "fp32, int8": ("--state", "int8"),
    "fp32, float8": ("--state", "float8", "--state-rounding", "stochastic"),
    "float32, float8_e5m2": ("--dtype", "bf16", "--master", "float32", "--state", "float8_e5m2"),
    "split16, bfloat16": (
        "--dtype", "bf16", "--master", "split16", "--state", "bfloat16", "--state-rounding", "stochastic"
    ),
    "split8, int8": (*HEADLINE, "--ema", "0.9"),
    "split8 nearest, int4": (
        "--dtype", "bf16", "--master", "split8", "--master-rounding", "nearest", "--state", "int4", "--state-rounding",
        "stochastic"
    ),
    "kahan, float16": ("--dtype", "bf16", "--master", "kahan", "--state", "float16"),
    "stochastic, int4": ("--dtype", "bf16", "--master", "stochastic", "--state", "int4", "--seed", "5"),
    "sgd": ("--optimizer", "sgd", *HEADLINE),
}  # fmt: skip


@pytest.mark.parametrize("options", COMBINED.values(), ids=COMBINED.keys())
def test_resumed_equals_uninterrupted(train: Train, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]) -> None:
    steps = (*WIDE, "--steps", 14, "--checkpoint-interval", 5, "--val-interval", 7)
    assert train(*steps, *options, out="whole").status == 0
    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", lambda self, measure: _break_off(step(self, measure)))
        assert train(*steps, *options).status == 130
    assert train.state()["step"] == 5
    result = train("--resume", *WIDE)
    assert result.status == 0 and "resuming at step 5" in result.out, result.err
    assert equal(train.state("whole")["runs"], train.state()["runs"])
    assert reproducible(train.rows("whole")) == reproducible(train.rows())


def _break_off(record: Any) -> Any:
    if record.step == 8:
        raise KeyboardInterrupt
    return record


@pytest.mark.long
def test_kernels_train_to_the_bits_of_eager(train: Train) -> None:
    """Interpreted, without clipping, whose norm may round differently."""
    options = [*HEADLINE, "--state-rounding", "stochastic", "--steps", "2", "--clip", "0"]
    result = train(*options, "--backend", "eager")
    assert result.status == 0, result.err
    command = [*SMALL, "--text", TEXT, "--backend", "triton", "--out", str(train.folder / "triton"), *options]
    done = subprocess.run([sys.executable, "-m", "fusedopt.cli", "train", *command], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert equal(train.state()["runs"], train.state("triton")["runs"])


@pytest.mark.filterwarnings("ignore:state 'exp_avg_sq' takes its parameter's dtype")
def test_torch_runs_without_formats(train: Train) -> None:
    options = (*WIDE, "--steps", 3, "--compare", "torch")
    assert train(*options, "--dtype", "bf16", out="plain").status == 0
    result = train(*options, *HEADLINE)
    assert result.status == 0, result.err
    plain, ours = train.state("plain")["runs"], train.state()["runs"]
    assert equal(plain["torch"], ours["torch"]) and not equal(plain["fusedopt"]["model"], ours["fusedopt"]["model"])


@pytest.mark.long
def test_the_seed_decides_how_weights_are_rounded(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed for the rounding alone: the same data and weights before, other weights after."""
    options = (*WIDE, *HEADLINE, "--steps", 3)
    assert train(*options).status == 0
    assert train(*options, out="again").status == 0
    assert equal(train.state()["runs"], train.state("again")["runs"])
    monkeypatch.setattr(optimizers, "formats", lambda config: {**formats(config), "seed": 3})
    assert train(*options, out="other").status == 0
    ours, other = (train.state(out)["runs"]["fusedopt"]["optimizer"] for out in ("run", "other"))
    assert other["param_groups"][0]["fusedopt"]["seed"] == 3
    assert not equal(ours["state"][0]["param_residual"], other["state"][0]["param_residual"])
