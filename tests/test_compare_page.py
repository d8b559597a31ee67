"""What a comparison says: tables, plots and page are functions of its rows; and a real one, killed and continued."""

import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_command import TINY, Compare
from matplotlib.image import imread
from train_command import TEXT

from fusedopt.compare import page, plot, results, table
from fusedopt.train import session

ROOT = Path(__file__).parents[1]
PAGE, ROWS = ROOT / "fusedopt" / "docs" / "comparison.md", ROOT / "perf" / "results" / "compare.jsonl"


def row(optimizer: str, seed: int, *losses: float, status: str = "done", **more: Any) -> results.Row:
    """A run that was validated at steps 0, 10, 20 …; its own settings and the like are invented."""
    curve = [[10 * i, loss] for i, loss in enumerate(losses)]
    config = dict(task="text", lr=0.5, batch_size=4, steps=20, hidden_size=8, num_layers=1, num_heads=2, dtype="fp32")
    config |= dict(dropout=0.0, label_smoothing=0.0, warmup_steps=1, clip=1.0, val_interval=10)
    machine = dict(processor="a processor", cores=2, threads=2, gpu=None, torch="2", numpy="2", python="3")
    made: results.Row = {
        "cell": f"{optimizer}{seed}{more}", "optimizer": optimizer, "schedule": "cosine", "seed": seed,
        "batch_size": None, "status": status, "fixed": {"task": "text", "steps": 20}, "own": {"lr": 0.5},
        "tuned": {"lr": 0.5, "val_loss": 1.0, "tried": {"0.1": 2.0, "0.5": 1.0, "1": None}, "steps": 20,
                  "schedule": "cosine", "seed": 1000},
        "date": "2026-01-02", "machine": machine, "curve": curve, "seconds": 60.0, "step": 20, "reason": "none",
    }  # fmt: skip
    if status == "done":
        made |= dict(config=config, val_loss_first=losses[0], val_loss_last=losses[-1], val_loss_best=min(losses))
        made |= dict(step_ms=4.0, optimizer_ms=1.0, held_bytes=2_000_000, measured={}, data=["ten words"], unit="byte")
    return {**made, **more}


def cells(groups: list[results.Group], column: str, target: float | None = None) -> dict[str, str]:
    """A column of the tables by optimizer."""
    found = {}
    for each in table.by_class(groups, target):
        index = list(each.heads).index(column)
        found |= {line[0]: line[index] for line in each.lines}
    return found


def test_means_spreads_and_what_is_not_told_apart() -> None:
    """Deviations: adamw 0.1, adam 0.2, lion 0.02, sgd 0.0; their median is 0.06. The lowest is adamw's 1.1."""
    losses = {
        "adamw": (1.0, 1.1, 1.2),
        "adam": (1.19, 1.39, 1.59),
        "lion": (1.26, 1.28, 1.3),
        "sgd": (1.25, 1.25, 1.25),
    }
    rows = [row(name, seed, 3.0, loss) for name, own in losses.items() for seed, loss in enumerate(own)]
    found = cells(results.groups(rows), "final loss")
    assert found == {
        "adamw": "**1.100 ± 0.100**",
        "adam": "≈ 1.390 ± 0.200",  # 0.29 above: no more than 0.1 + 0.2
        "lion": "1.280 ± 0.020",  # 0.18 above: more than 0.1 + 0.06
        "sgd": "≈ 1.250 ± 0.000",  # 0.15 above: no more than 0.1 + 0.06
    }
    titles = [each.title for each in table.by_class(results.groups(rows), None)]
    assert titles == ["gradient descent", "adaptive moment"]
    assert "≈" not in " ".join(table.legend(results.groups(rows[:3]), None))
    single = cells(results.groups([row("adamw", 0, 3.0, 1.0), row("adam", 0, 3.0, 1.0)]), "final loss")
    assert "≈" not in "".join(single.values()) and "±" not in "".join(single.values())


def test_a_group_with_a_diverged_run_is_not_the_lowest() -> None:
    rows = [row("adamw", 0, 3.0, 2.0), row("adam", 0, 3.0, 1.0), row("adam", 1, 3.0, status="diverged", step=7)]
    groups = results.groups(rows)
    assert cells(groups, "final loss") == {"adamw": "**2.000**", "adam": "1.000"}
    assert cells(groups, "not finished") == {"adamw": "", "adam": "1 diverged (step 7)"}


def test_steps_to_a_target_are_of_the_first_validation_below_it() -> None:
    rows = [row("adamw", 0, 3.0, 1.9, 2.2, 1.0), row("adamw", 1, 3.0, 2.5, 2.0), row("adam", 0, 3.0, 2.1)]
    rows += [row("lion", 0, 3.0, 2.0), row("lion", 1, 3.0, 2.6)]
    assert cells(results.groups(rows), "steps to\ntarget", 2.0) == {"adamw": "10", "adam": "–", "lion": "10 (1 of 2)"}
    # Mean lowest losses: adamw 1.5, adam 2.1, lion 2.3; three quarters of three are all three.
    assert results.default_target(results.groups(rows)) == 2.3
    four = [row("adamw", 0, 3.0, 1.111), row("adam", 0, 2.5), row("lion", 0, 2.1), row("sgd", 0, 2.0)]
    assert results.default_target(results.groups(four)) == 2.1


