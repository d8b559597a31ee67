"""`fusedopt runs`: lists past runs, shows what differs between some, and starts new ones from old ones."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from fusedopt.train.errors import BadInput
from fusedopt.train.options import OPTIONS, SectionCommand, SectionOption

from .folders import ROOT, Run, find_run, find_runs

HELP = """Past runs side by side: their settings and results.

Without a subcommand it lists: `fusedopt runs` what lies anywhere below the folder runs, `fusedopt runs FOLDER…` what
lies below others. Runs are folders that `fusedopt train` wrote, trials of `fusedopt tune` and cells of `fusedopt
compare`.

\b
Examples:
  fusedopt runs
  fusedopt runs --sort val_loss --limit 5
  fusedopt runs --filter 'optimizer=adamw lr<0.01' --csv adamw.csv
  fusedopt runs diff mine mine-lr=0.003 --plot both.png
  fusedopt runs start mine --lr 0.003
"""
LIST_HELP = """List the runs below some folders (runs unless given), the newest first.

The settings that are shown are optimizer, lr and those that differ; not intervals, and not what follows from others,
such as a min_lr that is lr / 10.

\b
Examples:
  fusedopt runs --sort val_loss --limit 5
  fusedopt runs runs/tune --filter 'steps>=500 lr<0.01' --all-settings
  fusedopt runs --csv - | column -s, -t
"""
DIFF_HELP = """Show the settings that differ between runs, and their results.

A run is named by its folder, or by the end of its path where only one run below the folder runs has it.

\b
Examples:
  fusedopt runs diff runs/train runs/mine
  fusedopt runs diff mine mine-lr=0.003 --plot both.png
"""
START_HELP = """Train as an old run did, with single options changed.

OLD is named by its folder, or by the end of its path where only one run below the folder runs has it. The new run
starts from new weights. What OLD had by default follows the changes, such as a min_lr that is lr / 10.

It is `fusedopt train --config OLD/config.json` with these options; that is also the way with torchrun. A new run that
was stopped continues with `fusedopt train --resume --out NEW`.

\b
Examples:
  fusedopt runs start mine --lr 0.003
  fusedopt runs start runs/mine --optimizer sgd --lr 0.1 --out runs/sgd
"""
NOT_FOR_START = ("config", "parallel", "out", "resume", "overwrite", "allow_inexact")


class Runs(click.Group):
    """Lists when no subcommand is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["list", *args]
        return super().parse_args(ctx, args)


def one_line(function: Callable[..., int]) -> Callable[..., int]:
    """Bad input gets one line and exit status 2."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> int:
        try:
            return function(*args, **kwargs)
        except BadInput as error:
            raise click.UsageError(str(error)) from None

    return wrapped


@click.group("runs", cls=Runs, help=HELP)
def command() -> None:
    pass


@command.command("list", help=LIST_HELP, short_help="List runs; what happens without a subcommand.")
@click.argument("folders", nargs=-1, metavar="[FOLDER]...")
@click.option(
    "--sort",
    default="date",
    metavar="NAME",
    help="A result or setting: date, name, val_loss, best_val_loss, chrf, step_ms, held_bytes, lr, …; the best, newest "
    "or smallest first.  [default: date]",
)
@click.option(
    "--filter",
    "conditions",
    multiple=True,
    metavar="CONDITIONS",
    help="Only runs that satisfy all of these, such as 'optimizer=adamw lr<0.01 status=done'. Operators are = != < <= "
    "> >=; repeatable.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N.")
@click.option("--all-settings", is_flag=True, help="Show every setting that differs, and those that do not.")
@click.option("--csv", metavar="FILE", help="Write all results and settings to FILE instead; - prints them.")
@click.option("--json", "as_json", is_flag=True, help="Print all results and settings as JSON instead.")
@one_line
def list_command(folders: tuple[str, ...], sort: str, conditions: tuple[str, ...], **given: Any) -> int:
    from . import selection, table

    if given["csv"] and given["as_json"]:
        raise BadInput("--csv and --json print the same in two ways: choose one")
    found = _found(folders)
    runs = selection.filtered(found, conditions)
    if not runs:
        raise BadInput(f"--filter: none of {len(found)} runs satisfies {' '.join(conditions)}")
    runs = selection.ordered(runs, sort)[: given["limit"]]
    if given["as_json"]:
        click.echo(table.as_json(runs), nl=False)
    elif given["csv"] == "-":
        click.echo(table.as_csv(runs), nl=False)
    elif given["csv"]:
        from fusedopt.train.files import write_atomically

        write_atomically(Path(given["csv"]), table.as_csv(runs).encode())
        click.echo(f"{given['csv']}: {len(runs)} runs")
    else:
        from rich.console import Console

        table.show(Console(), runs, given["all_settings"])
    return 0


def _found(folders: Sequence[str]) -> list[Run]:
    """The runs below `folders`; what is damaged there is named in a line on stderr."""
    for name in folders:
        if not Path(name).is_dir():
            close = difflib.get_close_matches(name, command.commands, n=1)
            raise BadInput(f"no folder {name}" + (f": did you mean fusedopt runs {close[0]}?" if close else ""))
    roots = [Path(name) for name in folders] or [ROOT]
    runs, problems = find_runs(roots)
    where = " or ".join(map(str, roots))
    if not runs:
        why = "; ".join(problems) or "fusedopt train makes one, fusedopt runs FOLDER looks elsewhere"
        raise BadInput(f"no runs below {where}: {why}")
    if problems:
        click.echo(f"fusedopt: damaged: {'; '.join(problems)}", err=True)
    return runs


@command.command("diff", help=DIFF_HELP, short_help="Show what differs between runs, and their results.")
@click.argument("names", nargs=-1, metavar="A B...")
@click.option("--plot", metavar="FILE", help="Draw their loss curves into this .png, .svg or .pdf.")
@one_line
def diff_command(names: tuple[str, ...], plot: str | None) -> int:
    from rich.console import Console

    from . import diff
    from . import plot as plots

    if plot:
        plots.check_file(Path(plot))
    runs = [find_run(name) for name in names]
    if len({run.folder.resolve() for run in runs}) < max(2, len(runs)):
        raise BadInput("diff compares two runs or more, each named once: fusedopt runs lists them")
    diff.show(Console(), runs)
    if plot:
        plots.write(plots.draw(runs), Path(plot))
        click.echo(plot)
    return 0


@one_line
def _start(old: str, **options: Any) -> int:
    from fusedopt.train import command as train

    from .start import start

    return start(find_run(old), options, functools.partial(click.get_current_context().invoke, train.command))


command.add_command(
    SectionCommand(
        "start",
        params=[
            click.Argument(["old"]),
            *(option for option in OPTIONS if option.name not in NOT_FOR_START),
            SectionOption(
                ["--out"],
                section="Run",
                metavar="FOLDER",
                help="Output folder, without a run in it. [in runs, named after OLD and the changes: mine-lr=0.003]",
            ),
        ],
        callback=_start,
        help=START_HELP,
        short_help="Train as an old run did, with single options changed.",
    )
)
