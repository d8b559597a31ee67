"""`fusedopt tune`: settles what is searched, runs the trials, and reports the best."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..train.errors import BadInput
from ..train.options import SectionCommand, SectionOption, shared
from .names import OBJECTIVES, PRUNERS, SAMPLERS

if TYPE_CHECKING:
    from .plan import Plan

HELP = """Search hyper-parameters of `fusedopt train` with Optuna.

A trial is one run with the fixed settings, which are options of `fusedopt train`, and others drawn from --space. The
output folder receives study.db (Optuna's, in SQLite), a run per trial under trials/, best.json for `fusedopt train
--config`, and plots: history.png, importance.png, slices.png.

\b
A range or list per searched setting:
  --space lr=log:1e-4:1e-1             from 1e-4 to 1e-1, evenly in the logarithm
  --space dropout=0:0.3                evenly; with steps: dropout=0:0.3:0.1
  --space hidden_size=32:256:32        whole numbers, where the setting is one
  --space optimizer=adam,adamw,lion    a list
  --space optimizer_args.eps=log:1e-10:1e-6      an argument of the optimizer's class
  --space optimizer_args.betas.1=0.9:0.999       one entry of a tuple: beta 2
  --space schedule_args.multiplier=int:1:3       int: whole numbers, where it does not go without saying

A study that was stopped, even by kill -9, goes on with --resume: finished trials are kept, interrupted ones continue
from their checkpoints. Then options are those of the study; --trials may grow. Several such commands may work on one
study at a time.

\b
Examples:
  fusedopt tune --steps 200
  fusedopt tune --steps 200 --space lr=log:1e-4:1e-1 --space optimizer=adamw,lion --trials 30 --jobs 2
  fusedopt tune --task translate --sampler grid --space lr=0.001,0.002,0.004 --space dropout=0:0.3:0.1
  fusedopt tune --resume --trials 60
  fusedopt train --config runs/tune/best.json --steps 2000
"""

DEFAULT_OUT = "runs/tune"
SEARCH: list[dict[str, Any]] = [
    dict(param_decls=["--space"], multiple=True, metavar="NAME=RANGE", help="Search this setting; repeatable. [lr a "
         "tenth to ten times its default, weight_decay 0.001 to 1, warmup_steps up to a fifth of the steps]"),
    dict(param_decls=["--sampler"], type=click.Choice(SAMPLERS), help="How settings are proposed: all points of a "
         "grid, random, Bayesian by tree-structured Parzen estimators or a Gaussian process, CMA-ES, particle swarm. "
         "[tpe]"),
    dict(param_decls=["--trials"], type=click.IntRange(min=1), help="Trials of the study in all. [20; grid: all "
         "points]"),
    dict(param_decls=["--pruner"], type=click.Choice(PRUNERS), help="Which trials end early, by their validation "
         "losses: those above the median of others, or all but a third at each rung. [median; with gp, cmaes and pso, "
         "and for what is not a loss, none]"),
    dict(param_decls=["--objective"], type=click.Choice(list(OBJECTIVES)), help="What the best trial is best in; the "
         "last two are of --task translate. [val_loss_best]"),
    dict(param_decls=["--search-seed"], type=click.IntRange(0, 2**32 - 1), help="Seed of the proposals; --seed is that "
         "of every run. [0]"),
    dict(param_decls=["--jobs"], type=click.IntRange(min=1), default=1, help="Processes that train at a time, with a "
         "share of the threads each. [1]"),
]  # fmt: skip
RUN: list[dict[str, Any]] = [
    dict(param_decls=["--out"], default=DEFAULT_OUT, metavar="FOLDER", help=f"Output folder. [{DEFAULT_OUT}]"),
    dict(param_decls=["--resume"], is_flag=True, help="Continue the study in the output folder, or join in."),
    dict(param_decls=["--overwrite"], is_flag=True, help="Start anew, and delete the study that is there."),
]  # fmt: skip
OPTIONS: list[click.Parameter] = [
    *(SectionOption(section="Search", **settings) for settings in SEARCH),
    *shared("Data", "Model", "Training", "Optimizer", without=("compare", "lr_file")),
    *(SectionOption(section="Run", **settings) for settings in RUN),
    *shared("Run", without=("parallel", "out", "resume", "overwrite", "allow_inexact")),
]


def _callback(**options: Any) -> int:
    for module in ("matplotlib", "rich", "optuna"):  # missing ones show now, not after the training
        importlib.import_module(module)
    try:
        return tune(options)
    except BadInput as error:
        raise click.UsageError(str(error)) from None


command = SectionCommand("tune", params=OPTIONS, callback=_callback, help=HELP)


def tune(options: dict[str, Any]) -> int:
    """Settle the study, work on it, and report. The exit status: 0, 1 if no trial was completed, 128 + a signal."""
    from rich.console import Console

    from . import report, samplers, study, team  # these import torch and Optuna: not for --help

    search = [option["param_decls"][0].lstrip("-").replace("-", "_") for option in SEARCH]
    given = {name: value for name in search if (value := options.pop(name)) not in (None, ())}
    jobs, folder = given.pop("jobs"), Path(options.pop("out"))
    resume, overwrite = options.pop("resume"), options.pop("overwrite")
    study.check_folder(folder, resume, overwrite)
    plan = _plan(folder, given, options, resume)
    for module in samplers.NEEDS.get(plan.sampler, ()):
        importlib.import_module(module)
    if resume:
        study.update(folder, plan)
    else:
        study.create(folder, plan, overwrite)
    console = Console()
    for line in report.introduction(plan, jobs):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    with study.usable(folder), report.View(console, folder) as view:
        ended = team.run(folder, jobs, view.changed)
    complete = report.conclude(console, folder)
    if ended.reason:
        click.echo(f"fusedopt: {ended.reason}; continue with --resume", err=True)
    return 128 + ended.signal if ended.signal else 0 if complete and not ended.reason else 1


def _plan(folder: Path, given: dict[str, Any], options: dict[str, Any], resume: bool) -> Plan:
    from ..train.settings import from_options, normalised
    from . import plan, space, study, training

    def settings(options: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in normalised(from_options(options)).items() if value != {}}

    fixed = settings(options)
    own = settings({name: value for name, value in options.items() if name != "config"})
    if resume:
        saved = plan.continued(study.load(folder)[1], given, fixed, own)
        space.check(saved.settings, saved.dimensions, training.validated)  # what they need may be gone
        return saved
    return plan.settle(given, fixed, own, training.validated)
