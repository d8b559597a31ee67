"""`python -m perf --all`: the order of stages, whatever happens in one of them."""

import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf_programs import ROW, clock, gone, says, shell, soon, stages

from perf import everything, report, results, run
from perf.measure import Bench
from perf.stages import first_step, programs, sanitize, training_step
from perf.stages.programs import Program, Run, Verdict


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "r.jsonl"


@pytest.fixture
def going(out: Path) -> Run:
    return Run(results.Writer(out), "cpu", 100.0)


def test_only_a_torn_row_is_mended(out: Path) -> None:
    for torn in ("", ROW[:3], ROW):
        out.write_text(f"{ROW}\n{torn}")
        programs.mend(out)
        assert out.read_text() == f"{ROW}\n"
    out.write_text("my notes")
    with pytest.raises(ValueError, match="no file of results"):
        programs.mend(out)
    assert everything.main(1, out, "cpu") == 2 and out.read_text() == "my notes"


# The run -----------------------------------------------------------------------------------------------------------


def planned(monkeypatch: pytest.MonkeyPatch, *plan: Callable[[Run, float], None]) -> None:
    monkeypatch.setattr(everything, "PLAN", tuple((stage, 0.01) for stage in plan))
    monkeypatch.setattr(everything, "LEAST", 0.0)
    monkeypatch.setattr(programs, "GRACE", 0.1)
    monkeypatch.setattr(report, "short", lambda rows: print(f"table of {len(rows)} rows"))


def test_whatever_happens_in_a_stage_the_others_keep_their_rows(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(run: Run, seconds: float) -> None:
        run.carry_out([shell(f"printf '{ROW[:12]}' >> {out}; kill -11 $$", "crash")])

    def hang(run: Run, seconds: float) -> None:
        run.carry_out([shell(f"trap '' INT; echo '{ROW}' >> {out}; while :; do sleep 1; done", "hang", 0.2)])

    def fail(run: Run, seconds: float) -> None:
        raise ZeroDivisionError("of the stage's own")

    def good(run: Run, seconds: float) -> None:
        assert seconds == pytest.approx(0.55)
        run.carry_out([shell(f"echo '{ROW}' >> {out}", "good")])

    planned(monkeypatch, crash, hang, fail, good)
    clock(monkeypatch, lambda: says(out, f"{ROW}\n"))
    assert everything.main(1, out, "cpu") == 1
    rows = results.read(out)
    assert sum(row["kind"] == "copy" for row in rows) == 2 and out.read_text().endswith("}\n")
    assert {name: ok for name, (ok, _) in stages(out).items()} == {
        "crash": False, "hang": False, "fail": False, "good": True,
    }  # fmt: skip
    assert stages(out)["fail"][1] == "ZeroDivisionError: of the stage's own"
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2] == f"table of {len(rows)} rows" and shown[-1].startswith(f"{len(rows)} rows in {out}")
    assert "good: ok, 0 s: exit status 0" in shown


