"""Weights and optimizer state in parts, one file per rank, as `torch.distributed.checkpoint` writes them under fsdp.

Any number of ranks reads them, one process too. The folder counts once the run's checkpoint names it.
"""

from __future__ import annotations

import os
import shutil
import warnings
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.tensor import DTensor, distribute_tensor

from fusedopt import FusedOptimizer

from .errors import BadInput
from .parallel import Ranks

if TYPE_CHECKING:
    from .trainer import Trainer

PATTERN = "shards-*"


# --------------------------------------------------------------------------------------------------------- files
def save(folder: Path, step: int, trainers: dict[str, Trainer], ranks: Ranks) -> dict[str, Any]:
    """Write the parts of all ranks into a new folder below `folder`: its name, and the CRC-32 of each file in it."""
    path = folder / PATTERN.replace("*", str(step))
    ranks.together(lambda: remove(path) if ranks.first else None)  # of a run that was killed while it saved
    state = {library: {"model": _weights(t), "optimizer": _state_by_name(t)} for library, t in trainers.items()}
    ranks.together(lambda: _write(state, path))
    sums = ranks.together(lambda: {file.name: checksum(file) for file in sorted(path.iterdir())[_share(ranks)]})
    return {"folder": path.name, "checksums": {name: crc for part in ranks.gather(sums) for name, crc in part.items()}}


def _write(state: dict[str, Any], path: Path) -> None:
    try:
        save_parts(state, checkpoint_id=path)
    except CheckpointException as error:  # on all ranks alike
        raise BadInput(f"cannot write {path}: {_reason(error)}") from None


def _share(ranks: Ranks) -> slice:
    """Which of a list of files a rank reads."""
    return slice(ranks.rank, None, ranks.world)


def checksum(file: Path) -> int:
    """CRC-32 of a file, which is on the disk afterwards."""
    crc = 0
    try:
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            while block := stream.read(1 << 20):
                crc = zlib.crc32(block, crc)
    except OSError as error:
        raise BadInput(f"cannot read {file}: {error.strerror}") from None
    return crc


def check(path: Path, checksums: dict[str, int], ranks: Ranks) -> None:
    """Refuse a damaged folder; each rank looks at its share of the files. BadInput on the rank that finds something."""
    for name in sorted(checksums)[_share(ranks)]:
        if checksum(path / name) != checksums[name]:
            raise BadInput(f"checkpoint {path} is damaged (checksum of {name}): delete it to start anew without it")


def remove(path: Path) -> None:
    """Delete a folder of shards, if it is there."""
    try:
        if path.exists():
            shutil.rmtree(path)
    except OSError as error:
        raise BadInput(f"cannot delete {path}: {error.strerror}") from None


def remove_others(folder: Path, kept: str | None) -> None:
    """Delete all shards below `folder` but those that the checkpoint names."""
    for path in folder.glob(PATTERN):
        if path.name != kept:
            remove(path)


# ------------------------------------------------------------------------------------------------------- content
def load(trainer: Trainer, path: Path, partly: bool) -> None:
    """Weights and state of `trainer`, which may have other parts than those that were saved.

    partly: what the folder lacks, because settings changed, starts anew.
    """
    weights = {trainer.library: {"model": _weights(trainer)}}
    _read(weights, path, trainer.ranks, partly=False)
    trainer.model.load_state_dict(weights[trainer.library]["model"])
    materialize(trainer.optimizer)  # after the weights, which averages start from
    state = {trainer.library: {"optimizer": _state_by_name(trainer)}}
    _read(state, path, trainer.ranks, partly)
    read = state[trainer.library]["optimizer"]
    numbers = {name: i for i, name in _names(read["param_groups"]).items()}
    trainer.optimizer.load_state_dict({**read, "state": {numbers[name]: x for name, x in read["state"].items()}})


def _read(state: dict[str, Any], path: Path, ranks: Ranks, partly: bool) -> None:
    """Into the tensors of `state`, in place."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is (disabled|unavailable)")  # by no_dist, as is meant
            planner = DefaultLoadPlanner(allow_partial_load=partly)
            load_parts(state, checkpoint_id=path, planner=planner, no_dist=ranks.alone)
    except CheckpointException as error:
        raise RuntimeError(_reason(error)) from None


def load_whole(trainer: Trainer, state: dict[str, Any]) -> None:
    """As `load`, from the checkpoint of one process or of ddp: every rank has all of it, and takes its parts."""
    weights = _weights(trainer)
    trainer.model.load_state_dict({name: part(x, weights.get(name)) for name, x in state["model"].items()})
    materialize(trainer.optimizer)
    params = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    entries = {
        i: {key: part(x, trainer.optimizer.state[params[i]].get(key)) for key, x in entry.items()}
        for i, entry in state["optimizer"]["state"].items()
    }
    trainer.optimizer.load_state_dict({**state["optimizer"], "state": entries})


def part(x: Any, like: Any) -> Any:
    """`x` spread over the ranks as `like` is. Nothing is sent: gloo would take no int16 and no float8."""
    if not isinstance(like, DTensor):
        return x
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _weights(trainer: Trainer) -> dict[str, Any]:
    return trainer.model.state_dict()


def _state_by_name(trainer: Trainer) -> dict[str, Any]:
    """The optimizer's state dict with names of parameters for their numbers.

    `get_optimizer_state_dict` does so too, but takes a step with optimizers that keep no state, and counts go up.
    """
    packed = trainer.optimizer.state_dict()
    names = _names(packed["param_groups"])
    return {**packed, "state": {names[i]: entry for i, entry in packed["state"].items()}}


def _names(groups: list[dict[str, Any]]) -> dict[int, str]:
    """The names of a state dict's parameters by number."""
    return {i: name for group in groups for i, name in zip(group["params"], group["param_names"], strict=True)}


def materialize(optimizer: torch.optim.Optimizer) -> None:
    """Make the state anew, with all that the first step would make. BadInput for a rule that parts do not do for."""
    assert isinstance(optimizer, FusedOptimizer)  # of torch.optim's classes none is trained under fsdp
    optimizer.state.clear()
    try:
        optimizer.materialize_state()
    except NotImplementedError as error:
        raise BadInput(f"--parallel fsdp: {error}") from None


def _reason(error: CheckpointException) -> str:
    """The first rank's error, in a line."""
    return str(next(iter(error.failures.values()))[0]).splitlines()[0]
