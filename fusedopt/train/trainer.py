"""One model with its optimizer, schedule, data position and random state: a training step, and all of its state."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .config import DTYPES, TrainConfig
from .data import Sampler, Text, validation_batches
from .model import Transformer
from .optimizers import describe, make_optimizer, make_schedule, switch_to_average
from .update import AroundStep, InStep, Metrics

AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepRecord:
    """One step as it was issued. The loss may still be under way on the device; times are (start, end).

    metrics: of the optimizer, empty unless asked for.
    """

    step: int
    lr: float
    loss: Tensor
    metrics: Metrics
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
        self.update = (InStep if library == "fusedopt" else AroundStep)(config, self.model, self.optimizer)
        self.schedule = make_schedule(config, self.optimizer)
        self.name = describe(self.optimizer)
        self.rng = rng_state(self.device)
        self.steps_done = 0

    def step(self, measure: bool = False) -> StepRecord:
        """One batch forward and backward, update, schedule. measure: record the optimizer's metrics."""
        set_rng_state(self.rng)
        start = self._mark()
        loss = self._loss(self.model, *self.sampler.next())
        self.update.scale(loss).backward()
        before = self._mark()
        self.update.step()
        after = self._mark()
        metrics = self.update.metrics() if measure else {}
        self.optimizer.zero_grad()
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.schedule.step()
        self.steps_done += 1
        self.rng = rng_state(self.device)
        return StepRecord(self.steps_done, lr, loss.detach(), metrics, (start, after), (before, after))

    def evaluate(self) -> dict[str, float]:
        """Mean cross-entropy over the held-out windows, in nats per byte: of the weights, and of their average."""
        switch_to_average(self.optimizer, True)
        losses = {"val_loss": self._held_out_loss(self.model)}
        switch_to_average(self.optimizer, False)
        if self.config.ema > 0 and self.steps_done:
            with self.update.averaged() as averaged:
                losses["val_loss_ema"] = self._held_out_loss(averaged)
        return losses

    @torch.no_grad()
    def _held_out_loss(self, model: nn.Module) -> float:
        model.eval()
        losses = [(float(self._loss(model, *batch)), len(batch[0])) for batch in self.held_out]
        model.train()
        return math.fsum(loss * n for loss, n in losses) / sum(n for _, n in losses)

    def bytes_per_parameter(self) -> dict[str, float]:
        """What stays in memory, over the number of parameters; state: masters, scales and weight averages too."""
        weights = list(self.model.parameters())
        state = [x for entry in self.optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
        held = {"weights": weights, "gradients": weights, "state": [*state, *self.update.average_weights()]}
        count = sum(p.numel() for p in weights)
        return {name: round(sum(x.nbytes for x in tensors) / count, 3) for name, tensors in held.items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **self.update.state_dict(),
            "schedule": self.schedule.state_dict(),
            "position": self.sampler.position,
            "rng": self.rng,
            "steps_done": self.steps_done,
        }

    def load_state_dict(self, state: dict[str, Any], changed: bool = False) -> None:
        """Continue exactly where `state` was taken; changed: with this trainer's settings instead of the saved ones."""
        self.model.load_state_dict(state["model"])
        own = self._settings_after(state["steps_done"]) if changed else []
        self.optimizer.load_state_dict(state["optimizer"])
        self.update.load_state_dict(state)
        if not changed:
            self.schedule.load_state_dict(state["schedule"])
        for group, settings in zip(self.optimizer.param_groups, own, strict=False):
            params = group["params"]
            group.clear()
            group.update(settings, params=params)
        self.sampler.position = state["position"]
        self.rng = state["rng"]
        self.steps_done = state["steps_done"]

    def _settings_after(self, steps: int) -> list[dict[str, Any]]:
        """Group options of a new optimizer, with learning rates as the schedule has them after some steps."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps
            for _ in range(steps):
                self.schedule.step()
        return [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]

    def _loss(self, model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        dtype = AUTOCAST[self.config.amp]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return model(tokens, targets)

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
