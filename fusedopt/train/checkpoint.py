"""The checkpoint of a run: written atomically, read back only when it is whole and this run continues it exactly."""

from __future__ import annotations

import io
import os
import zipfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import fusedopt

from . import sharded
from .config import STRUCTURE, TrainConfig, differences, from_dict
from .errors import BadInput
from .files import write_atomically
from .parallel import Ranks

if TYPE_CHECKING:
    from .job import Job
    from .trainer import Trainer

FILE_NAME = "checkpoint.pt"
FORMAT = 2
KEYS = {"format", "step", "config", "environment", "runs", "stopping"}


def save(job: Job, step: int, trainers: dict[str, Trainer], stopping: dict[str, Any]) -> None:
    """Write the checkpoint of a run, on every rank at once. stopping: state of early stopping.

    It is one file, with the states of `trainers` by "fusedopt" (and "torch"). Under fsdp weights and optimizer state
    lie in shards beside it, which are whole on the disk before the file names them.
    """
    ranks = job.ranks
    shards = sharded.save(job.folder, step, trainers, ranks) if ranks.mode == "fsdp" else None
    ranks.together(lambda: _write(job, step, trainers, shards, stopping) if ranks.first else None)


def _write(
    job: Job, step: int, trainers: dict[str, Trainer], shards: dict[str, Any] | None, stopping: dict[str, Any]
) -> None:
    runs = {library: trainer.state_dict(tensors=shards is None) for library, trainer in trainers.items()}
    content = {"format": FORMAT, "step": step, "config": job.config.as_dict(), "environment": job.environment}
    buffer = io.BytesIO()
    torch.save({**content, "runs": runs, "shards": shards, "stopping": stopping}, buffer)
    write_atomically(job.folder / FILE_NAME, buffer.getvalue())
    sharded.remove_others(job.folder, shards["folder"] if shards else None)


def load(folder: Path) -> dict[str, Any] | None:
    """The checkpoint of `folder`, with "config" as a TrainConfig; None when there is none, BadInput when damaged."""
    path = folder / FILE_NAME
    if not path.exists():
        return None
    remedy = "delete it to start anew without it"
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load itself checks no checksum
            damaged = archive.testzip()
        if damaged:
            raise BadInput(f"checkpoint {path} is damaged (checksum of {damaged}): {remedy}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise BadInput(f"cannot read checkpoint {path}: {error.strerror or error}") from None
    except BadInput:
        raise
    except Exception:  # a damaged archive fails in a dozen ways, from BadZipFile to struct.error
        raise BadInput(f"checkpoint {path} is damaged or not a checkpoint: {remedy}") from None
    if isinstance(content, dict) and content.get("format", FORMAT) != FORMAT:
        raise BadInput(f"checkpoint {path} has format {content['format']}, this version reads format {FORMAT}")
    if not isinstance(content, dict) or not content.keys() >= KEYS:
        raise BadInput(f"{path} is not a checkpoint of fusedopt train: {remedy}")
    try:
        content["config"] = from_dict(content["config"])
    except (KeyError, TypeError):
        raise BadInput(f"checkpoint {path} lacks settings of this version: {remedy}") from None
    return content


def remove(folder: Path) -> None:
    """Delete the checkpoint of `folder`, if it has one."""
    path = folder / FILE_NAME
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise BadInput(f"cannot delete {path}: {error.strerror}") from None
    sharded.remove_others(folder, None)


def check_shards(folder: Path, saved: dict[str, Any], ranks: Ranks) -> None:
    """Refuse shards that are not what the checkpoint of `folder` names; every rank looks at some of them."""
    if shards := saved.get("shards"):
        sharded.check(folder / shards["folder"], shards["checksums"], ranks)


def restore(trainer: Trainer, saved: dict[str, Any], folder: Path) -> None:
    """Load one trainer's state; BadInput when the checkpoint of `folder` does not hold what it should."""
    shards = saved.get("shards")
    try:
        trainer.load_state_dict(
            saved["runs"][trainer.library],
            changed=saved["config"] if differences(saved["config"], trainer.config) else None,
            shards=folder / shards["folder"] if shards else None,
        )
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"checkpoint {folder / FILE_NAME} does not fit this version: {reason}") from None


def describe_environment(config: TrainConfig, digest: str, ranks: Ranks) -> dict[str, Any]:
    """What, besides the settings, the bits of a run depend on."""
    gpu = config.device != "cpu"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    kernels = "none (eager)" if config.backend == "eager" else "interpreted" if interpreted else "compiled"
    processor = torch.cuda.get_device_name() if gpu else f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    versions = {"fusedopt": fusedopt.__version__, **{name: metadata.version(name) for name in ("torch", "numpy")}}
    versions["triton"] = "none" if config.backend == "eager" else metadata.version("triton")
    return {
        "data": digest,
        "ranks": str(ranks),
        "threads": torch.get_num_threads(),
        "processor": processor,
        "kernels": kernels,
        **{f"version of {package}": version for package, version in versions.items()},
    }


def check_continues(
    saved: dict[str, Any], config: TrainConfig, environment: dict[str, Any], allow_inexact: bool
) -> list[str]:
    """Raise BadInput unless this run continues the checkpoint; the differences that `allow_inexact` let pass."""
    structure = differences(saved["config"], config, STRUCTURE)
    if structure:
        raise BadInput(f"the checkpoint does not fit: {'; '.join(structure)}; leave these out or use another --out")
    if saved["step"] > config.steps:
        raise BadInput(f"the checkpoint is at step {saved['step']}, past --steps {config.steps}")
    inexact = differences(saved["config"], config)
    for name, now in environment.items():
        before = saved["environment"].get(name)
        if before != now:
            inexact.append("the data has changed" if name == "data" else f"{name} was {before}, now {now}")
    if inexact and not allow_inexact:
        remedy = "restore these (threads: OMP_NUM_THREADS), or add --allow-inexact"
        raise BadInput(f"resuming would not be bit-exact: {'; '.join(inexact)}: {remedy}")
    return inexact
