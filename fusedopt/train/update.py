"""From gradients to new parameters: fusedopt's step does all of it, torch.optim's needs others around it.

All of it is: unscale, norm, clip, update, average of the weights, metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import fusedopt

from .config import TrainConfig

Metrics = dict[str, Tensor | float]
"""Numbers by name; tensors may still be under way on the device."""


class Update:
    """The part that both share: the plain step, under a loss scale where there is one."""

    def __init__(self, config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.config, self.model, self.optimizer = config, model, optimizer
        self.scaler = self._make_scaler() if config.amp == "fp16" else None

    def _make_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.config.device)

    def scale(self, loss: Tensor) -> Tensor:
        """What the backward pass starts from."""
        return loss if self.scaler is None else self.scaler.scale(loss)

    def step(self) -> None:
        """Update the parameters, unless their gradients overflowed under a loss scale."""
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def metrics(self) -> Metrics:
        """What is known of the last step, while its gradients are there; waits for no more than the loss scale."""
        return {} if self.scaler is None else {"loss_scale": self.scaler.get_scale()}

    def _norm(self) -> Metrics:
        """The gradient norm, where neither the step needed it nor a loss scale is in the way."""
        if self.scaler is not None:
            return {}
        return {"grad_norm": nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])}

    def average_weights(self) -> list[Tensor]:
        """Averaged weights that are not in the optimizer's state."""
        return []

    def averaged(self) -> AbstractContextManager[nn.Module]:
        """A context that gives the model with averaged weights."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """What the next step and its metrics depend on, besides model and optimizer."""
        return {} if self.scaler is None else {"scaler": self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`; what it does not hold starts anew."""
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])


class InStep(Update):
    """One of fusedopt's optimizers: everything is in its step."""

    optimizer: fusedopt.FusedOptimizer

    def _make_scaler(self) -> torch.amp.GradScaler:
        return fusedopt.GradScaler(self.config.device)

    def metrics(self) -> Metrics:
        found = {**self.optimizer.metrics(), **super().metrics()}
        return found if "grad_norm" in found else {**self._norm(), **found}

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        with self.optimizer.swap_ema():
            yield self.model

    def state_dict(self) -> dict[str, Any]:
        counts = {str(device): tally.clone() for device, tally in self.optimizer._shared.tallies.items()}
        return {**super().state_dict(), "counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        device = next(self.model.parameters()).device
        if state["counts"]:  # the optimizer's own state dict has none; parts on several devices count apart
            self.optimizer._shared.tallies.clear()
            self.optimizer._shared.tally(device).copy_(torch.stack([t.cpu() for t in state["counts"].values()]).sum(0))


class AroundStep(Update):
    """One of torch.optim's: `clip_grad_norm_`, `GradScaler` and `AveragedModel` around its step."""

    def __init__(self, config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(config, model, optimizer)
        self.norm: Tensor | None = None
        self.average = AveragedModel(model, multi_avg_fn=self._renew) if config.ema > 0 else None

    def step(self) -> None:
        if self.config.clip > 0:
            if self.scaler is not None:
                self.scaler.unscale_(self.optimizer)
            self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        if self.average is None:
            super().step()
            return
        before = 0.0 if self.scaler is None else self.scaler.get_scale()
        super().step()
        if self.scaler is None or self.scaler.get_scale() >= before:  # it falls when a step was skipped
            self.average.update_parameters(self.model)

    def metrics(self) -> Metrics:
        if self.norm is None:
            return {**self._norm(), **super().metrics()}
        coefficient = (self.config.clip / (self.norm + 1e-6)).clamp(max=1.0)
        return {"grad_norm": self.norm, "clip_coefficient": coefficient, **super().metrics()}

    def average_weights(self) -> list[Tensor]:
        return [] if self.average is None else list(self.average.module.parameters())

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        assert self.average is not None
        yield self.average.module

    def state_dict(self) -> dict[str, Any]:
        average = {} if self.average is None else {"average": self.average.state_dict()}
        return {**super().state_dict(), **average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.average is not None and "average" in state:
            self.average.load_state_dict(state["average"])

    def _renew(self, averages: Any, weights: Any, _: Any) -> None:
        """As fusedopt with ``ema_warmup``: the decay is at most (1 + n)/(10 + n) after n averaged steps."""
        assert self.average is not None
        n = int(self.average.n_averaged)  # stays on the CPU: reading it waits for nothing
        for average, weight in zip(averages, weights, strict=True):
            average.lerp_(weight, 1.0 - min(self.config.ema, (1 + n) / (10 + n)))
