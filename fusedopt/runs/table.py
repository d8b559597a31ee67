"""The list: as a table that fits the terminal, as CSV, as JSON."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fusedopt.train.settings_file import FOLLOWING, by_default

from .folders import Run

ALWAYS = ("optimizer", "lr")
INTERVALS = ("val_interval", "val_batches", "log_interval", "checkpoint_interval")
"""Settings that do not change the weights: shown only with all settings."""
WHOLE = 32  # characters of a run's name and date that are not wrapped: "11-22 01:22 stopped early at 100"
PAIRS = (("val loss", "best"), ("chrF",), ("step ms", "held MB"))
"""Results that share a column where there is little room."""


def differing(runs: Sequence[Run]) -> list[str]:
    """Settings that are not the same in all runs, in the order of config.json."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [name for name in names if any(run.settings.get(name) != runs[0].settings.get(name) for run in runs)]


def show(console: Console, runs: Sequence[Run], all_settings: bool) -> None:
    """Print the runs side by side; where they do not fit, with results below each other and unusual settings only."""
    found = differing(runs)
    hidden = set() if all_settings else {*ALWAYS, *INTERVALS, *following(runs)}
    names = [*ALWAYS, *(name for name in found if name not in {*ALWAYS, *hidden})]
    base, inside = places(runs)
    rows = [_cells(run, place) for run, place in zip(runs, inside, strict=True)]
    table, notes = _wide(runs, rows, names), []
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
        usual = {name: Counter(shown(run.settings.get(name)) for run in runs).most_common(1)[0][0] for name in names}
        table = _narrow(runs, rows, usual)
        notes = [
            "unless said otherwise:",
            *_words({name: v for name, v in usual.items() if name not in ALWAYS and v != "-"}),
        ]
    console.print(table)
    if len(notes) > 1:
        console.print(" ".join(notes), highlight=False, markup=False)
    if all_settings:
        same = {name: shown(value) for name, value in runs[0].settings.items() if name not in names}
        console.print("the same in all:", *_words(same), highlight=False, markup=False)
    count = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    units = sorted({run.results["unit"] for run in runs} - {None})
    per = f" per {' or '.join(units)}" if units else ""
    console.print(f"{count} in {base}; losses in nats{per}", highlight=False, markup=False)


def places(runs: Sequence[Run]) -> tuple[str, list[str]]:
    """The folder that all runs are in, and where each is in it."""
    base = os.path.commonpath([run.folder.absolute().parent for run in runs])
    inside = [os.path.relpath(run.folder.absolute(), base) for run in runs]
    return os.path.relpath(base) if Path(base).is_relative_to(Path.cwd()) else base, inside


def following(runs: Sequence[Run]) -> set[str]:
    """Settings that in each run have the default which follows from others, such as a tenth of lr."""
    found: set[str] = set(FOLLOWING)
    for run in runs:
        try:
            found &= by_default({name: value for name, value in run.settings.items() if "." not in name}, {})
        except (ArithmeticError, KeyError, TypeError, ValueError):  # settings of another version, or written by hand
            return set()
    return found


def _cells(run: Run, place: str) -> dict[str, str]:
    """The results of a run as they are shown, by the title of their column; empty where nothing is known."""
    found = run.results
    held = found["held_bytes"]
    return {
        "run": place,
        "date": found["date"][:16],
        "status": described(run),
        "val loss": _loss(found["val_loss"]),
        "best": _loss(found["best_val_loss"]),
        "chrF": f"{found['chrf']:.1f}" if "chrf" in found else "",
        "step ms": _brief(found["step_ms"]),
        "held MB": _brief(held and held / 1e6),
    }


def _wide(runs: Sequence[Run], rows: list[dict[str, str]], names: list[str]) -> Table:
    """A column for each setting and result; results that no run has are left out."""
    table = new_table()
    titles = list(rows[0])
    used = [title for title in titles[3:] if any(row[title] for row in rows)]
    for title in titles[:3]:
        table.add_column(title)
    for name in names:
        table.add_column(Text(short(name)))
    for title in used:
        table.add_column(title, justify="right")
    for run, row in zip(runs, rows, strict=True):
        settings = [shown(run.settings.get(name)) for name in names]
        table.add_row(*map(Text, [*(row[title] for title in titles[:3]), *settings, *(row[title] for title in used)]))
    return table


def _narrow(runs: Sequence[Run], rows: list[dict[str, str]], usual: dict[str, str]) -> Table:
    """What describes a run in two cells of several lines, its results in pairs."""
    labels = [f"{row['run']}\n{row['date'][5:]} {row['status']}" for row in rows]
    table = new_table()
    longest = max(len(line) for label in labels for line in label.splitlines())
    table.add_column("run", overflow="fold", no_wrap=longest <= WHOLE, min_width=20)
    table.add_column("settings", overflow="fold")
    pairs = [pair for pair in PAIRS if any(row[title] for row in rows for title in pair)]
    for pair in pairs:
        table.add_column("\n".join(pair), justify="right", no_wrap=True)
    for run, row, label in zip(runs, rows, labels, strict=True):
        values = {name: shown(run.settings.get(name)) for name in usual}
        settings = " ".join(_words({name: v for name, v in values.items() if name in ALWAYS or v != usual[name]}))
        table.add_row(*map(Text, [label, settings, *("\n".join(row[title] for title in pair) for pair in pairs)]))
    return table


def _words(settings: dict[str, str]) -> list[str]:
    return [f"{short(name)}={value}" for name, value in settings.items()]


def new_table() -> Table:
    """As all tables here look."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)


def described(run: Run) -> str:
    """The status in words, with the step where it says something."""
    status, step = run.results["status"], run.results["step"]
    if status == "done":
        return status
    return f"{status.replace('-', ' ')}{'?' if status == 'running' else ''} at {step}"


def short(name: str) -> str:
    """`eps` for `optimizer_args.eps`."""
    return name.rpartition(".")[2]


def shown(value: Any) -> str:
    """A setting in few characters; files without their folders."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ",".join(Path(item).name if isinstance(item, str) else shown(item) for item in value) or "-"
    return "-" if value is None or value == "" else str(value)


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _brief(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 100 else f"{value:,.0f}"


def as_json(runs: Sequence[Run]) -> str:
    """All that is known of each run."""
    records = [{"name": run.name, **run.results, "settings": run.settings} for run in runs]
    return json.dumps(records, indent=1) + "\n"


def as_csv(runs: Sequence[Run]) -> str:
    """A line per run with the results and all settings; lists as JSON."""
    names = dict.fromkeys(name for run in runs for name in (*run.results, *run.settings))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["name", *names])
    for run in runs:
        values = (run.value(name) for name in names)
        writer.writerow([run.name, *(json.dumps(value) if isinstance(value, list) else value for value in values)])
    return text.getvalue()
