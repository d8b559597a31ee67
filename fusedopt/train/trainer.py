"""One model with its optimizer, schedule, data position and random state: a training step, and all of its state."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import DTYPES, TrainConfig
from .data import Sampler, Text, validation_batches
from .model import Transformer
from .optimizers import describe, make_optimizer, make_schedule, switch_to_average


@dataclass(frozen=True)
class StepRecord:
    """One step as it was issued. Loss and norm may still be under way on the device; times are (start, end)."""

    step: int
    lr: float
    loss: Tensor
    grad_norm: Tensor
    step_marks: tuple[Any, Any]
    optimizer_marks: tuple[Any, Any]


class Trainer:
    """A replica of the run. Two of them with one seed draw the same data, weights and dropout, side by side."""

    def __init__(self, config: TrainConfig, library: str, text: Text) -> None:
        self.config, self.library = config, library
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        model = Transformer(config.hidden_size, config.num_layers, config.num_heads, config.max_seq_len, config.dropout)
        self.model = model.to(device=self.device, dtype=getattr(torch, DTYPES[config.dtype]))
        self.sampler = Sampler(text.train, config.batch_size, config.max_seq_len, config.seed)
        self.held_out = validation_batches(text.validation, config.batch_size, config.max_seq_len, config.val_batches)
        self.optimizer = make_optimizer(config, library, self.model)
        self.schedule = make_schedule(config, self.optimizer)
        self.name = describe(self.optimizer)
        self.rng = rng_state(self.device)
        self.steps_done = 0

    def step(self) -> StepRecord:
        """One batch forward and backward, clipping, optimizer, schedule."""
        set_rng_state(self.rng)
        start = self._mark()
        loss = self._loss(*self.sampler.next())
        loss.backward()
        grad_norm = self._clip()
        before = self._mark()
        self.optimizer.step()
        after = self._mark()
        self.optimizer.zero_grad()
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.schedule.step()
        self.steps_done += 1
        self.rng = rng_state(self.device)
        return StepRecord(self.steps_done, lr, loss.detach(), grad_norm, (start, after), (before, after))

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean cross-entropy over the held-out windows, in nats per byte."""
        switch_to_average(self.optimizer, True)
        self.model.eval()
        losses = [(float(self._loss(*batch)), len(batch[0])) for batch in self.held_out]
        self.model.train()
        switch_to_average(self.optimizer, False)
        return math.fsum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "position": self.sampler.position,
            "rng": self.rng,
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.sampler.position = state["position"]
        self.rng = state["rng"]
        self.steps_done = state["steps_done"]

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp == "bf16"):
            return self.model(tokens, targets)

    def _clip(self) -> Tensor:
        """The gradient norm before clipping."""
        if self.config.clip > 0:
            return nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])

    def _mark(self) -> Any:
        """A point in time: on a GPU an event of its stream, so that nothing waits."""
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def milliseconds(marks: tuple[Any, Any]) -> float:
    """Time between two marks; events must have completed."""
    start, end = marks
    return 1e3 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def rng_state(device: torch.device) -> dict[str, Tensor]:
    """State of the generators that initialisation and dropout draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, Tensor]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def largest_difference(first: nn.Module, second: nn.Module) -> tuple[float, str]:
    """The largest |difference| between equal-named parameters, and the name of the parameter."""
    others = dict(second.named_parameters())
    pairs = ((name, p.detach(), others[name].detach()) for name, p in first.named_parameters())
    return max((float((p.double() - q.double()).abs().max()), name) for name, p, q in pairs)
