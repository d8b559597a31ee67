"""`fusedopt compare`: settles the axes, tunes learning rates, runs what has no result yet, reports."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..train.errors import BadInput
from ..train.options import SectionCommand, SectionOption, repeat_option, shared
from . import classes, grid

if TYPE_CHECKING:
    from rich.console import Console

    from .results import Results

DEFAULT_OUT = "runs/compare"
SCHEDULES = ("cosine", "constant")
WIDTH = 140
"""Columns that a table may have: a narrower terminal folds its lines."""
LISTS = ("--optimizers", "--schedules", "--seeds", "--batch-sizes", "--text")
VARIED = (
    "optimizer", "optimizer_arg", "lr", "schedule", "schedule_arg", "lr_file", "seed", "compare", "parallel", "out",
    "resume", "overwrite", "allow_inexact",
)  # fmt: skip
"""Options of train of which each run has its own, or that are for single runs."""
OF_ONE_RUN = (
    "optimizer", "optimizer_args", "lr", "min_lr", "weight_decay", "schedule", "schedule_args", "lr_file", "seed",
    "compare",
)  # fmt: skip
"""Settings that are left out of a file: it has them for its own optimizer and schedule."""

HELP = f"""Compare optimizers, schedules and mini-batch sizes on one task, over several seeds.

Each combination is a training run of its own, with the optimizer's tuned learning rate. The report has a table for
each class of optimizers and plots with the spread over the seeds. A run that diverges is reported and counted.

The same command goes on where it was stopped, even by kill -9: a run that has ended is not run again, and one in the
middle continues from its checkpoint. Further optimizers, schedules and seeds can be added to the same folder.

Unless told otherwise the runs are small: {" ".join(f"--{k.replace('_', '-')} {v}" for k, v in grid.SMALL.items())}.
Those replace the defaults in brackets below, which are those of fusedopt train; all others are as shown.

The learning rates that come with fusedopt are for that task, model and batch size. For others --tune-lr finds them;
without it train's defaults are used, and marked in the table. A rate is tuned with the first of
--schedules and at --batch-size, and used for all; with --batch-sizes it is scaled by --lr-scaling [sqrt], and each
run sees the same examples (--epochs [1]).

\b
Examples:
  fusedopt compare
  fusedopt compare --optimizers sgd momentum adamw muon --schedules cosine linear constant --seeds 3
  fusedopt compare --optimizers all --seeds 5 --page results/comparison.md
  fusedopt compare --batch-sizes 1 8 64 full --epochs 2 --out runs/batches
  fusedopt compare --task text --hidden-size 128 --steps 500 --tune-lr --out runs/text

\b
Optimizers by class:
{chr(10).join(f"  {title}: {', '.join(entries)}" for title, entries in classes.CLASSES.items())}
"""


class ListCommand(SectionCommand):
    """Reads `--seeds 1 2` as `--seeds 1 --seeds 2`, and so for each option that takes a list."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for name in LISTS:
            args = repeat_option(name, args)
        return super().parse_args(ctx, args)


def _option(name: str, text: str, **settings: Any) -> SectionOption:
    return SectionOption([name], help=text, section="Comparison", **settings)


OWN: list[click.Parameter] = [
    _option("--optimizers", f"Names, or all. [{' '.join(classes.DEFAULT)}]", multiple=True, metavar="NAME..."),
    _option("--schedules", f"Names, see fusedopt schedules. [{' '.join(SCHEDULES)}]", multiple=True,
            metavar="NAME..."),
    _option("--seeds", "How many, or several numbers. [2]", multiple=True, metavar="N..."),
    _option("--batch-sizes", "Mini-batch sizes, from 1 to full. [that of --batch-size]", multiple=True,
            metavar="N..."),
    _option("--tune-lr", "First find each optimizer's learning rate, over powers of √10, with a seed of its own; they "
            "go into tuned.json in the output folder.", is_flag=True),
    _option("--target", "Steps to this validation loss are reported. [what three quarters of the rows come to]",
            type=float, metavar="LOSS"),
    _option("--page", "Write the report as a page of Markdown, with its plots beside it.", metavar="FILE"),
    _option("--results", "Where the results are kept, one line per run. [results.jsonl in the output folder]",
            metavar="FILE"),
    _option("--report", "Run nothing: report the results that there are.", is_flag=True),
    _option("--out", f"Output folder: results, plots, and a folder for each run. [{DEFAULT_OUT}]", metavar="FOLDER"),
]  # fmt: skip
OPTIONS = [*OWN, *shared("Data", "Model", "Training", "Optimizer", "Run", without=VARIED)]


def _callback(**given: Any) -> int:
    for module in ("matplotlib", "rich"):  # missing ones show now, not after the training
        importlib.import_module(module)
    try:
        return compare(given)
    except BadInput as error:
        raise click.UsageError(str(error)) from None


command = ListCommand("compare", params=OPTIONS, callback=_callback, help=HELP)


def compare(given: dict[str, Any]) -> int:
    """Run, unless only the report is wanted, then report. The exit status: 0, or 128 + the signal that stopped it."""
    from rich.console import Console

    from ..train.errors import Stopped
    from . import results

    own = {option.name: given.pop(option.name) for option in OWN if option.name}
    folder = Path(own["out"] or DEFAULT_OUT)
    kept = results.Results(Path(own["results"] or folder / results.FILE_NAME))
    console = Console()
    if not own["report"]:
        try:
            run(own, given, folder, kept, console)
        except Stopped as stopped:
            click.echo("fusedopt: stopped; the same command continues", err=True)
            return 128 + stopped.signal
    report(own, kept, wide(console))
    return 0


