"""Gradient norm without kernels: fp64 sums per block, then over blocks in order. Kinds as in ``table.py``."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import table

from . import layout
from .blocks import Lane, Task, Workers, tasks_of
from .ports import Port


def square_sum(x: np.ndarray | Tensor, lane: Lane) -> float:
    """Sum of squares in fp64."""
    if isinstance(x, Tensor):
        return float(x.double().square().sum())
    squares = lane.take(torch.float64, len(x))
    np.copyto(squares, x)
    np.multiply(squares, squares, squares)
    return float(np.add.reduce(squares))


def magnitudes(x: np.ndarray | Tensor, lane: Lane, kind: int) -> float:
    """What a norm sums up of a block, in fp64: squares, magnitudes, or the largest of these (NaN if there is one)."""
    if kind == table.NORM_TWO.value:
        return square_sum(x, lane)
    if not len(x):
        return 0.0
    if isinstance(x, Tensor):
        return float(x.double().abs().sum() if kind == table.NORM_ONE.value else x.double().abs().max())
    found = lane.take(torch.float64, len(x))
    np.abs(x, out=found)
    return float(np.add.reduce(found) if kind == table.NORM_ONE.value else np.max(found))


def join(a: float, b: float, kind: int) -> float:
    """Two partial results as one."""
    return float(np.maximum(a, b)) if kind == table.NORM_INF.value else a + b


class Sums(NamedTuple):
    """Of some gradients: sum of squares (or as a kind says), 1.0 if an element is inf or NaN, sum of each."""

    total: float
    bad: float
    own: list[float]


class Blocks(NamedTuple):
    """Of one gradient: what its blocks sum up to, and whether all elements are finite."""

    sums: list[float]
    finite: bool


def eager_blocks(grads: Sequence[Tensor], workers: Workers, kind: int) -> list[Blocks]:
    """Sums in fp64 of every block of some gradients."""
    flats = [layout.flat(g) for g in grads]
    ports = [Port(g, torch.float64 if g.dtype == torch.float64 else torch.float32) for g in flats]
    tasks = tasks_of([g.numel() for g in flats])
    sums: dict[Task, float] = {}
    finite: dict[Task, bool] = {}

    def block(task: Task, lane: Lane) -> None:
        index, low, high = task
        sums[task] = magnitudes(ports[index].load(low, high, lane), lane, kind)
        # squares of fp64 numbers may overflow, so an infinite sum says only that every element has to be looked at
        finite[task] = math.isfinite(sums[task]) or bool(torch.isfinite(flats[index][low:high]).all())

    workers.run(block, tasks)
    own: list[list[Task]] = [[] for _ in flats]
    for task in tasks:
        own[task.index].append(task)
    return [Blocks([sums[task] for task in few], all(finite[task] for task in few)) for few in own]


def joined(blocks: Sequence[Blocks], kind: int) -> Sums:
    """Block after block."""
    total, own = 0.0, [0.0] * len(blocks)
    for index, (sums, _) in enumerate(blocks):
        for x in sums:
            total = join(total, x, kind)
            own[index] = join(own[index], x, kind)
    return Sums(total, float(not all(finite for _, finite in blocks)), own)


def eager_sums(grads: Sequence[Tensor], workers: Workers, kind: int = table.NORM_TWO.value) -> Sums:
    """Sums in fp64, block after block; the norms agree with the kernels' within one ulp."""
    return joined(eager_blocks(grads, workers, kind), kind)


def norm_of(total: float, wide: bool, kind: int = table.NORM_TWO.value) -> float:
    """The norm, rounded to fp32 once unless ``wide`` (a gradient is fp64) or beyond fp32's range."""
    norm = total if kind != table.NORM_TWO.value or total != total else math.sqrt(total)
    narrow = float(np.float32(norm))
    return norm if wide or narrow == math.inf else narrow


def clip_coefficient(norm: float, limit: float) -> float:
    """min(1, limit / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_; no threshold is an infinite one."""
    ratio = limit / (norm + 1e-6)
    return 1.0 if ratio >= 1.0 or limit == math.inf else ratio