def test_schedules_and_batch_sizes_are_crossed_with_optimizers() -> None:
    rows = [row(name, 0, 3.0, loss, schedule=schedule) for name, schedule, loss in
            (("sgd", "cosine", 1.0), ("sgd", "constant", 1.5), ("adamw", "constant", 2.0))]  # fmt: skip
    crossed = table.by_schedule(results.groups(rows))
    assert crossed and [list(crossed.heads), *crossed.lines] == [
        ["", "constant", "cosine"], ["sgd", "1.500", "**1.000**"], ["adamw", "2.000", ""],
    ]  # fmt: skip
    sizes = [("full", 1.0), (1, 1.5), (8, 2.0)]
    rows = [row("sgd", 0, 3.0, loss, batch_size=size) for size, loss in sizes]
    for each in rows:
        each["config"] = {**each["config"], "batch_size": 99 if each["batch_size"] == "full" else each["batch_size"]}
    crossed = table.by_batch_size(results.groups(rows))
    assert crossed and list(crossed.heads) == ["", "1", "8", "full"] and table.by_schedule(results.groups(rows)) is None


def test_the_page_is_a_function_of_the_rows(tmp_path: Path) -> None:
    rows = [row(name, seed, 3.0, loss + seed / 10, schedule=schedule) for name, loss in (("sgd", 2.0), ("lion", 1.0))
            for schedule in ("cosine", "constant") for seed in (0, 1)]  # fmt: skip
    rows.append(row("adamw", 0, 3.0, status="diverged", step=3, tuned=None))
    page.write(tmp_path / "here.md", rows, None)
    first = (tmp_path / "here.md").read_text()
    page.write(tmp_path / "here.md", rows, None)
    assert (tmp_path / "here.md").read_text() == first
    for text in (
        "3 optimizers × 2 schedules × 2 seeds; 9 runs, of which 1 diverged.",
        "* ten words\n",
        "Measured on 2026-01-02, a processor, 2 cores, torch threads: 2, torch 2, numpy 2, Python 3.",
        "\nfusedopt compare --optimizers sgd adamw lion --schedules cosine constant --seeds 2 --task text",
        "| sgd | cosine | 0.5 | 2.050 ± 0.071 | 2.050 ± 0.071 |",
        "| adamw | cosine | 0.5† |",
        "1 diverged (step 3) |",
        "| lion | 0.5 | 1.000 | 0.1: 2.000, 0.5: 1.000, 1: diverged |",
        "train's default: adamw.",
        "(20 steps, cosine, seed 1000)",
    ):
        assert text in first, text
    assert page.text(rows, 1.5, {}) != page.text(rows, None, {}) and "--target 1.5 " in page.text(rows, 1.5, {})
    for name in (plot.CURVES, plot.SCHEDULES):
        assert f"](here-{name}.png)" in first and imread(tmp_path / f"here-{name}.png").std() > 0.05


def test_a_plot_for_batch_sizes(tmp_path: Path) -> None:
    cases = product(("sgd", "muon"), ("cosine", "wsd"), ((1, 2.0), ("full", 1.0)), (0, 1))
    rows = [row(name, seed, 3.0, loss + seed, batch_size=size, schedule=schedule)
            for name, schedule, (size, loss), seed in cases]  # fmt: skip
    drawn = plot.draw(results.groups(rows), tmp_path, "b")
    assert drawn == {plot.CURVES: "b-curves.png", plot.BATCHES: "b-batch-sizes.png"}
    assert all((tmp_path / name).stat().st_size < 120_000 for name in drawn.values())


def test_the_page_in_the_docs_is_what_the_kept_rows_give() -> None:
    images = {name: f"comparison-{name}.png" for name in (plot.CURVES, plot.SCHEDULES)}
    remedy = f"fusedopt compare --report --results {ROWS.relative_to(ROOT)} --page {PAGE.relative_to(ROOT)}"
    assert PAGE.read_text(encoding="utf-8") == page.text(results.read(ROWS), None, images), f"run {remedy}"
    for name in images.values():
        assert (PAGE.parent / name).stat().st_size < 120_000


def test_a_real_comparison_killed_and_continued_ends_with_the_same_losses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session.run
    compare = Compare(tmp_path, capsys, monkeypatch)
    monkeypatch.setattr(session, "run", run)
    axes = ["--optimizers", "momentum", "adamw", "--schedules", "cosine", "--seeds", "2", "--steps", "40"]
    options = [*axes, "--checkpoint-interval", "5"]
    command = [sys.executable, "-m", "fusedopt.cli", "compare", *TINY, "--text", TEXT, *options]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a checkpoint is continued with as many; more would wait for each other
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    second = tmp_path / "killed" / "adamw-cosine-seed0" / "checkpoint.pt"
    child = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], env=environment, stdout=subprocess.DEVNULL)
    while not second.exists() and child.poll() is None:
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert [each["cell"] for each in compare.rows("killed")] == ["momentum-cosine-seed0"]
    page_file = tmp_path / "docs" / "page.md"
    result = compare(*options, "--page", page_file, out="killed")
    assert result.status == 0 and "1 of 4 runs have a result already" in result.out, result.err
    assert "momentum" in page_file.read_text() and (page_file.parent / "page-curves.png").exists()
    assert compare(*options, out="whole").status == 0
    torch.set_num_threads(threads)
    killed, whole = ([(each["cell"], each["curve"], each["loss_last"]) for each in compare.rows(out)]
                     for out in ("killed", "whole"))  # fmt: skip
    assert killed == whole and len(killed) == 4
    assert all(curve[-1][1] < curve[0][1] - 0.5 for _, curve, _ in killed)
