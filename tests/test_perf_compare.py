"""What became worse between two files of results, and which targets are met. All rows here are invented."""

from pathlib import Path
from typing import Any

import pytest
from perf_rows import GPU, Row, around, job, made, measured, timed, without_gpu, written

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf.report import regressions, targets


@pytest.mark.parametrize("what", ["missing", "empty", "damaged", "torn only"])
def test_bad_files_get_one_line_and_status_2(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = written(tmp_path / "good.jsonl", measured())
    bad = tmp_path / "bad.jsonl"
    texts = {"empty": "", "damaged": '{"kind": "copy"}\n{"kind": "measu\n{"kind": "copy"}\n', "torn only": '{"kind'}
    if what in texts:
        bad.write_text(texts[what])
    assert regressions.main(good, bad) == 2 and regressions.main(bad, good) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("bad.jsonl" in line for line in errors)


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    whole, torn = written(tmp_path / "a.jsonl", measured()), tmp_path / "b.jsonl"
    torn.write_text(whole.read_text() + '{"kind": "measu')
    assert regressions.main(whole, torn) == 0


def changed(found: list[Row], **fields: Any) -> list[Row]:
    """The first row with other fields."""
    return [{**found[0], **fields}, *found[1:]]


@pytest.mark.parametrize(
    ("fields", "verdicts"),
    [
        ({}, []),
        ({"device_ms": around(8.4)}, ["regression"]),
        ({"device_ms": around(7.6)}, ["improvement"]),
        ({"device_ms": around(8.2)}, []),  # less than 3 %
        ({"device_ms": around(9.0, noise=0.2)}, []),  # within what the rounds vary by
        ({"launches": 4}, ["regression"]),
        ({"bytes": 31.0}, ["improvement"]),
        ({"peak_bytes": 2**35 + 1}, ["regression"]),
        ({"host_us": around(1000.0)}, ["regression"]),
    ],
)
def test_compare(fields: Row, verdicts: list[str]) -> None:
    found = regressions.compare(measured(), changed(measured(), **fields))
    assert [change.verdict for change in found.changes] == verdicts
    assert found.status == ("regression" in verdicts)


def test_compare_counts_only_what_is_ours() -> None:
    theirs = measured()[1:]
    found = regressions.compare(theirs, changed(theirs, device_ms=around(20.0)))
    assert [change.verdict for change in found.changes] == ["theirs"] and found.status == 0


def test_compare_sees_what_became_red_or_was_not_measured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    first, *others = measured()
    red = made("red", GPU, **job("llama3.2-1b", "fp32", "clip", "fusedopt"), why="wrong result")
    a, b = written(tmp_path / "a.jsonl", [first, *others]), written(tmp_path / "b.jsonl", [red, *others[1:]])
    assert regressions.main(a, b) == 1
    out = capsys.readouterr().out
    assert (
        "red: wrong result" in out
        and "only in A: measured · cuda · llama3.2-1b · 146 · fp32 · clip · torch fused" in out
    )
    stages = [made("stage", name="GPU tests", ok=ok) for ok in (True, False)]
    assert regressions.compare(stages[:1], stages[1:]).status == 1
    assert regressions.compare(stages[1:], stages[:1]).regressions == []


def test_compare_refuses_times_of_different_machines(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    slower = [{**row, "device_ms": around(99.0), "machine": {**GPU, "gpu": "Invented A100"}} for row in measured()]
    found = regressions.compare(measured(), slower)
    assert not found.changes and found.status == 2
    assert regressions.main(written(tmp_path / "a", measured()), written(tmp_path / "b", slower)) == 2
    out = capsys.readouterr().out
    assert "not compared: device_ms: A was measured on gpu Invented H200, B on gpu Invented A100" in out
    more = [{**row, "launches": 9} for row in slower]
    assert regressions.compare(measured(), more).status == 1, "counts need no clock"
    codes = [row for row in without_gpu() if row["kind"] == "code"]
    elsewhere = [{**row, "machine": {"cpu": "another"}} for row in codes]
    assert regressions.compare(codes, elsewhere).status == 0


def verdict(found: list[Row], title: str) -> targets.Verdict:
    (wanted,) = [v for v in targets.verdicts(found) if v.target.title.startswith(title)]
    return wanted


def test_targets() -> None:
    title = "clip + AdamW fp32, llama3.2-1b"
    known = {v.target.title: v.verdict for v in targets.verdicts(measured())}
    assert known[f"{title}: share of measured copy bandwidth"] == "met"
    assert known[f"{title}: torch fused ÷ ours"] == "met"  # 1 / 0.64
    assert verdict(measured(), "clip + AdamW fp32, gpt2").verdict == "met"  # 1200 to 300 µs of host time
    missed = [row if "ratio" not in row else {**row, "ratio": around(0.9)} for row in measured()]
    assert verdict(missed, f"{title}: torch").text == "missed: 1.11 × on Invented H200"
    assert verdict(measured(), "AdamW int8 + split8, llama3.2-1b, against").text == "unmeasured"
    assert verdict(without_gpu(), f"{title}: torch").text == "unmeasured (predicted: 1.27 ×)"
    elsewhere = [{**row, "machine": {**GPU, "gpu": "Invented A100"}} for row in measured()]
    assert verdict(elsewhere, f"{title}: torch").verdict == "unmeasured", "targets are for an H200"


def test_targets_across_formats_and_within_noise() -> None:
    ours = timed("llama3.2-1b", "int8", "step", "fusedopt", 3.0)
    fused = timed("llama3.2-1b", "fp32", "step", "torch fused", 8.0)
    flash = timed("llama3.2-1b", "int8", "step", "FlashOptim FlashAdamW", 6.0, ratio=around(0.5))
    found = [ours, fused, flash]
    assert verdict(found, "AdamW int8 + split8, llama3.2-1b, against").text == "met: 2.67 × on Invented H200"
    assert verdict(found, "AdamW int8 + split8, llama3.2-1b: Flash").text == "missed: 2.00 × on Invented H200"
    mine = timed("llama3.2-1b", "fp32", "step", "fusedopt", 8.1)
    for ratio, wanted in ((around(1.005, 0.01), "met"), (around(1.05, 0.01), "missed")):
        assert verdict([mine, {**fused, "ratio": ratio}], "AdamW fp32 step").verdict == wanted


def test_a_torn_last_line_is_told_of_and_few_lines_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a = written(tmp_path / "a", measured())
    more = [{**row, "case": f"case{i}"} for row in measured() for i in range(9)]
    b = written(tmp_path / "b", [*measured(), *more])
    with a.open("a") as file:
        file.write('{"kind": "mea')
    assert regressions.main(a, b) == 0
    found = capsys.readouterr()
    assert found.err == f"{a}: the last line is torn and left out\n"
    assert (
        found.out.count("only in B: ") == regressions.FEW + 1
        and f"only in B: {len(more) - regressions.FEW} more" in found.out
    )


def test_times_of_a_cpu_count_once() -> None:
    before = [row for row in without_gpu() if row["kind"] == "measured"]
    after = [{**row, "wall_ms": around(700.0), "device_ms": around(700.0), "host_us": around(7e5)} for row in before]
    found = regressions.compare(before, after)
    assert [(change.field, change.verdict) for change in found.regressions] == [("wall_ms", "regression")]
