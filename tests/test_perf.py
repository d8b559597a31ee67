"""The programs in perf/ run and print what they promise. Their numbers are nobody's business here."""

import json
import sys

import pytest
import torch

pytest.importorskip("perf", reason="perf/ is part of the checkout only")


def test_eager_cpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from perf import eager_cpu

    for rule in eager_cpu.OPTIONS:
        arguments = ["--rule", rule, "--tensors", "2", "--elements", "1000", "--rounds", "2"]
        monkeypatch.setattr(sys, "argv", ["perf.eager_cpu", *arguments])
        eager_cpu.main()
        assert "torch fused" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", ["perf.eager_cpu", *arguments, "--json"])
        eager_cpu.main()
        seconds = json.loads(capsys.readouterr().out)["seconds"]
        assert {name: len(times) for name, times in seconds.items()} == {
            "torch for-loop": 2, "torch fused": 2, "fusedopt eager": 2,
        }  # fmt: skip


def test_eager_cpu_measures_nothing_wrong() -> None:
    from perf import eager_cpu

    made = eager_cpu.optimizers("adamw", 1, 10)
    with torch.no_grad():
        made["fusedopt eager"].param_groups[0]["params"][0].add_(1e-3)
    with pytest.raises(ArithmeticError, match="nothing was measured"):
        eager_cpu.check(made)


def test_host_time(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own assertions count launches and uploads: two or three and one in every step."""
    from perf import host_time

    monkeypatch.setattr(sys, "argv", ["perf.host_time", "--count", "3", "13", "--rounds", "4"])
    host_time.main()
    out = capsys.readouterr().out
    assert "13 tensors" in out and all(out.count(f"\n{name} ") == 2 for name in host_time.ROWS)
    assert out.count("of torch clip + fused (allowed: 0.25)") == 2
    monkeypatch.setattr(sys, "argv", ["perf.host_time", "--count", "3", "--rounds", "4", "--json"])
    host_time.main()
    assert len(json.loads(capsys.readouterr().out)["seconds"]["3"]["fusedopt AdamW"]) == 4
