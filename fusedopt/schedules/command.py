"""`fusedopt schedules`: what schedules there are, and pictures of them.

Exit status: 0, or 2 for bad input.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fusedopt.train.errors import BadInput
from fusedopt.train.options import SectionCommand, SectionOption

from .checks import check, closest, parse_arguments
from .names import NAMES, SCHEDULES, Run, default_min_lr, default_warmup_steps

HELP = f"""List the learning-rate schedules with their formulas and arguments, or draw them.

NAMES are those to list or draw; all of them unless given: {", ".join(NAMES)}.

\b
Examples:
  fusedopt schedules
  fusedopt schedules --plot schedules.png
  fusedopt schedules wsd --plot wsd.png --steps 5000 --schedule-arg decay=0.3 --schedule-arg shape=sqrt
"""

FORMATS = ("png", "svg", "pdf")
DEFAULTS: dict[str, Any] = {"steps": 1000, "lr": 1e-3, "epoch_steps": 1.0}


NOTE = """W: steps of linear warm-up in front of every schedule, from lr/(W + 1) up to lr (warmup_cosine: from min_lr;
one_cycle: its own rise). t: steps after the warm-up; T: all of those; epoch: t / epoch_steps."""


def _option(section: str, name: str, text: str, type: Any = str, **settings: Any) -> SectionOption:
    return SectionOption([name], section=section, help=text, type=type, **settings)


OPTIONS = [
    click.Argument(["names"], nargs=-1, metavar="[NAMES]..."),
    _option("Picture", "--plot", f"Draw the learning rate of each step into this file ({', '.join(FORMATS)}).",
            metavar="FILE"),
    _option("Run that is drawn", "--steps", "Optimizer steps. [1000]", int),
    _option("Run that is drawn", "--lr", "Largest learning rate. [0.001]", float),
    _option("Run that is drawn", "--warmup-steps", "Steps of linear warm-up. [5 % of the steps; one_cycle 0]", int),
    _option("Run that is drawn", "--min-lr", "Learning rate at the end, or below which none falls. [lr / 10 for "
            "schedules that end there, else 0]", float),
    _option("Run that is drawn", "--epoch-steps", "Steps in an epoch, for what decays by the epoch. [1]", float),
    _option("Run that is drawn", "--schedule-arg", "An argument of the schedules that take it, such as gamma=0.5; "
            "repeatable.", multiple=True, metavar="NAME=VALUE"),
]  # fmt: skip


def _callback(names: tuple[str, ...], plot: str | None, **given: Any) -> int:
    try:
        known = _known(names)
        if plot is not None:
            return picture(known, Path(plot), given)
        for name, value in given.items():
            if value is not None and value != ():
                raise BadInput(f"--{name.replace('_', '-')} describes the run that --plot FILE draws: add --plot")
        return table(known)
    except BadInput as error:
        raise click.UsageError(str(error)) from None


command = SectionCommand("schedules", params=OPTIONS, callback=_callback, help=HELP)


def _known(names: Sequence[str]) -> list[str]:
    for name in names:
        if name not in SCHEDULES:
            raise BadInput(f"unknown schedule {name}{closest(name, NAMES)}")
    return list(dict.fromkeys(names)) or list(NAMES)


def table(names: Sequence[str]) -> int:
    """Print formulas and arguments."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False)
    grid = Table(title="Learning-rate schedules", show_lines=True)
    for heading in ("schedule", "learning rate", "arguments [default]"):
        grid.add_column(heading, overflow="fold")
    for name in names:
        row = SCHEDULES[name]
        arguments = [f"{label}: {a.about} [{a.default_text}]" for label, a in row.arguments.items()]
        grid.add_row(name, f"{row.about}\n{row.formula}", "\n".join(arguments) or "none")
    console.print(grid)
    console.print(NOTE)
    return 0


def picture(names: Sequence[str], path: Path, given: dict[str, Any]) -> int:
    """Draw the schedules into `path`."""
    format = path.suffix.lstrip(".").lower()
    if format not in FORMATS:
        raise BadInput(f"--plot {path}: the name must end in .{', .'.join(FORMATS)}")
    runs = _runs(names, given)
    import matplotlib  # noqa: F401 a missing one shows before torch is imported

    from fusedopt.train.files import write_atomically

    from . import plot

    content = plot.draw([(name, plot.trace(name, run, arguments)) for name, run, arguments in runs], format)
    write_atomically(path, content)
    click.echo(f"{len(runs)} schedules over {runs[0][1].steps} steps: {path}")
    return 0


def _runs(names: Sequence[str], given: dict[str, Any]) -> list[tuple[str, Run, dict[str, Any]]]:
    """Schedule, run and arguments of each panel, checked."""
    values = {**DEFAULTS, **{name: value for name, value in given.items() if value is not None}}
    runs = []
    try:
        arguments = parse_arguments(values["schedule_arg"])
        taken = {label for name in names for label in SCHEDULES[name].arguments}
        for label in arguments:
            if label not in taken:
                raise BadInput(f"--schedule-arg {label}: none of {', '.join(names)} takes it{closest(label, taken)}")
        for name in names:
            own = {label: value for label, value in arguments.items() if label in SCHEDULES[name].arguments}
            warmup = values.get("warmup_steps", default_warmup_steps(name, values["steps"]))
            min_lr = values.get("min_lr", default_min_lr(name, values["lr"]))
            run = Run(values["steps"], warmup, values["lr"], min_lr, values["epoch_steps"])
            check(name, run.steps, run.warmup_steps, run.lr, run.min_lr, run.epoch_steps, own)
            runs.append((name, run, own))
    except ValueError as error:
        raise BadInput(str(error)) from None
    return runs
