"""Reports and plots of results. All rows here are invented, those of a GPU too."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.image import imread
from perf_rows import GPU, SIZES, around, everything, made, measured, timed, without_gpu, written

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf import report
from perf.report import plots, rows, sections
from perf.report.readme import section

HEADINGS = {
    "measured": "## Measured on ", "copy": "## Bandwidth of a plain copy", "host": "## Host time of a step",
    "code": "## Compiled code", "compile": "## Seconds to compile", "predicted": "## Predicted, not measured",
    "first": "## The first step", "train": "## A training step", "missing": "## Not installed",
    "tune": "## Launch shapes", "red": "## Not measured, because", "stage": "## Tests and tools",
}  # fmt: skip


def test_sections_are_there_for_the_kinds_that_are_there() -> None:
    text = report.text(everything(), [], ["a.jsonl"])
    assert all(heading in text for heading in HEADINGS.values())
    for kind, heading in HEADINGS.items():
        alone = report.text([row for row in everything() if row["kind"] == kind], [], ["a.jsonl"])
        assert heading in alone
        others = [other for name, other in HEADINGS.items() if name != kind]
        assert not any(other in alone for other in others), kind
        without = report.text([row for row in everything() if row["kind"] != kind], [], ["a.jsonl"])
        assert heading not in without


def test_the_measured_table() -> None:
    lines = sections.measured(rows.newest(measured())).splitlines()
    fused = next(line for line in lines if line.startswith("| torch fused"))
    cells = [cell.strip() for cell in fused.strip("|").split("|")]
    assert cells == [
        "torch fused", "fp32", "clip + step", "12 (11.9–12.1)", "1,200", "24 (23.8–24.2)", "3", "32", "4,000", "93.0 %",
        "16", "32", "1.56 (1.55–1.58)",
    ]  # fmt: skip
    assert "driver 1.2.3" in lines[2] and "abc1234" in lines[2]
    ours = next(i for i, line in enumerate(lines) if "**fusedopt**" in line)
    assert "device ms" not in sections.measured(rows.newest(without_gpu())), "columns without anything are left out"
    assert "torch fused" in lines[ours + 1] and "torch foreach" in lines[ours + 2], "ours first, then the fastest"


def test_ours_is_first_even_if_it_is_slowest() -> None:
    found = [
        timed("gpt2", "fp32", "clip", who, ms) for who, ms in (("torch fused", 2.0), ("fusedopt", 9.0), ("x", 1.0))
    ]
    assert [row["contender"] for row in rows.newest(found)] == ["fusedopt", "x", "torch fused"]


def test_code_is_that_of_full_chunks() -> None:
    assert "| fp32 | clip + step | sm_90 | 3 | 32 | 43 | 55 / 55 | 0 | 128 |" in sections.code(
        rows.newest(everything())
    )


def test_nothing_that_was_predicted_stands_without_the_word(capsys: pytest.CaptureFixture[str]) -> None:
    """7.777 and 9.876 ms, and their quotient, are in no other row."""
    for found in (without_gpu(), everything()):
        report.short(found)
        for text in (report.text(found, [], []), section(rows.newest(found), []), capsys.readouterr().out):
            marked = [line for line in text.splitlines() if any(x in line for x in ("7.78", "9.88", "1.27"))]
            assert all("predicted" in line for line in marked), marked
    assert "1.03 ×" in sections.predicted(rows.newest(everything())), "measured beside it, with the ratio"
    assert "unmeasured (predicted: 1.27 ×)" in report.text(without_gpu(), [], [])


def test_a_newer_row_takes_the_place_of_an_older_one_of_the_same_machine() -> None:
    other = {**GPU, "gpu": "Invented A100"}
    first = timed("gpt2", "fp32", "clip", "fusedopt", 8.0)
    failed = {key: value for key, value in first.items() if not isinstance(value, dict)} | {
        "kind": "red",
        "machine": GPU,
    }
    now = rows.newest([failed, first, {**first, "device_ms": around(7.0)}, {**first, "machine": other}])
    assert [(row["machine"]["gpu"], row["device_ms"]["median"]) for row in now] == [
        ("Invented H200", 7.0), ("Invented A100", 8.0),
    ]  # fmt: skip


def test_the_short_table_fits(capsys: pytest.CaptureFixture[str]) -> None:
    many = [timed(case, form, work, who, 8.0, **({} if who == "fusedopt" else {"ratio": around(0.5)}))
            for case in SIZES for form in ("fp32", "bf16", "int8") for work in ("step", "clip", "amp")
            for who in ("fusedopt", "torch fused", "optimi AdamW")]  # fmt: skip
    troubles = [made("red", contender="torch foreach", case=f"case {i}", why="x" * 300) for i in range(30)]
    for found in (everything(), without_gpu(), [*everything(), *many, *troubles]):
        report.short(found)
        lines = capsys.readouterr().out.splitlines()
        assert 10 < len(lines) <= 40 and max(map(len, lines)) <= 240
    assert any("gpt2 fp32 clip" in line and "2.00 ×" in line for line in lines)
    assert any(line.startswith("FAILED: GPU tests") for line in lines)


def test_the_readme_says_how_every_number_is_known() -> None:
    for found in (without_gpu(), everything()):
        text = section(rows.newest(found), ["perf/results/plots/roofline.png"])
        before = [part.splitlines()[-1] for part in text.split("\n\n| ")[:-1]]
        assert len(before) >= 4
        assert all("`python -m perf" in line for line in before), "a command before each table"
        words = ("measured", "Measured", "Predicted", "Counted")
        assert all(any(word in line for word in words) for line in before)
        assert "![roofline](perf/results/plots/roofline.png)" in text


def test_report_and_readme_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "PLOTS", {"tensors": plots.tensors})
    (tmp_path / "perf" / "results").mkdir(parents=True)
    readme = tmp_path / "README.md"
    readme.write_text(f"# fusedopt\n\nbefore\n\n{report.MARKERS[0]}\nold\n{report.MARKERS[1]}\n\nafter\n")
    rest = written(tmp_path / "perf" / "results" / "a.jsonl", measured())
    last = written(tmp_path / "perf" / "results" / "b.jsonl", without_gpu())
    assert report.write([rest, last], readme) == tmp_path / "perf" / "REPORT.md"
    assert "![tensors](results/plots/tensors.png)" in (tmp_path / "perf" / "REPORT.md").read_text()
    assert "python -m perf.report a.jsonl b.jsonl" in (tmp_path / "perf" / "REPORT.md").read_text()
    text = readme.read_text()
    assert "old" not in text and "before" in text and "after" in text and "perf/results/plots/tensors.png" in text
    assert report.write([rest], readme).exists() and readme.read_text().count("## Speed") == 1


def test_a_damaged_file_is_no_report(tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"kind": "measu\n{"kind": "copy"}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:1"):
        report.write([bad])
    done = CliRunner().invoke(report.main, [str(bad)])
    assert done.exit_code == 2 and done.output.count("\n") == 1


def test_plots(tmp_path: Path) -> None:
    drawn = plots.draw(rows.newest(everything()), tmp_path)
    assert [path.stem for path in drawn] == ["roofline", "tensors", "wall", "memory"]
    for path in drawn:
        image = imread(path)
        assert path.stat().st_size < 80_000 and image.shape[1] >= 1000
        assert image.std() > 0.05, "it is not empty"
    assert plots.wall(without_gpu()) is None and plots.roofline([]) is None and plots.tensors([]) is None


def test_plots_say_what_is_predicted_and_what_was_measured() -> None:
    def words(figure: Any) -> str:
        return " ".join(text.get_text() for text in figure.texts)

    assert "predicted, not measured" in words(plots.roofline(rows.newest(without_gpu())))
    assert "measured on Invented H200; hollow: predicted" in words(plots.roofline(rows.newest(everything())))
    assert "Measured on Invented CPU" in words(plots.tensors(without_gpu()))
    assert "Measured on Invented H200" in words(plots.wall(everything()))
    hollow = [p.predicted for p in plots._points(rows.newest(everything()))]
    assert hollow and not any(hollow), "what was measured takes the place of what was predicted"


def test_what_fails_stops_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(plots.PLOTS, "memory")
    odd = [{**row, "elements": "many"} if row["kind"] == "measured" else row for row in everything()]
    text = report.text(odd, [], [])
    assert "## A section that failed" in text and "## Compiled code" in text
    assert [path.stem for path in plots.draw(rows.newest(odd), tmp_path)] == ["tensors", "wall"]
    assert "plot roofline: TypeError" in capsys.readouterr().err