def test_the_status_is_that_of_the_stages_that_ran(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(run: Run, seconds: float) -> None:
        run.note("tool", Verdict(None, "is not present"))

    def good(run: Run, seconds: float) -> None:
        run.carry_out([shell("true", "good")])

    planned(monkeypatch, absent, good)
    monkeypatch.setattr(report, "short", lambda rows: 1 / 0)
    assert everything.main(1, out, "cpu") == 0
    planned(monkeypatch, good)
    monkeypatch.setattr(everything, "LEAST", 1.0)
    assert everything.main(1, out, "cpu") == 1, "nothing ran"
    assert stages(out)["good"] == (None, "no time was left")


def test_a_run_that_is_terminated_ends_its_programs_and_leaves_whole_rows(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def terminate_soon() -> None:
        soon(lambda: says(out, f"{ROW}\n{ROW[:20]}"))
        os.kill(os.getpid(), signal.SIGTERM)

    def long(run: Run, seconds: float) -> None:
        threading.Thread(target=terminate_soon).start()
        script = f"echo $$ > {out}.pid; echo '{ROW}' >> {out}; printf '{ROW[:20]}' >> {out}; exec sleep 60"
        run.carry_out([shell(script, "long")])

    def never(run: Run, seconds: float) -> None:
        raise AssertionError("it was terminated before")

    planned(monkeypatch, long, never)
    handler = signal.getsignal(signal.SIGTERM)
    assert everything.main(1, out, "cpu") == 143
    assert signal.getsignal(signal.SIGTERM) == handler
    assert results.read(out)[-1] == json.loads(ROW) and out.read_text().endswith("\n")
    assert gone(int(Path(f"{out}.pid").read_text()))


def test_measuring_goes_on_after_a_crash(going: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal; by an exception behind which there are new rows; by one behind which there are none."""
    row = f"echo '{ROW}' >> {out}"
    scripts = iter([f"{row}; kill -6 $$", f"{row}; exit 1", "exit 1", "true"])
    asked: list[tuple[object, ...]] = []

    def own(run: Run, name: str, title: str, seconds: float, *more: object) -> Program:
        asked.append((name, title, *more))
        return shell(next(scripts), title)

    monkeypatch.setattr(everything, "own", own)
    everything.measured(going, 60.0)
    again = "measurements, again"
    assert asked == [
        ("perf.everything", "measurements", "--begun", 0, "--lost", 0),
        ("perf.everything", again, "--begun", 0, "--lost", 1), ("perf.everything", again, "--begun", 0, "--lost", 1),
    ]  # fmt: skip
    everything.rest(going, 60.0)
    assert asked[3:] == [("perf.everything", "further measurements", "--begun", 0, "--lost", 1)]


def test_the_measuring_process_leaves_out_what_has_rows_and_what_was_lost(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = list(run.order("cpu", run.Selection()))
    writer = results.Writer(out)
    for kind, key in (("measured", keys[1]), ("measured", keys[0]), ("red", keys[2])):
        writer.add(kind, **dict(zip(("case", "format", "work", "graph"), key, strict=True)))
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(everything, "measure_jobs", lambda bench, deadline, **more: given.append(more))
    arguments = ["--out", str(out), "--device", "cpu", "--seconds", "5"]
    for begun, lost in ((1, 0), (2, 1)):
        done = CliRunner().invoke(everything.measure, [*arguments, "--begun", str(begun), "--lost", str(lost)])
        assert done.exit_code == 0, done.output
    assert [set(more["skip"]) for more in given] == [{keys[0], keys[2]}, {keys[2], keys[0]}]


def test_the_measuring_process_ends_when_the_gpu_is_dead(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def jobs(bench: Bench, deadline: float, tell: Callable[[str], object], skip: object) -> None:
        tell("one job")
        monkeypatch.setattr(torch.cuda, "synchronize", dead)
        tell("the next job")
        raise AssertionError("it has begun")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(Bench, "on", lambda writer, device: Bench(writer, device, 0.0))
    monkeypatch.setattr(everything, "measure_jobs", jobs)
    arguments = ["--out", str(out), "--device", "cuda", "--seconds", "5", "--begun", "0", "--lost", "0"]
    done = CliRunner().invoke(everything.measure, arguments)
    assert done.exit_code == 1 and "illegal memory" in str(done.exception)


def test_what_the_stages_run(going: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, without running it: modules exist, options parse, names are known."""
    ran: list[Program] = []
    monkeypatch.setattr(
        Run, "carry_out", lambda self, given: ran.extend(given) or [programs.Ended(p, 0, 0, "") for p in given]
    )
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: f"/usr/bin/{Path(name).name}")
    going.device = "cuda"
    for stage, _ in everything.PLAN:
        stage(going, 100.0)
    names = [p.name for p in ran]
    assert names == [
        "correctness", "GPU tests", "sanitizer: memcheck", "sanitizer: racecheck", "measurements", "training step",
        "first step", "tuning", "further measurements",
    ]  # fmt: skip
    commands = {p.name: list(p.command) for p in ran}
    assert all(p.seconds <= 100.0 for p in ran)
    from fusedopt.verify import command, formats, kept

    verify = commands["correctness"]
    context = command.command.make_context("verify", verify[verify.index("verify") + 1 :])
    assert set(context.params["formats"]) <= set(kept.NAMES) and set(context.params["dtypes"]) <= set(formats.DTYPES)
    assert context.params["wanted"] == ("eager", "compiled")
    for name, main in (("training step", training_step.main), ("first step", first_step.main)):
        parsed = main.make_context(name, commands[name][3:]).params
        assert parsed["device"] == "cuda" and parsed["seconds"] == 90.0 and parsed["out"] == going.writer.path
    assert everything.measure.make_context("measure", commands["measurements"][3:])
    files = {Path(name).name for name in commands["GPU tests"] if name.endswith(".py")}
    assert {"test_gpu.py", "test_gpu_around.py", "test_torch_database.py"} <= files and "test_accuracy.py" not in files


def test_verdicts_of_checks() -> None:
    assert everything.judge_tests(0, "..\n== 5 passed in 3 s ==\n") == (
        True,
        "5 passed in 3 s, without test_accuracy.py",
    )
    assert everything.judge_tests(5, "no tests ran in 1 s").ok is None
    assert everything.judge_tests(1, "FAILED a\n1 failed, 2 passed in 3 s").ok is False
    text = "formats PASSED: 5 of 5 cells within bounds, 0 failed\n\nPASSED: 14 of 14 rows, 0 cells\n"
    assert everything.judge_verify(0, text) == (True, "PASSED: 5 of 5 cells within bounds; PASSED: 14 of 14 rows")
    assert everything.judge_verify(1, "Killed\n") == (False, "Killed")


def test_an_absent_sanitizer_is_said_to_be_absent(going: Run, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: None)
    monkeypatch.setattr(Run, "carry_out", lambda self, given: [])
    going.device = "cuda"
    everything.checks(going, 10.0)
    assert set(stages(out).values()) == {(None, "compute-sanitizer is not present")} and len(stages(out)) == 2
