"""Rows of compiled code: what they hold, and that a contender's traffic which its code does not move turns red."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from fusedopt.inspect.counts import Case, Inspection, Kernel
from perf import code
from perf.contenders.base import table
from perf.results import Row, Writer
from perf.work import WORKS


def imitation(moved: float, launches: dict[str, int] | None = None) -> Inspection:
    """A step of a kernel without elements and of one that moves so many bytes per parameter."""
    case = Case(100, {"grad": {"load": int(100 * moved)}}, {"grad": {"load": {"16": 5}}}, 1.0, 4000, 0, 0, 0, 0, 0, 0)
    kernels = [Kernel("s", 4, 100, 0, 0, 900, 0, 0), Kernel("update", 4, 55, 0, 0, 800, 0, 0, {"full": case})]
    return Inspection("sm_90", "3.9.0", launches or {"3": 2, "24": 2}, kernels)


def of(writer: Writer, kind: str) -> list[Row]:
    return [row for row in writer.rows if row["kind"] == kind]


@pytest.mark.compiled
def test_the_table_of_contenders_says_what_the_code_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fusedopt.inspect.compiled import inspect

    writer, counted = Writer(tmp_path / "rows.jsonl"), inspect(code.configuration("fp32", WORKS["amp"]), "sm_90")
    code.add(writer, "fp32", "amp", counted)
    assert not of(writer, "red")
    rows = {(row["kernel"], row.get("chunk")): row for row in of(writer, "code")}
    chunks = ("full", "unaligned", "tail")
    assert set(rows) == {("adamw_scalars", None), *((k, c) for k in ("norm", "adamw") for c in chunks)}
    assert all(row["launches"] == 3 and row["spills"] == row["stack"] == 0 for row in rows.values())
    update = rows["adamw", "full"]
    assert (update["loaded"], update["stored"], update["bytes"], update["widths"]) == (16, 12, 28, [128])
    assert rows["norm", "full"]["bytes"] == 4 and rows["adamw", "tail"]["widths"] == [32]
    assert update["instructions"] < rows["adamw", "unaligned"]["instructions"]
    changed = table({("fp32", "amp"): 31.0}, "counted")
    monkeypatch.setattr(code, "FUSEDOPT", code.FUSEDOPT.__class__(**{**vars(code.FUSEDOPT), "traffic": changed}))
    code.add(writer, "fp32", "amp", counted)
    (red,) = of(writer, "red")
    assert "32.0000" in red["why"] and "31.0" in red["why"] and red["contender"] == "fusedopt"


def test_all_formats_and_architectures_have_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process of them fails; the others' rows are there."""
    asked: list[tuple[str, ...]] = []

    def answer(task: str, form: str, arch: str, **environment: str) -> dict[str, Any]:
        asked.append((task, form, arch))
        if task == "compile":
            return {"kernels": 2, "seconds": float(len(asked))}
        if (form, arch) == ("fp32", "sm_80"):
            return {"why": "count took longer"}
        return {"step": imitation(28.0 if form == "fp32" else 26.0).as_json()}

    monkeypatch.setattr(code, "_answer", answer)
    writer = Writer(tmp_path / "rows.jsonl")
    code.rows(writer, ("sm_80", "sm_90"), ("fp32", "bf16"))
    assert [(row["format"], row["arch"], row["why"]) for row in of(writer, "red")] == [
        ("fp32", "sm_80", "count took longer")
    ]
    rows = of(writer, "code")
    assert len(rows) == 3 * 2 and {row["format"] for row in rows} == {"fp32", "bf16"}
    assert [(row["format"], row["cold_s"] < row["warm_s"]) for row in of(writer, "compile")] == [
        ("fp32", True), ("bf16", True)
    ]  # fmt: skip
    assert sorted(asked[:4]) == [("count", f, a) for f in ("bf16", "fp32") for a in ("sm_80", "sm_90")]


def test_launches_that_depend_on_the_tensors_are_red() -> None:
    assert code.disagreement("fp32", "step", imitation(28.0)) is None
    assert "depend" in str(code.disagreement("fp32", "step", imitation(28.0, {"3": 2, "24": 3})))
    assert "27.0000" in str(code.disagreement("fp32", "step", imitation(27.0)))


def test_a_process_tells_why_it_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = subprocess.CompletedProcess([], 0, 'a warning\n{"seconds": 1.5}\n', "")

    def run(command: list[str], env: dict[str, str], **_: Any) -> Any:
        assert "TRITON_INTERPRET" not in env and env["TRITON_CACHE_DIR"] == "there"
        assert command[-4:] == ["perf.code", "compile", "fp32", "sm_90"]
        if isinstance(done, Exception):
            raise done
        return done

    monkeypatch.setattr(subprocess, "run", run)

    def answer() -> dict[str, Any]:
        return code._answer("compile", "fp32", "sm_90", TRITON_CACHE_DIR="there")

    assert answer() == {"seconds": 1.5}
    done = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no ptxas\n")
    assert answer() == {"why": "compile failed: RuntimeError: no ptxas"}
    done = subprocess.CompletedProcess([], 0, "", "")
    assert answer()["why"].startswith("compile: IndexError")
    done = subprocess.TimeoutExpired("python", 150)
    assert answer() == {"why": "compile took longer than 150 s"}


def test_what_is_counted_is_what_is_measured() -> None:
    configuration = code.configuration("int8", WORKS["clip"])
    assert configuration.param_dtype == configuration.grad_dtype == "bfloat16" and not configuration.amp
    assert configuration.arguments["state_dtype"] == "int8" and configuration.arguments["clip_grad_norm"] == 1.0
    assert configuration.arguments["weight_decay"] == 0.1
    assert json.dumps(code.configuration("fp32", WORKS["amp"]).arguments)
