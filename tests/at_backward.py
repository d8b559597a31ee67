"""Optimizers that take norms in backward, beside two-pass ones: what their tests share."""

from collections.abc import Sequence
from typing import Any

import torch
from compare import params_of, uniform
from torch import Tensor

import fusedopt
from fusedopt_kernels import launch

SHAPES = ((33, 7), (5,), (), (0,), (40000,))
"""The last has three partials."""
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
OPTION = "norm_at_backward"


def optimizer_of(device: str, cls: Any = fusedopt.AdamW, dtypes: Any = (torch.float32,), **options: Any) -> Any:
    params = [torch.nn.Parameter(t) for dtype in dtypes for t in uniform(SHAPES, device, dtype, 0)]
    return cls(params, **{"lr": 0.1, "clip_grad_norm": 0.5, **options})


def both(device: str, **options: Any) -> tuple[Any, Any]:
    """Norms at backward, and the two-pass step."""
    return optimizer_of(device, **{OPTION: True, **options}), optimizer_of(device, **options)


def backward(step: int, params: Sequence[Tensor], scale: float | Tensor = 1.0) -> None:
    """Gradients between −1 and 1 that depend on the step's number alone, times a scale."""
    losses = []
    for i, p in enumerate(params):
        g = uniform([tuple(p.shape)], str(p.device), p.dtype, 1000 * step + i)[0]
        losses.append((p * (g * scale).to(p.dtype)).sum())
    torch.autograd.backward(losses)


def train(steps: Sequence[int], *optimizers: Any) -> None:
    for step in steps:
        for optimizer in optimizers:
            optimizer.zero_grad()
            backward(step, params_of(optimizer))
            optimizer.step()


class Launches(launch.Launcher):
    """Names of what was launched."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def run(self, spec: launch.KernelSpec, grid: int, args: Any) -> None:
        self.names.append(spec.name)
        super().run(spec, grid, args)