def run(own: dict[str, Any], given: dict[str, Any], folder: Path, kept: Results, console: Console) -> None:
    """Tune if it is wanted, then run the cells that have no result."""
    from ..train import session
    from . import runner, tune, tuned
    from .view import ProgressView

    axes = settle_axes(own)
    settings = settle(given, console)
    fixed = grid.fixed_settings(settings, bool(axes.batch_sizes))
    where = tuned.place(base_config(axes, fixed))
    make_folder(folder)
    if own["tune_lr"]:
        with ProgressView(console, {}) as view:
            found, problems = tune.tune(axes.optimizers, axes.schedules[0], fixed, folder, view, session.run)
        tuned.write(folder / tuned.FILE_NAME, where, found)
        say(console, *problems)
        wide(console).print(tune.report(found).rich())
    records = tuned.read([tuned.SHIPPED, folder / tuned.FILE_NAME], where)
    if untuned := ", ".join(name for name in axes.optimizers if name not in records):
        say(console, f"not tuned at this size, so with train's learning rate (--tune-lr finds one): {untuned}")
    cells = list(grid.cells(axes, fixed, records))
    waiting = runner.pending(cells, folder, kept.rows)
    if len(waiting) < len(cells):
        say(console, f"{len(cells) - len(waiting)} of {len(cells)} runs have a result already")
    with ProgressView(console, steps_of(waiting)) as view:
        runner.run_all(waiting, folder, kept, view, session.run)


def settle_axes(own: dict[str, Any]) -> grid.Axes:
    """The axes that the options ask for. BadInput for what is not known, or nothing."""
    from ..schedules import NAMES
    from . import tuned

    optimizers = classes.chosen(own["optimizers"] or classes.DEFAULT)
    names = dict.fromkeys(own["schedules"] or SCHEDULES)
    schedules = tuple(classes.known("--schedules", name, NAMES) for name in names)
    axes = grid.Axes(
        optimizers, schedules, grid.parse_seeds(own["seeds"] or ("2",)), grid.parse_batch_sizes(own["batch_sizes"])
    )
    if tuned.SEED in axes.seeds:
        raise BadInput(f"--seeds: {tuned.SEED} is the seed that learning rates are tuned with: use another")
    return axes


def settle(given: dict[str, Any], console: Console) -> grid.Settings:
    """The settings of --config, without what each run has of its own, and over them those of the command line."""
    from ..train.settings import from_options

    settings = from_options(given)
    if left := [name for name in OF_ONE_RUN if name in settings and given.get(name) is None]:
        say(console, f"left out of --config {given['config']}, because each run has its own: {', '.join(left)}")
    return {name: value for name, value in settings.items() if name not in left}


def base_config(axes: grid.Axes, fixed: grid.Settings) -> dict[str, Any]:
    """The resolved settings of a run at the batch size that learning rates are tuned at."""
    from ..train import job

    cell = grid.tuning_cell(axes.optimizers[0], axes.schedules[0], 0, 1e-3, fixed)
    return job.validated(cell.settings).as_dict()


def steps_of(cells: Sequence[grid.Cell]) -> dict[str, int]:
    """How long each cell is, of those that can run. BadInput, the first one's, when none can."""
    from ..train import job

    found: dict[tuple[Any, ...], int | BadInput] = {}
    for cell in cells:
        key = cell.optimizer, cell.schedule, cell.batch_size
        if key not in found:
            try:
                found[key] = job.validated(cell.settings).steps
            except BadInput as error:
                found[key] = error
    problems = [value for value in found.values() if isinstance(value, BadInput)]
    if problems and len(problems) == len(found):
        raise problems[0]
    lengths = {cell.name: found[cell.optimizer, cell.schedule, cell.batch_size] for cell in cells}
    return {name: value if isinstance(value, int) else 0 for name, value in lengths.items()}


def make_folder(folder: Path) -> None:
    """Create the output folder before anything is trained."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"cannot write to output folder {folder}: {error.strerror}") from None


def report(own: dict[str, Any], kept: Results, console: Console) -> None:
    """Tables in the terminal, plots beside the results, and the page."""
    from . import page, plot, results, table

    rows = list(kept.rows.values())
    if not rows:
        raise BadInput(f"{kept.path} holds no results yet: run without --report")
    groups = results.groups(rows)
    target = results.default_target(groups) if own["target"] is None else own["target"]
    tables = [*table.by_class(groups, target), table.by_schedule(groups), table.by_batch_size(groups)]
    for each in filter(None, tables):
        console.print(each.rich())
    say(console, *table.legend(groups, target))
    if own["page"]:
        path = Path(own["page"])
        make_folder(path.parent)
        page.write(path, rows, own["target"])
        say(console, f"page: {path}")
    else:
        images = plot.draw(groups, kept.path.parent, "comparison")
        say(console, f"{kept.path.parent}: {', '.join([kept.path.name, *images.values()])}")


def wide(console: Console) -> Console:
    """For tables."""
    return type(console)(width=max(console.width, WIDTH))


def say(console: Console, *lines: str) -> None:
    """Plain lines."""
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
