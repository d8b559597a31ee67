"""The programs in perf/ run and print what they promise. Their numbers are nobody's business here."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("perf", reason="perf/ is part of the checkout only")


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


def test_host_rows(tmp_path: Path) -> None:
    """Ours beside everybody who has a step of its own, all over as many tensors as the case has."""
    from perf import host
    from perf.results import Writer

    writer = Writer(tmp_path / "rows.jsonl")
    host.rows(writer, ("gpt2",), rounds=3)
    rows = {(row["contender"], row["work"]): row for row in writer.rows}
    assert set(rows) == set(host.TURNS)
    assert {(row["kind"], row["case"], row["tensors"], row["rounds"]) for row in writer.rows} == {
        ("host", "gpt2", 148, 3)
    }
    for (name, work), row in rows.items():
        assert 0 < row["host_us"]["p20"] <= row["host_us"]["median"] <= row["host_us"]["p80"]
        ours = name == "fusedopt"
        assert ("ratio" in row) is not ours and row.get("launches") == (host.LAUNCHES[work] if ours else None)
        assert (row["allocations"] == 0) is (ours or (name, work) == ("torch fused", "step"))


def test_host_rows_of_a_step_that_does_more_are_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one number of tensors; the next one is measured all the same."""
    from perf import host
    from perf.results import Writer

    calls = iter((1, 2))
    monkeypatch.setattr(host, "TURNS", (("fusedopt", "step"),))
    monkeypatch.setattr(host, "allocations", lambda case: next(calls) % 2)
    writer = Writer(tmp_path / "rows.jsonl")
    host.rows(writer, ("gpt2", "resnet50"), rounds=3)
    assert [(row["kind"], row["case"]) for row in writer.rows] == [("red", "gpt2"), ("host", "resnet50")]
    assert "allocates 1 tensors" in writer.rows[0]["why"]
    monkeypatch.setattr(host, "LAUNCHES", {"step": 3})
    host.rows(writer, ("gpt2",), rounds=3)
    assert "10 launches in 5 steps, 3 in each expected" in writer.rows[-1]["why"]
