"""The results page: a function of the rows."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..train.files import write_atomically
from . import classes, grid, plot, results, table, tune
from .results import Group, Row

PLOTS = {
    plot.CURVES: "Validation loss over steps: the mean over the seeds, and a band from the lowest to the highest. What "
    "leaves a panel has a higher loss than the untrained model.",
    plot.SCHEDULES: "Final validation loss by schedule: mean, and a bar from the lowest to the highest seed.",
    plot.BATCHES: "Final validation loss by batch size: mean, and a bar from the lowest to the highest seed.",
}


def write(path: Path, rows: Sequence[Row], target: float | None) -> None:
    """The page, and its plots beside it, named after it."""
    images = plot.draw(results.groups(rows), path.parent, path.stem)
    write_atomically(path, text(rows, target, images).encode())


def text(rows: Sequence[Row], target: float | None, images: Mapping[str, str]) -> str:
    """The page. target: None for the default one. images: file names of the plots."""
    groups = results.groups(rows)
    aim = results.default_target(groups) if target is None else target
    parts = ["# Optimizers compared", *introduction(rows, target), "## Results", *_legend(groups, aim, target)]
    for each in table.by_class(groups, aim):
        parts += [f"### {each.title.capitalize()}", each.markdown()]
    parts += [f"![{caption.partition(':')[0]}]({images[name]})\n\n{caption}" for name, caption in PLOTS.items()
              if name in images]  # fmt: skip
    for crossed in (table.by_schedule(groups), table.by_batch_size(groups)):
        if crossed:
            parts += [f"## {crossed.title}", crossed.markdown()]
    parts += ["## Learning rates", *learning_rates(rows), "## What this does not show", LIMITS]
    return "\n\n".join(parts) + "\n"


LIMITS = """One task, one small model, short runs and few seeds. Which optimizer is ahead changes with the task, the
size and the number of steps: take the method from here, not the order.

The learning rate was tuned for one schedule and one batch size, on a seed of its own but on the validation examples
that the results are of; all else has each optimizer's defaults. The step times are those of a small model, in which
the number of tensors counts more than their size."""


def introduction(rows: Sequence[Row], target: float | None) -> list[str]:
    """What ran, where, and how to run it again."""
    axes = axes_of(rows)
    done = [row for row in rows if row["status"] == "done"]
    counts = Counter(row["status"] for row in rows)
    batches = f" × {len(axes.batch_sizes)} batch sizes" if axes.batch_sizes else ""
    refused = f" and {counts['refused']} could not run" if counts["refused"] else ""
    size = f"{len(axes.optimizers)} optimizers × {len(axes.schedules)} schedules × {len(axes.seeds)} seeds{batches}"
    runs = f"{len(rows)} runs, of which {counts['diverged']} diverged{refused}"
    parts = [f"Written by `fusedopt compare`: {size}; {runs}."]
    if done:
        parts.append(_what(done))
    machines = list(dict.fromkeys(_machine(row["machine"]) for row in rows))
    dates = sorted({row["date"] for row in rows})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    seconds = sum(row.get("seconds", 0.0) for row in rows)
    parts.append(f"Measured on {when}, {'; '.join(machines)}. All runs together took {seconds / 60:.0f} minutes.")
    return [*parts, f"To run it again:\n\n```\n{command(rows, target)}\n```"]


def _what(done: Sequence[Row]) -> str:
    """Task, model and length of the runs."""
    configs = [row["config"] for row in done]
    config = configs[0]

    def found(name: str) -> str:
        values = sorted({config[name] for config in configs})
        return f"{values[0]}" if len(values) == 1 else f"{values[0]} to {values[-1]}"

    lines = [
        f"task `{config['task']}`, loss in nats per {done[0]['unit']}",
        *done[0]["data"],
        f"model: hidden size {config['hidden_size']}, number of layers {config['num_layers']}, heads "
        f"{config['num_heads']}, {config['dtype']}, dropout {config['dropout']:g}, label smoothing "
        f"{config['label_smoothing']:g}",
        f"{found('steps')} steps of {found('batch_size')} examples, warm-up over {found('warmup_steps')} of them, "
        f"gradients clipped at {config['clip']:g}, validation every {found('val_interval')} steps",
    ]
    if copied := done[0]["measured"].get("chrf_copy_held_out"):
        lines.append(f"chrF goes from 0 to 100; on the held-out part the French text as it is has {copied:.1f}")
    return "\n".join(f"* {line}" for line in lines)


def command(rows: Sequence[Row], target: float | None) -> str:
    """The command line that gives these runs."""
    axes = axes_of(rows)
    words = ["fusedopt", "compare", "--optimizers", *axes.optimizers, "--schedules", *axes.schedules, "--seeds"]
    counted = axes.seeds == tuple(range(len(axes.seeds)))
    words += [str(len(axes.seeds))] if counted else map(str, axes.seeds)
    if axes.batch_sizes:
        words += ["--batch-sizes", *map(str, axes.batch_sizes)]
    for name, value in rows[0]["fixed"].items():
        words += option(name, value)
    if target is not None:
        words += ["--target", f"{target:g}"]
    return shlex.join([*words, "--page", "comparison.md"])


def option(name: str, value: Any) -> list[str]:
    """A setting as on the command line."""
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, dict):
        return [word for key, each in value.items() for word in (flag.removesuffix("s"), f"{key}={each!r}")]
    return [flag, *map(str, value)] if isinstance(value, list | tuple) else [flag, str(value)]


def axes_of(rows: Iterable[Row]) -> grid.Axes:
    """What was varied."""
    found = {key: dict.fromkeys(row[key] for row in rows) for key in ("optimizer", "schedule", "seed", "batch_size")}
    optimizers = tuple(name for name in classes.ENTRIES if name in found["optimizer"])
    sizes = tuple(size for size in found["batch_size"] if size is not None)
    return grid.Axes(optimizers, tuple(found["schedule"]), tuple(sorted(found["seed"])), sizes)


def learning_rates(rows: Sequence[Row]) -> list[str]:
    """What each optimizer's rate is from."""
    records = {row["optimizer"]: row["tuned"] for row in rows}
    found = {name: records[name] for name in classes.ENTRIES if records.get(name)}
    untuned = [name for name in axes_of(rows).optimizers if name not in found]
    parts = [f"Not tuned at this size, but train's default: {', '.join(untuned)}."] if untuned else []
    if not found:
        return parts
    how = list(dict.fromkeys(f"{r['steps']} steps, {r['schedule']}, seed {r['seed']}" for r in found.values()))
    parts.append(
        "Each is the best of a search over powers of √10, which goes on until the next lower and the next higher one "
        f"are worse, by the final validation loss of one run each ({'; '.join(how)}). The same rate is used for every "
        "schedule. `--tune-lr` repeats it."
    )
    return [*parts, tune.report(found).markdown()]


def _legend(groups: Sequence[Group], aim: float | None, target: float | None) -> list[str]:
    lines = table.legend(groups, aim)
    if aim is not None and target is None:
        lines.append(f"the target {aim:g} is the loss that three quarters of the rows come to on average")
    return ["\n".join(f"* {line}" for line in lines)] if lines else []


def _machine(machine: Mapping[str, Any]) -> str:
    place = machine["gpu"] or f"{machine['processor']}, {machine['cores']} cores, torch threads: {machine['threads']}"
    return f"{place}, torch {machine['torch']}, numpy {machine['numpy']}, Python {machine['python']}"
