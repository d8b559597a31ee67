"""`python -m perf` as its user types it."""

import sys
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
from click.testing import CliRunner

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf import cases, no_gpu, results, run
from perf.__main__ import main

SMALL = cases.Case("small", "three tensors", lambda: {"a": (64, 64), "b": (7,), "c": ()})


def call(*arguments: str) -> Any:
    return CliRunner().invoke(main, arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--case", "gtp2"), "'gtp2' is not one of 'gpt2'"),
        (("--contender", "torch fussed"), "'torch fussed' is not one of"),
        (("--minutes", "0"), "0.0 is not in the range x>0"),
        (("--minutes", "nan"), "--minutes takes a number of minutes"),
        (("--graph", "--device", "cpu"), "--graph needs a GPU"),
        (("--device", "cpu", "--out", "/dev/null/x.jsonl"), "--out /dev/null/x.jsonl: "),
        (("--device", "cuda"), "torch sees no GPU here"),
        (("--all", "--case", "gpt2"), "--all chooses what is measured"),
        (("--compare", "nowhere.jsonl", "nowhere.jsonl"), "'nowhere.jsonl' does not exist"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(arguments: tuple[str, ...], message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == 2 and message in result.output.splitlines()[-1]


def test_list_names_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    out = call("--list").output
    assert all(f"  {name} " in out for name in (*cases.CASES, *run.FORMATS, *run.WORKS))
    assert "MISSING: " in out and "torch fused, clipping by grad_scale" in out


def test_a_chosen_job_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.CASES, "tiny-1000", SMALL)
    out = tmp_path / "r.jsonl"
    chosen = ("--case", "tiny-1000", "--format", "fp32", "--work", "step", "--contender", "torch fused")
    result = call(*chosen, "--device", "cpu", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert [r["contender"] for r in results.read(out) if r["kind"] == "measured"] == ["fusedopt", "torch fused"]
    assert (
        "not done by" not in result.output
        and "fusedopt takes" in result.output
        and result.output.endswith(f"2 rows in {out}\n")
    )


def test_a_chosen_job_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.CASES, "tiny-1000", SMALL)
    out = tmp_path / "r.jsonl"
    with fake_cuda.on_cpu(monkeypatch):
        results.stamp.cache_clear()
        chosen = (
            "--case",
            "tiny-1000",
            "--format",
            "fp32",
            "--work",
            "amp",
            "--contender",
            "torch fused",
            "--no-graph",
        )
        result = call(*chosen, "--out", str(out))
    results.stamp.cache_clear()
    assert result.exit_code == 0, result.output
    found = [(r["work"], r["contender"]) for r in results.read(out) if r["kind"] == "measured"]
    assert found == [("amp", "fusedopt"), ("amp", "torch fused")]
    assert "µs host" in result.output and "of a copy" in result.output


def test_who_was_asked_for_and_does_not_do_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cases.CASES, "tiny-1000", SMALL)
    chosen = ("--case", "tiny-1000", "--format", "int8", "--work", "step", "--contender", "torch fused")
    assert "    not done by torch fused\n" in call(*chosen, "--device", "cpu", "--out", str(tmp_path / "r")).output


def test_parts_without_a_gpu_end_with_the_time(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    parts = [("a", lambda w: w.add("code")), ("b", lambda w: w.add("host"))]
    monkeypatch.setattr(no_gpu, "PARTS", parts)
    writer = results.Writer(tmp_path / "r.jsonl")
    no_gpu.rows(writer, deadline=float("-inf"))
    assert writer.rows == [] and "out of time: no a" in capsys.readouterr().out
    no_gpu.rows(writer, deadline=sys.float_info.max)
    assert [row["kind"] for row in writer.rows] == ["code", "host"]
