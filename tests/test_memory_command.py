"""`fusedopt memory` from the outside: what it prints, and bad input in one line."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fusedopt import cli
from fusedopt.memory import estimate, report
from fusedopt.shapes import MODELS

HERE = Path(__file__)


class Tied(nn.Module):
    """A model of one's own, with a frozen layer and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 64)
        self.frozen = nn.Linear(64, 64).requires_grad_(False)
        self.head = nn.Linear(64, 256, bias=False)
        self.head.weight = self.embed.weight


def broken() -> nn.Module:
    raise RuntimeError("no model\ntoday")


def number() -> int:
    return 3


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["memory", *options])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_without_arguments_it_counts_adamw_over_llama(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys)
    words = " ".join(out.split())
    assert (status, err) == (0, "")
    assert "Llama 3 8B: 8,030,261,248 parameters in 291 tensors" in words
    assert "adamw; float32 parameters; nothing was allocated" in words
    assert "state exp_avg_sq 4.000 29.92" in words and "total 16.000 119.66" in words
    assert "this configuration 4.000 4.000 8.000 0.000 0.000 16.000 119.66 100.0%" in words
    assert "FlashAdamW, bf16, 24-bit 2.000 2.000 2.000 0.125 1.000 7.125 53.29 44.5%" in words
    assert "fusedopt, bf16, split8, int8 2.000 2.000 2.000 0.094 1.000 7.094 53.05 44.3%" in words
    assert "databricks/flashoptim 0.1.3" in words and "Not counted: activations" in words
    assert max(map(len, out.splitlines())) <= report.WIDTH


