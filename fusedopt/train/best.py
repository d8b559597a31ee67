"""The weights of the best validation so far, in a file of their own beside the checkpoint that names their step."""

from __future__ import annotations

import io
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor

from . import sharded
from .errors import BadInput
from .files import write_atomically

if TYPE_CHECKING:
    from .trainer import Trainer

PATTERN = "best-*.pt"


def path(folder: Path, step: int) -> Path:
    """Where the weights after `step` steps are."""
    return folder / PATTERN.replace("*", str(step))


def save(trainer: Trainer, folder: Path, step: int) -> None:
    """Write the weights, whole, on rank 0; every rank calls this."""
    weights = {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in trainer.model.state_dict().items()}
    buffer = io.BytesIO()
    if trainer.ranks.first:
        torch.save(weights, buffer)
    trainer.ranks.together(
        lambda: write_atomically(path(folder, step), buffer.getvalue()) if trainer.ranks.first else None
    )


def restore(trainer: Trainer, folder: Path, step: int) -> None:
    """Put the weights back into the model; the optimizer's state stays what it is at the end of the run."""
    file = path(folder, step)
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
        own = trainer.model.state_dict()
        trainer.model.load_state_dict({name: sharded.part(x, own.get(name)) for name, x in weights.items()})
    except FileNotFoundError:
        raise BadInput(f"{file}, the best weights of this run, is gone: --overwrite starts anew") from None
    except Exception:  # as in checkpoint.load
        raise BadInput(f"{file}, the best weights of this run, is damaged: --overwrite starts anew") from None


def remove_others(folder: Path, step: int) -> None:
    """Delete all but the weights after `step` steps."""
    for file in folder.glob(PATTERN):
        if file != path(folder, step):
            with suppress(OSError):  # a stale file is no harm: the checkpoint names the right one
                file.unlink()
