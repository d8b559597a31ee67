"""Optimizer state and gradients of the job that `fusedopt train` runs by default on a CPU, kept in memory."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fusedopt.train import text
from fusedopt.train.config import resolve
from fusedopt.train.optimizers import DEFAULTS
from fusedopt.train.trainer import Trainer

SMALLEST = 4096
"""Parameters of fewer elements keep their state in fp32, so they are not recorded."""
GRADIENT_ROWS, STATE_ROWS = 1, 64
"""Rows of each matrix that are kept: of the gradients in every step, of the state where it is taken."""

RUNS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "adamw"},
    "adamw 0.95": {"optimizer": "adamw", "optimizer_args": {"betas": (0.9, 0.95)}},
    "sgd": {"optimizer": "sgd"},
    "lion": {"optimizer": "lion", "lr": 3e-4},
    "rmsprop": {"optimizer": "rmsprop"},
    "adagrad": {"optimizer": "adagrad", "lr": 1e-2},
    "adan": {"optimizer": "adan"},
}
"""Optimizers by name, with what differs from the defaults of `fusedopt train`."""


@dataclass
class Recording:
    """Slots by (step, key): rows of every matrix, each (rows, row length); gradients of fewer: (steps, rows, 128)."""

    run: str
    kinds: dict[str, str]
    slots: dict[tuple[int, str], list[Tensor]] = field(default_factory=dict)
    gradients: Tensor = field(default_factory=lambda: torch.empty(0))
    losses: list[float] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """The steps at which the state was taken."""
        return sorted({step for step, _ in self.slots})


def trainer(run: str, steps: int, seed: int = 0) -> Trainer:
    """A run of the default job on the CPU."""
    return Trainer(resolve({**RUNS[run], "steps": steps, "seed": seed}, "cpu", DEFAULTS), "fusedopt", text.load(()))


def matrices(job: Trainer) -> list[Tensor]:
    """The parameters whose state can be quantised."""
    return [p for p in job.model.parameters() if p.ndim >= 2 and p.numel() >= SMALLEST]


def quantisable(job: Trainer) -> dict[str, str]:
    """Kind by key of the slots that can be quantised, of those that this run keeps."""
    rule: Any = type(job.optimizer).rule  # type: ignore[attr-defined]  # every optimizer of fusedopt has one
    group = job.optimizer.param_groups[0]
    return {
        slot.name: slot.kind
        for slot in rule.state
        if slot.kind in ("signed", "nonnegative") and (slot.when is None or group[slot.when])
    }


def record(run: str, steps: int, seed: int = 0) -> Recording:
    """Train, and take the signed and nonnegative slots early (a tenth), in the middle and at the end."""
    job = trainer(run, steps, seed)
    params = matrices(job)
    taken = Recording(run, quantisable(job))
    gradients = []

    def keep(*_: Any) -> None:
        gradients.append(torch.cat([_some(p.grad, GRADIENT_ROWS)[:, :128] for p in params if p.grad is not None]))

    job.optimizer.register_step_pre_hook(keep)
    for step in range(1, steps + 1):
        taken.losses.append(float(job.step().loss))
        if step in (max(1, steps // 10), steps // 2, steps):
            for key in taken.kinds:
                taken.slots[step, key] = [_some(job.optimizer.state[p][key], STATE_ROWS) for p in params]
    taken.gradients = torch.stack(gradients)
    return taken


def _some(x: Tensor, rows: int) -> Tensor:
    """A copy of some rows, evenly spread."""
    return x.detach().flatten(1)[:: max(1, len(x) // rows)][:rows].float().clone()
