"""`fusedopt train`: settles the settings, checks the input, trains, and reports."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli import require_interpreter
from .config import DEFAULT_OUT, TrainConfig, override, resolve
from .errors import BadInput, Diverged
from .options import OPTIONS, SectionCommand

if TYPE_CHECKING:
    from .data import Text

HELP = """Train a small decoder-only Transformer on real text, byte by byte.

The text is the source code of Python's standard library on this machine, or your own files. Two CPU cores need
about three minutes; with a GPU the model is larger, the kernels are compiled and the forward pass runs in bf16.

The output folder receives metrics.jsonl (a line per step), loss.png (losses, norms, clipping), checkpoint.pt,
config.json and summary.json.
A run that was stopped, even by kill -9, continues with --resume and ends with the same bits.

\b
Examples:
  fusedopt train
  fusedopt train --text *.txt --steps 2000 --hidden-size 256 --out runs/mine
  fusedopt train --optimizer sgd --lr 0.2 --schedule linear --compare torch
  fusedopt train --clip 0.5 --ema 0.999 --amp bf16
  fusedopt train --dtype bf16 --master split8 --state int8
  fusedopt train --resume
  fusedopt train --backend triton            (without a GPU: interpreted, tiny model)
"""


def _callback(resume: bool, overwrite: bool, allow_inexact: bool, **given: Any) -> int:
    for module in ("matplotlib", "rich"):  # missing ones show now, not after the training
        importlib.import_module(module)
    try:
        return train(given, resume, overwrite, allow_inexact)
    except BadInput as error:
        raise click.UsageError(str(error)) from None
    except Diverged as error:
        click.echo(f"fusedopt: {error}", err=True)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        raise click.UsageError("out of memory: try a smaller --batch-size, --max-seq-len or --hidden-size") from None


command = SectionCommand("train", params=OPTIONS, callback=_callback, help=HELP)


def train(given: dict[str, Any], resume: bool, overwrite: bool, allow_inexact: bool) -> int:
    """Settle the settings, check everything that can be checked before training, train, and report."""
    from . import checkpoint, data  # these import torch: not for --help
    from .optimizers import DEFAULTS, parse_arguments, rule_name

    if resume and overwrite:
        raise BadInput("--resume continues a run, --overwrite starts it anew: choose one")
    given = {name: value for name, value in given.items() if value is not None and value != ()}
    if "optimizer" in given:
        given["optimizer"] = rule_name(given["optimizer"])
    given["optimizer_args"] = parse_arguments(given.get("optimizer_arg", ()))
    given["text"] = tuple(str(Path(name).absolute()) for name in given["text"]) if "text" in given else None
    folder = Path(given.get("out", DEFAULT_OUT))
    given["out"] = str(folder)
    prepare_folder(folder, resume, overwrite)
    saved = checkpoint.load(folder) if resume else None
    device = pick_device(given.pop("device", "auto"), saved["config"] if saved else None)
    if saved:
        config = override(saved["config"], {**given, "device": device})
    else:
        config = resolve(given, device, DEFAULTS)
    if config.backend == "triton" and device == "cpu":
        require_interpreter()
    text = data.load_text(config.text)
    data.check_length(text, config.batch_size, config.max_seq_len)
    environment = checkpoint.describe_environment(config, text.digest)
    inexact = checkpoint.check_continues(saved, config, environment, allow_inexact) if saved else []
    return start(config, text, folder, environment, saved, inexact)


def start(
    config: TrainConfig,
    text: Text,
    folder: Path,
    environment: dict[str, Any],
    saved: dict[str, Any] | None,
    inexact: list[str],
) -> int:
    """Run with a progress display, then plot and report. The exit status: 0, or 128 + the signal that stopped it."""
    from rich.console import Console

    from . import loop, metrics, plot, progress

    console = Console()
    step = saved["step"] if saved else 0
    for line in [*introduction(config, text, environment, step), *(f"not bit-exact: {note}" for note in inexact)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    with progress.ProgressView(console, config, step) as view:
        trainers, stopped_by = loop.run(config, text, folder, environment, saved, view)
    names = {library: trainer.name for library, trainer in trainers.items()}
    plot.plot_run(folder, metrics.read(folder), names, config.clip)
    progress.report(console, loop.summarise(folder, trainers), folder, view.seconds)
    if stopped_by:
        click.echo("fusedopt: stopped; continue with --resume", err=True)
        return 128 + stopped_by
    return 0


def introduction(config: TrainConfig, text: Text, environment: dict[str, Any], step: int) -> list[str]:
    """What is about to be trained, and how."""
    size = f"hidden size {config.hidden_size}, {config.num_layers} layers, {config.num_heads} heads"
    batch = f"batches of {config.batch_size} x {config.max_seq_len} bytes"
    source = "your files" if config.text else "Python's standard library"
    kernels = {"eager": "eager backend"}.get(config.backend, f"Triton kernels {environment['kernels']}")
    clip = f", clipped at {config.clip:g}" if config.clip > 0 else ""
    ema = f", weights averaged with decay {config.ema:g}" if config.ema > 0 else ""
    master = f", master weights {config.master}{_rounding(config.master_rounding)}" if config.master != "off" else ""
    state = f", state {config.state}{_rounding(config.state_rounding)}" if config.state != "auto" else ""
    lines = [
        f"text: {source}, {len(text.train) / 1e6:.2f} MB training + {len(text.validation) / 1e6:.2f} MB validation",
        f"model: {size}, {config.dtype}{'' if config.amp == 'off' else ', autocast ' + config.amp}; {batch}",
        f"optimizer: {config.optimizer}{clip}{ema}{master}{state}, {kernels} on {environment['processor']}, "
        f"threads: {environment['threads']}",
    ]
    if step == config.steps:
        lines.append(f"already at step {step}: nothing left to train (--overwrite starts anew)")
    elif step:
        lines.append(f"resuming at step {step}")
    return lines


def _rounding(name: str) -> str:
    return "" if name == "none" else f" (rounded {'at random' if name == 'stochastic' else 'to nearest'})"


def pick_device(wanted: str, saved: TrainConfig | None) -> str:
    """The device's name: what the user wants, else where the run began, else a GPU when there is one."""
    import torch

    available = torch.cuda.is_available()
    if wanted == "auto":
        wanted = saved.device if saved else "cuda" if available else "cpu"
    if wanted == "cuda" and not available:
        reason = "the checkpoint is of a run on a GPU" if saved and saved.device == "cuda" else "--device cuda"
        raise BadInput(f"{reason}, but PyTorch finds no GPU here")
    return wanted


def prepare_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Create the output folder and see that it can be written; refuse to bury an earlier run."""
    probe = folder / ".writable"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
        if not (resume or overwrite) and any((folder / name).exists() for name in ("checkpoint.pt", "metrics.jsonl")):
            raise BadInput(f"{folder} already holds a run: add --resume or --overwrite, or choose another --out")
    except OSError as error:
        raise BadInput(f"cannot write to output folder {folder}: {error.strerror}") from None