def test_options_reach_the_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("adamw", "--amsgrad", "--model", "gpt2", "--ema-decay", "0.99", "--param-dtype", "bf16")
    status, out, err = run(capsys, *options, "--grad-dtype", "float32", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert found["configuration"] == {
        "rule": "adamw", "arguments": {"amsgrad": True, "ema_decay": 0.99}, "param_dtypes": ["bfloat16"],
    }  # fmt: skip
    n = MODELS["gpt2"].count
    assert found["memory"] == {
        "parameters": n, "trainable": n, "tensors": 148, "weights": 2 * n, "gradients": 4 * n,
        "state": {"exp_avg": 2 * n, "exp_avg_sq": 2 * n, "max_exp_avg_sq": 2 * n}, "scales": 0, "masters": 0,
        "ema": 4 * n, "counters": 148 * 8, "total": 16 * n + 148 * 8, "bytes_per_parameter": 16 + 148 * 8 / n,
    }  # fmt: skip
    assert [rival["name"] for rival in found["rivals"]][:2] == ["torch fused, fp32", "torch fused, bf16"]
    assert found["rivals"][0]["memory"]["total"] == 16 * n + 148 * 4
    assert all(rival["format"]["source"] for rival in found["rivals"])


def test_low_bit_configurations_stand_beside(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--param-dtype", "bf16", "--master-weights", "split8", "--state-dtype", "{'exp_avg': 'int8'}")
    found = json.loads(run(capsys, "adamw", *options, "--json")[1])
    small = sum(p.numel() for p in MODELS["llama3-8b"].parameters().values() if p.dim() < 2)
    n = found["memory"]["parameters"]
    assert found["memory"]["state"] == {"exp_avg": n + 3 * small, "exp_avg_sq": 4 * n}
    assert found["memory"]["masters"] == n and found["memory"]["scales"] == (n - small) // 32 * 2
    # 2 bytes for the weight, 2 for the gradient, then moments, their scales of 4 and 2 bytes per 64, and the masters.
    expected = [4 + 4 + 2, 4 + 2 + 6 / 64 + 1, 4 + 2 + 6 / 64, 4 + 1 + 6 / 64 + 1]
    assert [each["memory"]["bytes_per_parameter"] for each in found["ours"]] == pytest.approx(expected, abs=1e-3)
    assert found["ours"][1]["arguments"] == {"master_weights": "split8", "state_dtype": "int8"}


def test_options_may_stand_without_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(run(capsys, "--amsgrad", "--model", "gpt2", "--json")[1])
    assert found["configuration"]["rule"] == "adamw" and "max_exp_avg_sq" in found["memory"]["state"]
    out = run(capsys, "sgd", "--momentum", "0.9", "--model", "vit-h-14")[1]
    assert "sgd, momentum=0.9; float32 parameters" in out
    assert "state momentum_buffer 4.000 2,411.06" in " ".join(out.split())


@pytest.mark.parametrize("target", [f"{HERE}:Tied", "tests.test_memory_command:Tied"])
def test_a_model_of_ones_own(target: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "--module", target, "--param-dtype", "bf16", "--json")
    assert (status, err) == (0, "")
    found = json.loads(out)
    assert found["memory"]["parameters"] == 256 * 64 + 64 * 64 + 64
    assert found["memory"]["trainable"] == 256 * 64
    assert found["memory"]["weights"] == 2 * found["memory"]["parameters"]
    assert found["rivals"][0]["memory"]["parameters"] == found["memory"]["parameters"]
    words = " ".join(run(capsys, "--module", target)[1].split())
    assert "20,544 parameters in 3 tensors, 16,384 of them trained" in words


def test_a_model_is_made_on_the_meta_device(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    huge = tmp_path / "huge.py"
    huge.write_text("import torch\ndef net():\n    return torch.nn.Linear(2**24, 2**20, dtype=torch.bfloat16)\n")
    status, out, _ = run(capsys, "--module", f"{huge}:net")
    assert status == 0 and "bfloat16 parameters" in out and "TiB" in out
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command puts the working directory there
    counted = [json.loads(run(capsys, "--module", target, "--json")[1]) for target in (f"{huge}:net", "huge:net")]
    assert counted[0]["memory"] == counted[1]["memory"] and counted[0]["memory"]["parameters"] == 2**44 + 2**20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["adamx"], "unknown rule adamx: did you mean adamax?"),
        (["--model", "gpt3"], "unknown model gpt3: did you mean gpt2?"),
        (["--modle", "gpt2"], "adamw has no option --modle; did you mean --module?"),
        (["--amsgrd"], "did you mean --amsgrad?"),
        (["--param-dtype", "int8"], "unknown dtype int8"),
        (["--grad-dtype", "bfloat1"], "did you mean bfloat16"),
        (["--lr", "-1"], "Invalid learning rate: -1"),
        (["--lr", "fast"], "wrong type"),
        (["--backend", "eager"], "no option --backend"),
        (["adamw", "sgd"], "unexpected argument sgd"),
        (["--master-weights", "split32"], "master_weights must be"),
        (["--param-dtype", "fp16", "--master-weights", "split16"], "needs bfloat16 parameters"),
        (["--state-dtype", "int7"], "state_dtype must be one of"),
        (["muon", "--model", "gpt2"], "only supports 2D parameters"),
        (["--model", "gpt2", "--module", "a:b"], "give one of them"),
        (["--module", "foo"], "--module takes package.module:NAME or FILE.py:NAME, not 'foo'"),
        (["--module", ":foo"], "--module takes package.module:NAME"),
        (["--module", "no_such_module:make"], "cannot make the model 'no_such_module:make': ModuleNotFoundError"),
        (["--module", "nowhere.py:make"], "no file nowhere.py"),
        (["--module", f"{HERE}:missing"], "has no attribute 'missing'"),
        (["--module", f"{HERE}:broken"], "RuntimeError: no model today"),
        (["--module", f"{HERE}:number"], "makes a int, not a torch.nn.Module"),
        (["--module", "torch.nn:Identity"], "makes a model without parameters"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *options)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


def test_the_help_names_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--help")
    assert status == 0 and all(name in out for name in MODELS)


def test_units_fit_the_numbers() -> None:
    assert [report.unit_of(n) for n in (9, 10 * 2**10, 10 * 2**20 - 1, 10 * 2**30, 2**44)] == [
        "B", "KiB", "KiB", "GiB", "TiB",
    ]  # fmt: skip
    assert report.size(3 * 2**29, "GiB") == "1.50" and report.size(12, "B") == "12"


def test_what_there_is_not_gets_no_line() -> None:
    counted = estimate([nn.Parameter(torch.ones(5000))], "sgd")
    assert report.components(counted) == {"weights": 20000, "gradients": 20000}
