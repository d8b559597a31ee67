"""The table of final losses over formats (`perf/studies/losses.py`): what it records, selects and concludes."""

import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf.studies import losses


def rows(name: str, *values: float | None, first: int = 0) -> list[losses.Row]:
    environment = {"text": "t", "processor": "p"} | {f"version of {k}": "1" for k in ("fusedopt", "torch", "numpy")}
    settings = dict(optimizer="adamw", steps=9, batch_size=1, max_seq_len=1, hidden_size=1, num_layers=1)
    common = dict(
        arguments=[], environment=environment, settings=settings, commit="c", bytes_per_parameter={"all": 7.1}
    )
    return [{**common, "format": name, "seed": first + i, "val_loss": v} for i, v in enumerate(values)]


def verdicts(*formats: list[losses.Row]) -> dict[str, str]:
    table = losses.show(losses.select(itertools.chain(*formats), []))
    cells = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    return {row[0]: row[-1] for row in cells[1:]}


def test_a_format_is_within_the_spread_on_average_and_for_every_seed() -> None:
    """fp32 has a range of 0.2 and a standard deviation of 0.0816."""
    fp32 = rows("fp32", 1.0, 1.1, 1.2, 1.1)
    found = verdicts(
        fp32,
        rows("bf16", 1.1, 1.2, 1.3),
        rows("split8+int8", 1.05, 1.15, 1.25),
        rows("kahan+int8", 0.75, 1.3, 1.45),
        rows("split8+int4", None, 1.1, 1.2),
        rows("stochastic+int8", 1.0, 1.1),
    )
    assert found == {
        "fp32": "reference",
        "bf16": "**outside**",
        "split8+int8": "within",
        "kahan+int8": "**outside**",
        "split8+int4": "**outside**: diverged",
        "stochastic+int8": "within, of 2 seeds only",
    }


def test_the_newest_row_counts_and_other_jobs_do_not(tmp_path: Path) -> None:
    old, new = rows("fp32", 2.0, 3.0), rows("fp32", 1.0)
    other = [{**row, "arguments": ["--steps", "5"]} for row in rows("fp32", 9.0)]
    file = tmp_path / "losses.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in [*old, *new, *other]) + '{"format": "fp')
    table = losses.select(losses.read(file), [])
    assert {seed: row["val_loss"] for seed, row in table["fp32"].items()} == {0: 1.0, 1: 3.0}
    for row in new:
        row["environment"] = {**row["environment"], "text": "another"}
    with pytest.raises(SystemExit, match="different texts"):
        losses.select([*old, *new], [])


def test_the_table_replaces_the_one_before_it(tmp_path: Path) -> None:
    notes = tmp_path / "notes" / "losses.md"
    losses.write(notes, "first")
    notes.write_text(notes.read_text() + "\nand what was concluded\n")
    losses.write(notes, "second")
    text = notes.read_text()
    assert "second" in text and "first" not in text and text.endswith("and what was concluded\n")
    assert text.count(losses.BEGIN) == text.count(losses.END) == 1


@pytest.mark.long
def test_a_run_leaves_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Divergence is a result, a setting that is refused is not."""
    file = tmp_path / "losses.jsonl"
    small = ["--hidden-size", "16", "--num-layers", "1", "--num-heads", "2", "--max-seq-len", "16", "--steps", "3"]
    assert losses.run("fp32", 1, small, file) == ""
    assert losses.run("fp32", 2, [*small, "--optimizer", "sgd", "--lr", "1e30"], file) == ""
    assert "--lr" in losses.run("fp32", 3, [*small, "--lr", "-1"], file)
    whole, diverged = losses.read(file)
    assert whole["seed"] == whole["settings"]["seed"] == 1 and 5 < whole["val_loss"] < 6 and whole["train_loss"] > 5
    assert whole["environment"]["threads"] == 1 and sum(whole["bytes_per_parameter"].values()) > 16.0
    assert diverged["val_loss"] is None and "diverged" in capsys.readouterr().out
