"""`python -m perf.tune`: launch shapes are measured or read from code, and chosen by what was found."""

import dataclasses
import random
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch
from click.testing import CliRunner, Result

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from fusedopt_kernels import launch, numerics, table, tuning
from perf import results, tune
from perf.cases import Case
from perf.clock import HostClock
from perf.tune import choice as tune_choice
from perf.tune import code as tune_code
from perf.tune import text as tune_text
from perf.tune import timing as tune_time
from perf.tune import trials as tune_trials
from perf.tune.trials import PRESENT, TRIALS, Candidate, applied, candidates


def test_each_row_of_the_table_has_a_trial_that_takes_it() -> None:
    assert set(TRIALS) == set(tuning.SHAPES)
    for kind, trial in TRIALS.items():
        odd = dataclasses.replace(tuning.SHAPES[kind], warps=16)
        p = torch.nn.Parameter(torch.zeros(65, 64, dtype=trial.form.dtype))
        p.grad = torch.zeros_like(p)
        optimizer = trial.build([p])
        optimizer._launcher = recorder = launch.Recorder()
        with applied(kind, Candidate(odd, 4 * table.CHUNK)):
            optimizer.step()
        spec, _, _ = recorder.record[-1]
        assert (spec.num_warps, spec.constants["CHUNK"]) == (16, 4 * 16384)
    assert table.CHUNK == 16384 and all(shape.warps < 16 for shape in tuning.SHAPES.values())


# Measured -----------------------------------------------------------------------------------------------------------

SMALL = Case("small", "two tensors", lambda: {"a": (65, 64), "b": (7,)})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few candidates on two tensors, in three rounds, on whatever runs kernels here."""
    monkeypatch.setattr(tune_time, "CASES", {"small": SMALL})
    monkeypatch.setattr(tune_time, "SHAPES", SMALL.shapes())
    monkeypatch.setattr(tune_time, "ROUNDS", 3)
    for name in ("SHAPES", "CHUNKS"):
        monkeypatch.setattr(tune_trials, name, ())
    for kind, trial in TRIALS.items():
        monkeypatch.setitem(TRIALS, kind, dataclasses.replace(trial, cases=("small",)))


def measured(tmp_path: Path, device: str, only: str, kinds: tuple[str, ...] = ("quantised",)) -> list[results.Row]:
    writer = results.Writer(tmp_path / "rows.jsonl")
    tune.measure(writer, kinds, only, time.monotonic() + 60, HostClock(), device)
    return writer.rows


@pytest.mark.usefixtures("small")
def test_candidates_are_timed_beside_the_present_shape(tmp_path: Path, device: str) -> None:
    rows = measured(tmp_path, device, "one buffer")
    assert results.read(tmp_path / "rows.jsonl") == rows
    assert [(r["kind"], r["row"], r["name"], r["arena"]) for r in rows] == [
        ("tune", "quantised", PRESENT, False), ("tune", "quantised", "state in one buffer", True),
    ]  # fmt: skip
    assert rows[0]["ratio"] == {"p20": 1.0, "median": 1.0, "p80": 1.0} and rows[1]["rounds"] == 3
    assert tune.tell(rows, tmp_path / "note.md") == 0
    assert "| state in one buffer |" in (tmp_path / "note.md").read_text()


@pytest.mark.usefixtures("small")
def test_a_candidate_with_other_bits_or_that_fails_is_red_and_stops_nobody(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    in_one_buffer, planned = tune_time.in_one_buffer, tune_time.planned

    def forgetful(state: Any) -> Any:
        copied = in_one_buffer(state)
        for own in copied.values():
            own["exp_avg_sq"].zero_()
        return copied

    def unwilling(kind: str, candidate: Candidate, *rest: Any) -> Any:
        if candidate.shape.programs:
            raise RuntimeError("no\nroom")
        return planned(kind, candidate, *rest)

    monkeypatch.setattr(tune_time, "in_one_buffer", forgetful)
    monkeypatch.setattr(tune_time, "planned", unwilling)
    monkeypatch.setattr(tune_time, "CASES", {"small": SMALL, "none": Case("none", "", lambda: {"a": (10**6, 10**6)})})
    monkeypatch.setitem(TRIALS, "fp32", dataclasses.replace(TRIALS["fp32"], cases=("none", "small")))
    rows = measured(tmp_path, device, "", ("fp32",))
    red = {r["name"]: r["why"] for r in rows if r["kind"] == "red"}
    assert red.pop("state in one buffer") == "ArithmeticError: a step does not give the bits of the present row"
    assert set(red.values()) == {"RuntimeError: no room"} and all("persistent" in name for name in red)
    assert {r["name"] for r in rows if r["kind"] == "tune"} == set(candidates("fp32")) - {"state in one buffer", *red}
    assert "fp32, none: does not fit" in capsys.readouterr().out


@pytest.mark.usefixtures("small")
def test_a_gpu_is_timed_by_its_clock_and_kernels_are_compiled_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an imitation where there is none; the processes that compile are imitated too."""
    writer, ended = results.Writer(tmp_path / "rows.jsonl"), shutil.which("true")
    monkeypatch.setattr(sys, "executable", ended)
    with nullcontext() if torch.cuda.is_available() else fake_cuda.on_cpu(monkeypatch):
        tune.measure(writer, ("fp32",), "one buffer", time.monotonic() + 60)
        assert tune.default_out(True).name.startswith("tuning-") and tune.default_out(False).name == "tuning.jsonl"
    assert [(r["kind"], r["device"], r["name"]) for r in writer.rows] == [
        ("tune", "cuda", PRESENT), ("tune", "cuda", "state in one buffer"),
    ]  # fmt: skip


