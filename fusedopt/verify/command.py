"""`fusedopt verify`: the error of every rule, dtype, format and backend of this machine, beside torch.optim's.

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
from typing import Any, NamedTuple

import click

LONG = 30
"""Cells from which on a run tells how far it is."""
MANY = 100
"""The same of formats, whose cells are smaller."""


@click.command(help="Check every rule, dtype, format and backend of this machine against a longer oracle.")
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
    "--formats",
    multiple=True,
    metavar="NAME",
    help=(
        "Only this format of state or weights: a value of state_dtype or master_weights ('master': its 'float32'), all "
        "or none (repeatable). Default: all dtypes and all formats; --dtype or --formats alone leaves the other out."
    ),
)
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
    formats: tuple[str, ...],
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
    kept = _formats(formats, bool(dtypes))
    names = _chosen("backend", wanted, backends.NAMES)
    for name in wanted:
        if not known[name].runs:
            raise BadInput(known[name].how)
    names = tuple(name for name in names if known[name].runs)
    if not 1 <= seeds <= len(SEEDS):
        raise BadInput(f"--seeds must be between 1 and {len(SEEDS)}, not {seeds}")
    run = Run(all_dtypes if dtypes or not kept or not formats else (), bool(dtypes), kept, names, seeds, json_output)
    if not any(":" in rule for rule in rules):
        passed = _library(rules, run)
    elif len(rules) == 1:
        passed = _own(rules[0], run)
    else:
        raise BadInput("a rule of your own is verified by itself; give one --rule")
    ctx.exit(0 if passed else 1)


class Run(NamedTuple):
    """What was asked for. dtypes, formats: empty where these are left out; by_name: dtypes were, so none is sampled."""

    dtypes: tuple[str, ...]
    by_name: bool
    formats: tuple[str, ...]
    names: tuple[str, ...]
    seeds: int
    as_json: bool


def _formats(asked: tuple[str, ...], dtypes: bool) -> tuple[str, ...]:
    """Names of `kept.NAMES`; dtypes: whether dtypes were asked for."""
    from .kept import NAMES

    if "none" in asked or not (asked or dtypes):
        if len(asked) > 1:
            raise BadInput("--formats none goes with no other")
        return () if asked else NAMES
    chosen = _chosen("format", tuple(name for name in asked if name != "all"), NAMES) if asked else ()
    return NAMES if "all" in asked else chosen


def _library(rules: tuple[str, ...], run: Run) -> bool:
    """Rules of the library against their oracles, in dtypes and in formats."""
    from . import backends, kept, kept_report, kept_verify, report
    from .check import Report, verify
    from .oracles import ORACLES
    from .problem import SEEDS

    rules, seeds = _chosen("rule", rules, ORACLES), SEEDS[: run.seeds]
    chosen, dropped = _plain_cells(rules, run) if run.dtypes else ([], {"dtypes": "not run: not asked for"})
    in_formats = kept.cells(rules, run.formats)
    plain, formats = Report(), kept_verify.KeptReport()
    if chosen:
        with _progress(len(chosen), (config.rule for config, _ in chosen)) as advance:
            plain = verify(chosen, run.names, seeds, advance)
    if in_formats:
        titles = (f"formats of {cell.configuration.rule}" for cell in in_formats)
        with _progress(len(in_formats), titles, MANY) as advance:
            formats = kept_verify.verify(in_formats, run.names, seeds, advance)
    else:
        dropped["formats"] = "not run: not asked for"
    ran = report.coverage(run.names, backends.available(), dropped)
    passed = (plain.passed or not chosen) and (formats.passed or not in_formats)
    if run.as_json:
        both = {**report.as_json(plain, ran, run.seeds), "passed": passed}
        both["formats"] = kept_report.as_json(formats, in_formats) if in_formats else None
        click.echo(json.dumps(both, indent=1))
        return passed
    if in_formats:
        kept_report.print_tables(formats, in_formats, run.seeds)
    if chosen:
        report.print_table(plain, ran, run.seeds)
    else:
        report.print_coverage(ran)
    return passed


def _plain_cells(rules: tuple[str, ...], run: Run) -> tuple[list[Any], dict[str, str]]:
    """What is run in dtypes alone, and what is left out, in words."""
    from . import report
    from .formats import DTYPES, has_reference
    from .problem import SAMPLED, cells

    dtypes = tuple(name for name in run.dtypes if has_reference(DTYPES[name]))
    if not dtypes:
        raise BadInput(f"{', '.join(run.dtypes)}: not verified here, NumPy's longdouble is too short for a reference")
    why = "not run: NumPy's longdouble is too short for a reference"
    further = dtypes if run.by_name else SAMPLED
    chosen = cells(rules, dtypes, further)
    if not chosen:
        raise BadInput(f"{', '.join(rules)}: no complex parameters")
    left_out = report.left_out(rules, dtypes, further)
    return chosen, {name: why for name in run.dtypes if name not in dtypes} | left_out


def _own(target: str, run: Run) -> bool:
    """A rule of the user's own against its reference."""
    from . import backends, own, own_report
    from .problem import SEEDS

    if run.names == ("eager",):
        raise BadInput("the reference runs on eager and is compared with the kernels; name another --backend")
    try:
        rule = own.load(target)
    except own.NotFound as error:
        raise BadInput(str(error)) from None
    cells = own.cells(rule, run.dtypes, run.formats)
    if not cells:
        raise BadInput(f"{', '.join(run.formats)}: {target} has no state that may be kept so")
    with _progress(len(cells), (cell.label for cell in cells)) as advance:
        result = own.verify(target, cells, run.names, SEEDS[: run.seeds], advance)
    ran = own_report.coverage(run.names, backends.available())
    if run.as_json:
        click.echo(json.dumps(own_report.as_json(target, result, ran, run.seeds), indent=1))
    else:
        own_report.print_report(target, result, ran, run.seeds)
    return result.passed


@contextmanager
def _progress(total: int, titles: Iterator[str], long: int = LONG) -> Iterator[Callable[[Any], None]]:
    """A bar on a terminal; elsewhere, in ``long`` runs, a line on stderr when the last cell of a title is done.

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
            if total >= long and progress.disable and title not in remaining[:1]:
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
