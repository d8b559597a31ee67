"""The sanitizer's steps, first steps and training steps: programs that `python -m perf --all` runs."""

import contextlib
import dataclasses
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf import results
from perf.cases import CASES, Case
from perf.contenders import CONTENDERS, FUSEDOPT
from perf.measure import Bench
from perf.stages import first_step, programs, sanitize, training_step


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "r.jsonl"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The imitation of one. torch imports its compiler with the first optimizer, and would do so by the imitation."""
    importlib.import_module("torch._dynamo")
    monkeypatch.setattr(torch, "autocast", lambda *given, enabled: contextlib.nullcontext())
    with fake_cuda.on_cpu(monkeypatch):
        results.machine.cache_clear()
        results.stamp.cache_clear()
        yield
    results.machine.cache_clear()
    results.stamp.cache_clear()


# The sanitizer -----------------------------------------------------------------------------------------------------


def test_the_sanitizer_has_steps_over_odd_tensors(capsys: pytest.CaptureFixture[str]) -> None:
    sanitize.steps("cpu")
    assert capsys.readouterr().out.splitlines() == list(sanitize.STEPS)
    for p in sanitize.parameters(torch.bfloat16, "cpu"):
        for tensor in (p, p.grad):
            assert tensor is not None and tensor.numel() + tensor.storage_offset() == len(tensor.untyped_storage()) // 2


def test_the_tools_summary_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*"; echo "========= ERROR SUMMARY: 2 errors"; exit 99\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = sanitize.program("memcheck", 10.0)
    assert found is not None
    ended = programs.alone(found, tmp_path)
    assert ended.output.startswith("1 --tool memcheck --error-exitcode 99 --padding 65536 ")
    assert ended.output.split("\n")[0].endswith(f"{sys.executable} -m perf.stages.sanitize")
    assert ended.verdict == (False, "ERROR SUMMARY: 2 errors")
    clean = "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
    assert sanitize.judge(0, f"LAMB\n{clean}\n") == (True, clean.lstrip("= "))
    assert sanitize.judge(1, f"ArithmeticError\n{clean}\n").ok is False
    assert sanitize.judge(0, f"LAMB\n{clean.replace('0 haz', '2 haz')}\n").ok is False  # warnings alone exit with 0
    assert sanitize.judge(0, "LAMB\n").ok is False
    assert sanitize.judge(1, "========= Error: Device not supported. Please\n").ok is None
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    assert sanitize.program("memcheck", 10.0) is None


# First step --------------------------------------------------------------------------------------------------------

CHILD = """
import json, os, sys
folder = os.environ["TRITON_CACHE_DIR"]
assert folder == os.environ["TORCHINDUCTOR_CACHE_DIR"]
assert sys.argv[1:7] == ["fusedopt", "fusedopt", "fp32", "clip", "tiny-1000", "cpu"]
seconds = 1.0 if os.listdir(folder) else 9.0
open(folder + "/kernel", "w").close()
print("some warning")
print(json.dumps({"seconds": seconds, "import_s": 2.0, "error": ERROR if sys.argv[7:] == ["check"] else None}))
"""


def first_row(out: Path, monkeypatch: pytest.MonkeyPatch, child: str) -> dict[str, Any]:
    monkeypatch.setattr(first_step, "CHILD", child)
    one = next(first_step.jobs("cpu", "tiny-1000"))
    monkeypatch.setattr(first_step, "jobs", lambda device, case: [one])
    return first_step.rows(results.Writer(out), "cpu", time.monotonic() + 60, "tiny-1000")[-1]


def test_the_first_step_is_timed_over_an_empty_and_a_full_cache(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = first_row(out, monkeypatch, CHILD.replace("ERROR", "1e-7"))
    assert (row["kind"], row["cold_s"], row["warm_s"], row["import_s"]) == ("first", 9.0, 1.0, 2.0)
    assert (row["contender"], row["format"], row["work"], row["case"]) == ("fusedopt", "fp32", "clip", "tiny-1000")


@pytest.mark.parametrize(
    ("child", "why"),
    [(CHILD.replace("ERROR", "0.5"), "off by 0.5 of the change"), ("raise OSError('no')", "OSError: no")],
)
def test_a_first_step_that_is_wrong_has_no_time(
    child: str, why: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = first_row(out, monkeypatch, child)
    assert row["kind"] == "red" and why in row["why"] and "graph" not in row


def test_no_first_step_is_begun_without_time(
    out: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_step, "alone", lambda program, folder: 1 / 0)
    assert first_step.rows(results.Writer(out), "cpu", time.monotonic() + 1, "tiny-1000") == []
    assert "out of time: the rest from fusedopt, fp32, clip on" in capsys.readouterr().out


def test_the_process_of_a_first_step(
    capsys: pytest.CaptureFixture[str], gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CASES, "small", Case("small", "two tensors", lambda: {"a": (64, 64), "b": ()}))
    first_step.child(1.5, "fusedopt", "int8", "amp", "small", "cuda", "check")
    answer = json.loads(capsys.readouterr().out)
    assert answer["seconds"] > 0 and answer["import_s"] == 1.5 and answer["error"] < 0.05
    compile(first_step.CHILD, "child", "exec")
    assert {name for name, _, _ in first_step.FIRST} <= CONTENDERS.keys()
    assert [c.name for c, _ in first_step.jobs("cuda")][:3] == ["fusedopt", "torch fused", "fusedopt"]


# Training step -----------------------------------------------------------------------------------------------------


def test_training_steps_by_everybody(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_step, "ROUNDS", 3)
    monkeypatch.setattr(training_step, "STEPS", 1)
    monkeypatch.setattr(training_step, "product", lambda *names: ())
    made = training_step.rows(results.Writer(out), "cpu", time.monotonic() + 60, training_step.TINY)
    assert [(row["contender"], row["format"]) for row in made] == list(training_step.FIRST)
    for row in made:
        speed = row["tokens_per_s"]
        assert row["kind"] == "train" and 0 < speed["p20"] <= speed["median"] <= speed["p80"]
        assert 0 < row["optimizer_share"] < 1 and row["batch"] * row["sequence"] == 32 and row["rounds"] == 3
        assert ("ratio" in row) == (row["contender"] != "fusedopt")
    size = training_step.FULL.fitted()
    assert 120e6 < size.elements < 128e6 and size.tensors == 74


def test_training_on_a_gpu_takes_the_batch_that_fits(gpu: None, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds no room comes later, at the same batch; who fails is red."""
    monkeypatch.setattr(training_step, "ROUNDS", 3)
    monkeypatch.setattr(training_step, "STEPS", 1)
    monkeypatch.setattr(training_step, "launches", lambda step: step() or 3)
    monkeypatch.setattr(training_step.gc, "collect", lambda: 0)
    monkeypatch.setattr(training_step, "FIRST", (("fusedopt", "fp32"), ("torch fused", "fp32"), ("broken", "fp32")))
    broken = dataclasses.replace(FUSEDOPT, name="broken", make=lambda setup: {}["in its constructor"])
    monkeypatch.setitem(CONTENDERS, "broken", broken)
    monkeypatch.setattr(Bench, "verdict", lambda self, contender, job: None)
    rooms = iter([False, True, True, True])
    monkeypatch.setattr(training_step, "_room", lambda bench, first: next(rooms))
    full, batches = training_step.Training, list[int]()

    def training(contender: Any, job: Any, size: Any, batch: int) -> Any:
        batches.append(batch)
        if batch > 2:
            raise torch.cuda.OutOfMemoryError
        return full(contender, job, size, batch)

    monkeypatch.setattr(training_step, "Training", training)
    size = dataclasses.replace(training_step.TINY, batches=(8, 4, 2, 1))
    monkeypatch.setattr(training_step, "product", lambda *names: ())
    made = training_step.rows(results.Writer(out), "cuda", time.monotonic() + 60, size)
    assert [(row["contender"], row["batch"], row["peak_bytes"], row["launches"]) for row in made] == [
        ("fusedopt", 2, 2000, 3), ("torch fused", 2, 2000, 3),
    ]  # fmt: skip
    assert batches == [8, 4, 2, 2, 2]
    (red,) = [row for row in results.read(out) if row["kind"] == "red"]
    assert red["contender"] == "broken" and "in its constructor" in red["why"]