class Endless(subprocess.Popen):
    """A process that does not end by itself."""

    def __init__(self, command: list[str], **more: Any) -> None:
        super().__init__(["sleep", "600"])


def test_who_compiles_too_long_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Endless] = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(Endless(*a, **k)) or started[-1])
    tune_time.compile_ahead(("fp32",), "", time.monotonic() + 0.2)
    assert started and all(process.returncode == -9 for process in started)


@pytest.mark.usefixtures("small")
def test_no_job_begins_after_the_deadline(tmp_path: Path, device: str) -> None:
    writer, told = results.Writer(tmp_path / "rows.jsonl"), []
    tune_time.rows(writer, tune_time.order(TRIALS), 0.0, HostClock(), candidates, device, told.append)
    assert (writer.rows, told) == ([], ["out of time"])
    assert tune.tell(writer.rows, None) == 1


@pytest.mark.usefixtures("small")
def test_candidates_are_made_ready_in_parts(device: str) -> None:
    parts = [set(tune_time.compiled_in_turn(["fp32"], "", part, 2, device)) for part in range(2)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == {f"fp32: {name}" for name in candidates("fp32")}


# Chosen -------------------------------------------------------------------------------------------------------------


def timed(ratios: dict[str, tuple[float, ...]], kind: str = "fp32") -> list[results.Row]:
    """Rows of candidates by name, with their ratios case by case."""
    machine = {"gpu": "Imitation", "triton": "0", "cpu": "none"}
    return [
        {
            "kind": "tune", "row": kind, "name": name, "case": f"case{i}", "machine": machine, "device_ms": r,
            "ratio": {"p20": r, "median": r, "p80": r}, **candidates(kind)[name].fields(),
        }
        for name, found in ratios.items()
        for i, r in enumerate(found)
    ]  # fmt: skip


def test_what_is_fastest_on_all_cases_is_chosen() -> None:
    ours = {PRESENT: (1.0, 1.0), "512 / 256, 4 warps": (0.9, 0.98), "persistent, 8 programs": (0.8, 1.05)}
    rows = timed({**ours, "2048 / 1024, 8 warps": (0.5,), "state in one buffer": (0.1, 0.1)})
    rows += timed({PRESENT: (1.0,), "chunks of 8,192": (0.9,), "512 / 256, 2 warps": (0.995,)}, "mixed")
    (first, second), chunk = tune_choice.from_times(rows, "Imitation")
    assert first.line == '"fp32": Shape(512, 256, 4, chosen="measured on Imitation"),'
    assert second.line == '"mixed": Shape(1024, 512, 8, chosen="measured on Imitation"),'
    assert chunk == 16384  # of fp32 nothing is known
    assert 'Shape(512, 256, 4, chosen="measured on Imitation")' in tune_text.of_times(rows)
    assert "CHUNK = 8192  # table.py" in tune_text.of_times([r for r in rows if r["row"] == "mixed"])


def test_what_is_best_by_itself_is_tried_together() -> None:
    ratios = {PRESENT: (1.0,), "512 / 256, 4 warps": (0.9,), "chunks of 8,192": (0.95,), "chunks of 4,096": (0.97,)}
    together = tune_choice.combination("fp32", timed(ratios))
    assert together == Candidate(dataclasses.replace(tuning.SHAPES["fp32"], block=512, tail=256), 8192)
    del ratios["512 / 256, 4 warps"]
    assert tune_choice.combination("fp32", timed(ratios)) is None


def coded(kind: str, found: dict[str, dict[str, Any]], arch: str = tune_code.MAIN) -> list[results.Row]:
    """Rows of candidates by name, where they differ from an ordinary one."""
    usual = {
        "registers": 54, "stack": 0, "spills": 0, "barriers": 0, "tail_barriers": 0, "programs_per_sm": 9,
        "in_flight": 147456, "needed": 32576, "bytes": 28.0, "instructions": 42.0, "tail_instructions": 62.0,
        "memory_ps": 6.5, "issue_ps": 1.3, "arch": arch, "machine": {"triton": "0"},
    }  # fmt: skip
    return [
        {"kind": "tune", "row": kind, "name": name, **candidates(kind)[name].fields(), **usual, **more}
        for name, more in found.items()
    ]


def test_code_refuses_what_spills_or_waits_and_decides_only_what_is_clear() -> None:
    wins = {"memory_ps": 5.0}
    found = {PRESENT: {}, "512 / 256, 2 warps": {**wins, "spills": 2}, "512 / 256, 4 warps": {**wins, "barriers": 64}}
    rows = coded("fp32", {**found, "1024 / 256, 4 warps": {"memory_ps": 6.4}, "chunks of 4,096": wins})
    rows += coded(
        "half", {**found, "2048 / 1024, 4 warps": {"memory_ps": 6.0}, "1024 / 128, 4 warps": {"memory_ps": 6.0}}
    )
    rows += coded("fp64", {PRESENT: {"stack": 8}, "512 / 256, 2 warps": {"issue_ps": 7.0}})
    rows += coded("fp32", {PRESENT: {"registers": 77}}, "sm_80")
    expected = [("fp32", PRESENT), ("half", "1024 / 128, 4 warps"), ("fp64", "512 / 256, 2 warps")]
    text = tune_text.of_code(rows)
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        assert [(c.kind, c.name) for c in tune_choice.from_code(rows, tune_code.MAIN)] == expected
    assert [c.line for c in tune_choice.from_code(rows, tune_code.MAIN)][1] == '"half": Shape(1024, 128, 4),'
    assert "fp32, sm_80 | 77" in text and "| tiny-1000 | 0.84 |" in text


def test_occupancy_is_that_of_the_occupancy_calculator() -> None:
    cases = {(54, 4): 9, (54, 8): 4, (42, 4): 10, (80, 4): 6, (32, 4): 16, (255, 4): 2, (16, 1): 32, (64, 8): 4}
    assert {key: tune_code.occupancy(*key) for key in cases} == cases


# The command --------------------------------------------------------------------------------------------------------


def command(*arguments: object) -> Result:
    return CliRunner().invoke(tune.main, [str(a) for a in arguments])


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    torn = tmp_path / "torn.jsonl"
    torn.write_text("{}\n{}\n")
    bad = [("--minutes", 0), ("--row", "fp8"), ("--arch", "sm_1"), ("--show", tmp_path / "none"), ("--show", torn)]
    if numerics.INTERPRETED:
        bad.append(("--only", "4 warps"))
    for arguments in bad:
        found = command(*arguments)
        assert found.exit_code == 2 and found.output.splitlines()[-1].startswith("Error: "), found.output


def test_rows_of_another_machine_are_shown(tmp_path: Path) -> None:
    writer = results.Writer(tmp_path / "rows.jsonl")
    for row in timed({PRESENT: (1.0,), "512 / 256, 4 warps": (0.9,)}):
        writer.add(**row)
    note = tmp_path / "note.md"
    found = command("--show", writer.path, "--note", note)
    assert found.exit_code == 0 and "takes 0.900 of the present one's time" in found.output
    assert note.read_text().count(tune.TIMES[0]) == 1


@pytest.mark.compiled
def test_code_is_read_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A persistent kernel moves the same bytes, without spills or barriers, wherever it finds the size of its grid."""
    writer, both = results.Writer(tmp_path / "rows.jsonl"), (PRESENT, "persistent, 8 programs")
    rows = tune_code.rows(writer, ["fp32"], ["sm_90", "sm_100"], "persistent, 8")
    assert rows == results.read(writer.path)
    named = [(arch, name, 8 * (name != PRESENT)) for arch in ("sm_90", "sm_100") for name in both]
    assert [(r["arch"], r["name"], r["programs"]) for r in rows] == named
    for r in rows:
        assert (r["kind"], r["bytes"], r["spills"], r["stack"], r["barriers"]) == ("tune", 28.0, 0, 0, 0)
        assert r["in_flight"] == 16 * 1024 * r["programs_per_sm"] and 0 < r["registers"] <= 64
    assert tune.tell(rows, tmp_path / "note.md") == 0
    assert "* fp32: present; no other is predicted to save 2 %." in capsys.readouterr().out
    assert tune.CODE[0] in (tmp_path / "note.md").read_text()
