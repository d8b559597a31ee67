"""`fusedopt verify`: the error of every rule, dtype and backend of this machine, beside torch.optim's.

Exit status: 0 when all is within bounds, 1 when a bound is broken, a step raises or two backends differ in a bit,
2 for bad input.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Iterable, Sequence

import click


@click.command(help="Check every rule, dtype and backend of this machine against an oracle in higher precision.")
@click.option("--rule", "rules", multiple=True, metavar="NAME", help="Only this rule (repeatable).")
@click.option("--dtype", "dtypes", multiple=True, metavar="NAME", help="Only this parameter dtype (repeatable).")
@click.option(
    "--backend",
    "wanted",
    multiple=True,
    metavar="NAME",
    help="Only this backend: eager, interpreted or compiled (repeatable). Default: all that run here.",
)
@click.option("--seeds", default=1, show_default=True, metavar="N", help="How many seeds of the published set.")
@click.option("--json", "json_output", is_flag=True, help="Print the whole report as JSON.")
@click.pass_context
def command(
    ctx: click.Context,
    rules: tuple[str, ...],
    dtypes: tuple[str, ...],
    wanted: tuple[str, ...],
    seeds: int,
    json_output: bool,
) -> None:
    """Parse the options, verify, print."""
    from . import backends, report
    from .formats import DTYPES, has_reference
    from .oracles import CONFIGURATIONS, ORACLES
    from .problem import SEEDS

    known = backends.available()
    rules = _chosen("rule", rules, ORACLES)
    asked = _chosen("dtype", dtypes, DTYPES)
    dtypes = tuple(name for name in asked if has_reference(DTYPES[name]))
    names = _chosen("backend", wanted, backends.NAMES)
    for name in wanted:
        if not known[name].runs:
            raise BadInput(known[name].how)
    names = tuple(name for name in names if known[name].runs)
    if not 1 <= seeds <= len(SEEDS):
        raise BadInput(f"--seeds must be between 1 and {len(SEEDS)}, not {seeds}")
    if not dtypes:
        raise BadInput(f"{', '.join(asked)}: not verified here, NumPy's longdouble is too short for a reference")

    dropped = {name: "not run: NumPy's longdouble is too short for a reference" for name in asked if name not in dtypes}
    cells = [(config, dtype) for config in CONFIGURATIONS if config.rule in rules for dtype in dtypes]
    ran = report.coverage(names, known, dropped)
    result = _with_progress(cells, names, SEEDS[:seeds])
    if json_output:
        click.echo(json.dumps(report.as_json(result, ran, seeds), indent=1))
    else:
        report.print_table(result, ran, seeds)
    ctx.exit(0 if result.passed else 1)


def _with_progress(cells: Sequence, names: Sequence[str], seeds: Sequence[int]):
    from rich.console import Console
    from rich.progress import Progress

    from .check import verify

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("verifying", total=len(cells))
        return verify(cells, names, seeds, lambda: progress.advance(task))


def _chosen(what: str, asked: tuple[str, ...], known: Iterable[str]) -> tuple[str, ...]:
    """The names asked for, in the order of ``known``; all of them when none was."""
    known = tuple(known)
    for name in asked:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
            raise BadInput(f"unknown {what} {name!r}; {hint}")
    return tuple(name for name in known if not asked or name in asked)


class BadInput(click.ClickException):
    """Something that the user wrote cannot be done; one line, exit status 2."""

    exit_code = 2
