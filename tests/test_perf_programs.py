"""Programs of `python -m perf --all`: how they end, at their limits too, and which of their rows count."""

import json
import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf_programs import ROW, clock, gone, says, shell, soon, stages

from perf import results
from perf.contenders import FUSEDOPT
from perf.stages import programs
from perf.stages.programs import Run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "r.jsonl"


@pytest.fixture
def going(out: Path) -> Run:
    return Run(results.Writer(out), "cpu", 100.0)


def test_programs_run_beside_each_other_and_say_how_they_ended(tmp_path: Path) -> None:
    given = [shell("echo first; echo last"), shell("exit 3"), shell("kill -9 $$"), shell("env")]
    found = {given.index(e.program): e for e in programs.together(given, tmp_path)}
    assert [found[i].status for i in range(4)] == [0, 3, -9, 0]
    assert (found[0].verdict, found[1].verdict) == ((True, "last"), (False, "exit status 3"))
    environment = dict(line.partition("=")[::2] for line in found[3].output.splitlines())
    assert str(programs.ROOT) in environment["PYTHONPATH"].split(os.pathsep)
    assert str(programs.ROOT / "kernels") in environment["PYTHONPATH"].split(os.pathsep)
    assert "TRITON_INTERPRET" not in environment
    assert programs.alone(shell("echo $A", environment={"A": "1"}), tmp_path).output == "1\n"


def test_a_program_at_its_limit_is_interrupted_then_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "GRACE", 1.0)
    polite = shell("trap 'echo summed up; exit 1' INT; echo begun; while :; do sleep 0.05; done", "polite", 0.3)
    deaf = shell("trap '' INT; sleep 60 & echo $!; wait; sleep 60", "deaf", 0.3)
    logs = tmp_path / "0.log", tmp_path / "1.log"
    clock(monkeypatch, lambda: all(says(log, "\n") for log in logs), lambda: says(logs[0], "summed up\n"))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as it is in what a shell has started in the background
    try:
        found = {e.program.name: e for e in programs.together([polite, deaf], tmp_path)}
    finally:
        signal.signal(signal.SIGINT, before)
    assert found["polite"].status is None and found["polite"].verdict == (False, "stopped after 0 s: summed up")
    assert found["deaf"].status is None and found["deaf"].seconds == 2.0
    assert soon(lambda: gone(int(found["deaf"].output.split()[0])))


def test_nothing_outlives_whoever_stops_listening(tmp_path: Path) -> None:
    log = tmp_path / "1.log"
    first = shell(f"until [ -s {log} ]; do sleep 0.01; done")
    running = programs.together([first, shell("echo $$; exec sleep 60")], tmp_path)
    next(running)
    running.close()
    assert gone(int(log.read_text()))


def test_rows_of_a_program_count_when_it_is_stopped_unless_ours_is_red(
    going: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(row: str) -> str:
        return f"echo '{row}' >> {out}; exec sleep 60"

    red = json.dumps({"kind": "red", "contender": FUSEDOPT.name, "why": "off by 1"})
    with monkeypatch.context() as patched:
        clock(patched, lambda: says(out, f"{ROW}\n"))
        going.carry_out([shell(write(ROW), "some rows", 0.3, partial=True)])
    going.carry_out([shell("exec sleep 60", "no rows", 0.1, partial=True)])
    going.carry_out([shell(f"echo '{red}' >> {out}", "ours")])
    going.carry_out([shell(f'echo \'{red[:-1]}, "row": "fp32"}}\' >> {out}', "a launch shape")])
    going.carry_out(
        [shell(f"echo '{red.replace(FUSEDOPT.name, 'theirs')}' >> {out}; printf '{ROW[:9]}' >> {out}", "theirs")]
    )
    assert stages(out) == {
        "some rows": (True, "stopped after 0 s, with 1 rows"), "no rows": (False, "stopped after 0 s: exit status 1"),
        "ours": (False, "ours is red in 1 jobs, first: off by 1"), "theirs": (True, "exit status 0"),
        "a launch shape": (True, "exit status 0"),
    }  # fmt: skip
    assert going.log.read_text().count("=== ") == 5
