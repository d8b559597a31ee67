"""`fusedopt verify`: the error of every rule, dtype and backend of this machine, beside torch.optim's.

A rule of the user's own (``--rule FILE.py:NAME``) has no oracle; its kernels are compared with its reference.
Exit status: 0 when all is within bounds, 1 when a bound is broken, a step raises or two backends differ in a bit,
2 for bad input.
"""

from __future__ import annotations

import difflib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import click

LONG = 30
"""Cells from which on a run tells how far it is."""


@click.command(help="Check every rule, dtype and backend of this machine against an oracle in higher precision.")
@click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="NAME",
    help=(
        "Only this rule (repeatable). FILE.py:NAME or package.module:NAME: a rule of your own, its kernels against its "
        "eager reference."
    ),
)
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
    from . import backends
    from .formats import DTYPES
    from .problem import SEEDS

    known = backends.available()
    all_dtypes = _chosen("dtype", dtypes, DTYPES)
    names = _chosen("backend", wanted, backends.NAMES)
    for name in wanted:
        if not known[name].runs:
            raise BadInput(known[name].how)
    names = tuple(name for name in names if known[name].runs)
    if not 1 <= seeds <= len(SEEDS):
        raise BadInput(f"--seeds must be between 1 and {len(SEEDS)}, not {seeds}")
    if not any(":" in rule for rule in rules):
        passed = _library(rules, all_dtypes, bool(dtypes), names, seeds, json_output)
    elif len(rules) == 1:
        passed = _own(rules[0], all_dtypes, names, seeds, json_output)
    else:
        raise BadInput("a rule of your own is verified by itself; give one --rule")
    ctx.exit(0 if passed else 1)


def _library(
    rules: tuple[str, ...], asked: tuple[str, ...], by_name: bool, names: tuple[str, ...], seeds: int, as_json: bool
) -> bool:
    """Rules of the library against their oracles; by_name: whether the dtypes were asked for, then none is sampled."""
    from . import backends, report
    from .check import verify
    from .formats import DTYPES, has_reference
    from .oracles import ORACLES
    from .problem import SAMPLED, SEEDS, cells

    rules = _chosen("rule", rules, ORACLES)
    dtypes = tuple(name for name in asked if has_reference(DTYPES[name]))
    if not dtypes:
        raise BadInput(f"{', '.join(asked)}: not verified here, NumPy's longdouble is too short for a reference")
    dropped = {name: "not run: NumPy's longdouble is too short for a reference" for name in asked if name not in dtypes}
    further = dtypes if by_name else SAMPLED
    chosen = cells(rules, dtypes, further)
    if not chosen:
        raise BadInput(f"{', '.join(rules)}: no complex parameters")
    dropped |= report.left_out(rules, dtypes, further)
    with _progress(len(chosen), (config.rule for config, _ in chosen)) as advance:
        result = verify(chosen, names, SEEDS[:seeds], advance)
    ran = report.coverage(names, backends.available(), dropped)
    if as_json:
        click.echo(json.dumps(report.as_json(result, ran, seeds), indent=1))
    else:
        report.print_table(result, ran, seeds)
    return result.passed


def _own(target: str, dtypes: tuple[str, ...], names: tuple[str, ...], seeds: int, as_json: bool) -> bool:
    """A rule of the user's own against its reference."""
    from . import backends, own, own_report
    from .problem import SEEDS

    if names == ("eager",):
        raise BadInput("the reference runs on eager and is compared with the kernels; name another --backend")
    try:
        rule = own.load(target)
    except own.NotFound as error:
        raise BadInput(str(error)) from None
    cells = own.cells(rule, dtypes)
    with _progress(len(cells), (cell.label for cell in cells)) as advance:
        result = own.verify(target, cells, names, SEEDS[:seeds], advance)
    ran = own_report.coverage(names, backends.available())
    if as_json:
        click.echo(json.dumps(own_report.as_json(target, result, ran, seeds), indent=1))
    else:
        own_report.print_report(target, result, ran, seeds)
    return result.passed


@contextmanager
def _progress(total: int, titles: Iterator[str]) -> Iterator[Callable[[Any], None]]:
    """A bar on a terminal; elsewhere, in long runs, a line on stderr when the last cell of a title is done.

    titles: of every cell in turn; cells with the same one follow each other.
    """
    from rich.console import Console
    from rich.progress import Progress

    remaining = list(titles)
    start = time.monotonic()
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(remaining[0], total=total)

        def advance(cell: Any) -> None:
            title = remaining.pop(0)
            progress.update(task, advance=1, description=remaining[0] if remaining else title)
            if total >= LONG and progress.disable and title not in remaining[:1]:
                done, seconds = total - len(remaining), time.monotonic() - start
                print(f"verified {title}: {done} of {total} cells, {seconds:.0f} s", file=sys.stderr, flush=True)

        yield advance


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
