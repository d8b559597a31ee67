"""`fusedopt train`: settles the settings, checks the input, trains, and reports."""

from __future__ import annotations

import importlib
import os
import re
from typing import TYPE_CHECKING, Any

import click

from .errors import BadInput, Diverged, Lost, Reported
from .options import OPTIONS, SectionCommand

if TYPE_CHECKING:
    from .job import Job

HELP = """Train a small Transformer on real text.

Task text: a decoder-only model of bytes; the text is the source code of Python's standard library on this machine, or
your own files. Task translate: French to English, on the catalogues that Django and Wagtail ship. Two CPU cores need
about three minutes; with a GPU the model is larger, the kernels are compiled and the forward pass runs in bf16.

The output folder receives metrics.jsonl (a line per step), loss.png (losses, norms, clipping), checkpoint.pt,
config.json and summary.json. What each option does, and when to change it: fusedopt/docs/hyperparameters.md.
A run that was stopped, even by kill -9, continues with --resume and ends with the same bits.

Under torchrun several processes train one model: each has its share of every batch, so that the loss is that of one
process but for the order of sums (and for dropout: each rank draws its own). With --parallel ddp each keeps the whole
model and optimizer, with fsdp a part. A run may go on with another number of ranks, another --parallel, or one
process (--resume --allow-inexact); nothing that was saved changes by it.

\b
Examples:
  fusedopt train
  fusedopt train --text *.txt --steps 2000 --hidden-size 256 --out runs/mine
  fusedopt train --task translate --patience 3
  fusedopt train --optimizer sgd --lr 0.2 --schedule linear --compare torch
  fusedopt train --config runs/tune/best.json --epochs 2 --batch-size 64 --lr-scaling sqrt
  fusedopt train --clip 0.5 --ema 0.999 --amp bf16
  fusedopt train --dtype bf16 --master split8 --state int8
  fusedopt train --resume
  fusedopt train --backend triton            (without a GPU: interpreted, tiny model)
  torchrun --nproc-per-node 2 -m fusedopt.cli train --parallel fsdp
"""


def _callback(parallel: str | None, resume: bool, overwrite: bool, allow_inexact: bool, **given: Any) -> int:
    for module in ("matplotlib", "rich"):  # missing ones show now, not after the training
        importlib.import_module(module)
    try:
        return train(parallel, given, resume, overwrite, allow_inexact)
    except Reported as error:
        return error.status
    except BadInput as error:
        raise click.UsageError(str(error)) from None
    except (Diverged, Lost) as error:
        click.echo(f"fusedopt: {error}", err=True)
        return 1
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or re.search("out of memory|allocate memory", str(error)):
            remedy = "try a smaller --batch-size, --max-seq-len or --hidden-size"
            raise click.UsageError(f"out of memory: {remedy}") from None
        raise


command = SectionCommand("train", params=OPTIONS, callback=_callback, help=HELP)


def train(parallel: str | None, options: dict[str, Any], resume: bool, overwrite: bool, allow_inexact: bool) -> int:
    """Settle the settings, check everything that can be checked before training, train, and report."""
    from . import job  # these import torch: not for --help
    from .parallel import connected, from_environment
    from .settings import from_options

    ranks = from_environment(parallel, os.environ)
    settled, problem = None, None
    try:
        settled = job.settle(from_options(options), resume, overwrite, allow_inexact, ranks)
    except BadInput as error:
        problem = error
    with connected(ranks):
        ranks.check(problem)
        assert settled is not None
        job.check_agreement(settled)
        return start(settled)


def start(job: Job) -> int:
    """Run with a progress display, then plot and report. The exit status: 0, or 128 + the signal that stopped it."""
    from rich.console import Console

    from . import loop, metrics, plot, progress, summary

    console = Console(quiet=not job.ranks.first)
    for line in [*introduction(job), *(f"not bit-exact: {note}" for note in job.inexact)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    with progress.ProgressView(console, job.config, job.start) as view:
        run = loop.run(job, view)
    seconds = view.seconds

    def conclude() -> None:
        names = {library: trainer.name for library, trainer in run.trainers.items()}
        plot.plot_run(job.folder, metrics.read(job.folder), names, job.config.clip, job.task.unit)
        measured = job.task.report(run.measured) if run.measured else []
        progress.report(console, summary.write(run), measured, job.folder, seconds)
        if run.signal:
            click.echo("fusedopt: stopped; continue with --resume", err=True)

    job.ranks.together(lambda: conclude() if job.ranks.first else None)
    return 128 + run.signal if run.signal else 0


def introduction(job: Job) -> list[str]:
    """What is about to be trained, and how."""
    config, environment, step = job.config, job.environment, job.start
    size = f"hidden size {config.hidden_size}, {config.num_layers} layers, {config.num_heads} heads"
    length = f"{config.max_seq_len} bytes" if config.task == "text" else f"up to {config.max_seq_len} tokens"
    batch = f"batches of {config.batch_size} x {length}"
    kernels = {"eager": "eager backend"}.get(config.backend, f"Triton kernels {environment['kernels']}")
    clip = f", clipped at {config.clip:g}" if config.clip > 0 else ""
    ema = f", weights averaged with decay {config.ema:g}" if config.ema > 0 else ""
    master = f", master weights {config.master}{_rounding(config.master_rounding)}" if config.master != "off" else ""
    state = f", state {config.state}{_rounding(config.state_rounding)}" if config.state != "auto" else ""
    lines = [
        *job.task.describe(config),
        f"model: {size}, {config.dtype}{'' if config.amp == 'off' else ', autocast ' + config.amp}; {batch}",
        f"optimizer: {config.optimizer}, lr {config.lr:g} {config.schedule}{clip}{ema}{master}{state}, "
        f"{kernels} on {environment['processor']}, "
        f"threads: {environment['threads']}",
    ]
    if not job.ranks.alone:
        share = config.batch_size // job.ranks.world
        lines.append(f"ranks: {job.ranks.world}, {job.ranks.mode}; {share} of each batch's rows on each")
    if step == config.steps:
        lines.append(f"already at step {step}: nothing left to train (--overwrite starts anew)")
    elif step:
        lines.append(f"resuming at step {step}")
    return lines


def _rounding(name: str) -> str:
    return "" if name == "none" else f" (rounded {'at random' if name == 'stochastic' else 'to nearest'})"
