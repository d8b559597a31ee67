"""`fusedopt train` with what surrounds the update: clipping, loss scale, weight average, metrics, in the step and, for
torch.optim, around it.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from train_command import Train, assert_refused, equal

from fusedopt.train import plot, progress
from fusedopt.train.summary import METRICS
from fusedopt.train.update import AroundStep, InStep, Update

MEASURED = set(METRICS) - {"loss_scale"}


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    return Train(tmp_path, capsys)


def column(train: Train, name: str, run: str = "fusedopt", out: str = "run") -> list[Any]:
    return [row[name] for row in train.rows(out) if row["run"] == run and name in row]


def options_of(train: Train, out: str = "run") -> list[dict[str, Any]]:
    return [group["fusedopt"] for group in train.state(out)["runs"]["fusedopt"]["optimizer"]["param_groups"]]


# SGD follows the size of its gradients, and the clipped norms below are a fifth of what they were.
SGD = ("--optimizer", "sgd", "--lr", 0.5, "--steps", 12, "--val-interval", 4, "--compare", "torch")


def test_clipping_in_the_step_is_torchs_around_it(train: Train) -> None:
    assert train(*SGD, "--clip", 0.2).status == 0
    assert all(options["clip_grad_norm"] == 0.2 for options in options_of(train))
    ours, torchs = column(train, "grad_norm"), column(train, "grad_norm", "torch")
    assert min(ours) > 0.4 and len(ours) == 12
    # From step 2 on the weights are rounded differently: coefficient · g there, the gradient rewritten here.
    np.testing.assert_allclose(ours, torchs, rtol=1e-5)
    coefficients = column(train, "clip_coefficient")
    np.testing.assert_allclose(coefficients, [0.2 / (norm + 1e-6) for norm in ours], rtol=1e-6)
    assert column(train, "clipped_share") == [1.0] * 12
    assert column(train, "largest_difference")[-1] < 1e-6
    assert train(*SGD, "--clip", 0, out="unclipped").status == 0
    weights = [train.state(out)["runs"]["fusedopt"]["model"]["embedding.weight"] for out in ("run", "unclipped")]
    assert float((weights[0] - weights[1]).abs().max()) > 1e-3
    np.testing.assert_allclose(*(column(train, "grad_norm", run, "unclipped") for run in ("fusedopt", "torch")), 1e-5)


def test_metrics_are_those_of_the_step(train: Train) -> None:
    """update_norm is the distance between two checkpoints; changes are rounded to fp32 before they are summed."""
    for steps in (3, 4):
        assert train("--steps", steps, "--schedule", "constant", "--warmup-steps", 0, out=str(steps)).status == 0
    before, after = (train.state(str(steps))["runs"]["fusedopt"]["model"] for steps in (3, 4))
    after.pop("head.weight")  # tied to the embedding
    row = train.rows("4")[-1]
    assert row.keys() >= MEASURED
    changes = torch.cat([(after[name].double() - before[name].double()).flatten() for name in after])
    weights = torch.cat([after[name].double().flatten() for name in after])
    np.testing.assert_allclose(row["update_norm"], float(changes.norm()), rtol=1e-6)
    np.testing.assert_allclose(row["param_norm"], float(weights.norm()), rtol=1e-6)
    np.testing.assert_allclose(row["update_ratio"], row["update_norm"] / row["param_norm"], rtol=1e-12)
    assert (row["skipped_steps"], row["nonfinite_steps"], row["nonfinite_grads"]) == (0, 0, 0)


def test_the_average_is_validated_beside_the_weights(train: Train) -> None:
    options = ("--steps", 24, "--val-interval", 8, "--compare", "torch", "--lr", 0.01, "--ema", 0.9)
    result = train(*options)
    assert result.status == 0, result.err
    ours, torchs = (column(train, "val_loss_ema", run) for run in ("fusedopt", "torch"))
    plain = column(train, "val_loss")
    assert len(ours) == 3 and plain[-1] < ours[-1] < plain[0]  # the average lags behind
    np.testing.assert_allclose(ours, torchs, rtol=1e-5)
    state = train.state()["runs"]
    averages = [entry["ema"] for entry in state["fusedopt"]["optimizer"]["state"].values()]
    tied = ("n_averaged", "module.head.weight")
    theirs = [value for name, value in state["torch"]["average"].items() if name not in tied]
    norms = [sorted(float(x.norm()) for x in side) for side in (averages, theirs)]
    np.testing.assert_allclose(*norms, rtol=1e-5)
    assert f"ema {ours[-1]:.3f}" in result.out and f"with averaged weights {ours[-1]:.4f}" in result.out
    summary = json.loads((train.folder / "run" / "summary.json").read_text())
    assert summary["runs"]["fusedopt"]["val_loss_ema_last"] == ours[-1]
    assert summary["runs"]["fusedopt"]["metrics"]["grad_norm"] == column(train, "grad_norm")[-1]
    # Averaging and validating the average leave training as it is.
    assert train(*options[:-2], out="plain").status == 0
    assert equal(train.state("plain")["runs"]["fusedopt"]["model"], state["fusedopt"]["model"])
    assert not column(train, "val_loss_ema", out="plain")


def test_overflows_under_fp16_cost_steps_in_both(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """From 2^20 on the scale halves until gradients fit fp16, whose largest number is 65504."""
    for cls in (InStep, AroundStep):
        make = cls._make_scaler

        def too_large(self: Update, make: Any = make) -> torch.amp.GradScaler:
            scaler = make(self)
            scaler.load_state_dict({**scaler.state_dict(), "scale": 2.0**20})
            return scaler

        monkeypatch.setattr(cls, "_make_scaler", too_large)
    options = ("--amp", "fp16", "--steps", 20, "--val-interval", 10, "--compare", "torch", "--ema", 0.9)
    result = train(*options, "--clip", 0.5)
    assert result.status == 0, result.err
    skipped, scales = column(train, "skipped_steps"), column(train, "loss_scale")
    assert 1 <= skipped[-1] < 10 and skipped == sorted(skipped)
    assert scales == [2.0 ** (20 - n) for n in skipped] == column(train, "loss_scale", "torch")
    assert column(train, "grad_norm")[0] is None and column(train, "grad_norm", "torch")[0] is None
    assert column(train, "nonfinite_steps") == skipped
    assert column(train, "largest_difference")[:2] == [0.0, 0.0]  # before, and after the first, skipped step
    # fp16 forward passes amplify differences of the last bit to some 1e-3 of a loss that falls by 1e-1.
    for name in ("val_loss", "val_loss_ema"):
        np.testing.assert_allclose(column(train, name), column(train, name, "torch"), rtol=1e-3)
    steps = {float(s["step"]) for s in train.state()["runs"]["fusedopt"]["optimizer"]["state"].values()}
    assert steps == {20.0 - skipped[-1]}
    assert f"scale {scales[-1]:g} skipped {skipped[-1]}" in result.out
    assert f"{skipped[-1]} step" in result.out and "not finite" in result.out


def test_metrics_are_read_at_log_intervals_only(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    metrics = InStep.metrics
    monkeypatch.setattr(InStep, "metrics", lambda self: (calls.append(1), metrics(self))[1])
    assert train("--steps", 10, "--val-interval", 5, "--log-interval", 4, "--checkpoint-interval", 3).status == 0
    rows = train.rows()
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "grad_norm" in row] == [4, 5, 8, 10] and len(calls) == 4
    assert train("--steps", 10, out="each").status == 0
    assert equal(train.state()["runs"]["fusedopt"]["model"], train.state("each")["runs"]["fusedopt"]["model"])


def test_settings_given_again_on_resume_take_effect(train: Train) -> None:
    start = ("--steps", 6, "--schedule", "constant", "--warmup-steps", 0)
    assert train(*start, "--ema", 0.9, "--clip", 0.5).status == 0
    again = ("--resume", "--allow-inexact", "--steps", 9, "--clip", 0.25, "--lr", 0.01, "--amp", "fp16")
    result = train(*again)
    assert result.status == 0, result.err
    assert [options["clip_grad_norm"] for options in options_of(train)] == [0.25, 0.25]
    assert column(train, "lr")[:6] == [0.002] * 6 and column(train, "lr")[6:] == [0.01] * 3
    assert len(column(train, "loss_scale")) == 3
    counts = {float(s["ema_step"]) for s in train.state()["runs"]["fusedopt"]["optimizer"]["state"].values()}
    assert counts == {9.0}


def test_optimizers_whose_update_is_not_measured_show_the_norm(train: Train) -> None:
    assert train("--optimizer", "adafactor", "--steps", 2, "--ema", 0.5).status == 0
    row = train.rows()[-1]
    assert "grad_norm" in row and "val_loss_ema" in row and "update_norm" not in row


def test_gradients_that_are_not_finite_end_a_run_unless_something_skips_them(train: Train) -> None:
    explosive = ("--optimizer", "sgd", "--lr", 1e30, "--steps", 4, "--warmup-steps", 0)
    assert train(*explosive).status == 1
    spared = train(*explosive, "--optimizer-arg", "skip_norm_above=1e-6", out="spared")
    assert spared.status == 0, spared.err
    assert column(train, "skipped_steps", out="spared")[-1] == 4 and "4 steps skipped" in spared.out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ema", "1"], "--ema must be at least 0 (off) and less than 1"),
        (["--ema", "-0.1"], "--ema"),
        (["--amp", "fp8"], "fp16"),
        (["--amp", "fp16", "--dtype", "bf16"], "--amp fp16 is for fp32 weights"),
        (["--log-interval", "0"], "--log-interval must be at least 1"),
        (["--optimizer-arg", "clip_grad_norm=1.0"], "--optimizer-arg clip_grad_norm: the command sets it itself"),
        (["--optimizer-arg", "metrics=()"], "--optimizer-arg metrics: the command sets it itself"),
        (["--optimizer-arg", "clip_grad_valu=1"], "did you mean clip_grad_value?"),
    ],
)
def test_bad_input(train: Train, args: list[str], message: str) -> None:
    assert_refused(train(*args), message)


def panels(rows: list[dict[str, Any]], clip: float, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[Any] = []
    figure = plot.Figure
    monkeypatch.setattr(plot, "Figure", lambda **settings: made.append(figure(**settings)) or made[-1])
    plot.plot_run(folder, rows, {"fusedopt": "ours"}, clip, "byte")
    return [axes.get_title() for axes in made[-1].axes[1:]]


def test_the_plot_has_a_panel_for_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"run": "fusedopt", "step": 1, "loss": 2.0, "grad_norm": 3.0, "clip_coefficient": 1.0, "skipped_steps": 0}
    assert panels([row], 0.0, tmp_path, monkeypatch) == ["gradient norm"]
    assert panels([row], 1.0, tmp_path, monkeypatch) == ["gradient norm", "clip coefficient"]
    overflow = {**row, "step": 2, "grad_norm": None, "skipped_steps": 1, "loss_scale": 8.0}
    assert panels([row, overflow], 0.0, tmp_path, monkeypatch) == ["gradient norm", "loss scale", "skipped steps"]
    assert panels([{"run": "fusedopt", "step": 0, "val_loss": 2.0}], 1.0, tmp_path, monkeypatch) == []


def test_the_report_names_what_was_clipped_and_skipped() -> None:
    assert progress.around({"clipped_share": 0.0, "skipped_steps": 0}) == []
    assert progress.around({"clipped_share": 0.25, "skipped_steps": 1}) == [
        "25% of the steps clipped",
        "1 step skipped: gradients not finite, or too large",
    ]
