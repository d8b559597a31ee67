"""Gradient norm without kernels: fp64 sums per block, then over blocks in order."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import layout
from .blocks import Lane, Port, Task, Workers, tasks_of


def square_sum(x: np.ndarray | Tensor, lane: Lane) -> float:
    """Sum of squares in fp64."""
    if isinstance(x, Tensor):
        return float(x.double().square().sum())
    squares = lane.take(torch.float64, len(x))
    np.copyto(squares, x)
    np.multiply(squares, squares, squares)
    return float(np.add.reduce(squares))


class Sums(NamedTuple):
    """Of some gradients: sum of squares, 1.0 if an element is inf or NaN, sum of squares of each."""

    square: float
    bad: float
    own: list[float]


def eager_sums(grads: Sequence[Tensor], workers: Workers) -> Sums:
    """Sums in fp64, block after block; the norms agree with the kernels' within one ulp."""
    flats = [layout.flat(g) for g in grads]
    ports = [Port(g, torch.float64 if g.dtype == torch.float64 else torch.float32) for g in flats]
    tasks = tasks_of([g.numel() for g in flats])
    sums: dict[Task, float] = {}
    finite: dict[Task, bool] = {}

    def block(task: Task, lane: Lane) -> None:
        index, low, high = task
        sums[task] = square_sum(ports[index].load(low, high, lane), lane)
        # squares of fp64 numbers may overflow, so an infinite sum says only that every element has to be looked at
        finite[task] = math.isfinite(sums[task]) or bool(torch.isfinite(flats[index][low:high]).all())

    workers.run(block, tasks)
    total, own = 0.0, [0.0] * len(flats)
    for task in tasks:
        total += sums[task]
        own[task.index] += sums[task]
    return Sums(total, float(not all(finite.values())), own)


def norm_of(square: float, wide: bool) -> float:
    """Root, rounded to fp32 once unless ``wide`` (a gradient is fp64) or beyond fp32's range."""
    norm = math.sqrt(square) if square == square else math.nan
    narrow = float(np.float32(norm))
    return norm if wide or narrow == math.inf else narrow


def clip_coefficient(norm: float, limit: float) -> float:
    """min(1, limit / (norm + 1e-6)), as torch.nn.utils.clip_grad_norm_; no threshold is an infinite one."""
    ratio = limit / (norm + 1e-6)
    return 1.0 if ratio >= 1.0 or limit == math.inf else ratio
