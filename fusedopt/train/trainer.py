"""One model with its optimizer, schedule, data position and random state: a training step, and all of its state."""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import sharded
from .config import DTYPES, TrainConfig
from .optimizers import describe, make_optimizer, make_schedule, schedule_state, switch_to_average
from .parallel import ALONE, Ranks, on_this_rank
from .task import Batch, Task, predictions
from .update import AroundStep, InStep, Metrics

AUTOCAST = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class StepRecord:
    """One step as it was issued. The loss may still be under way on the device; times are (start, end).

    predictions: how many the whole batch has. metrics: of the optimizer, empty unless asked for.
    """

    step: int
    lr: float
    loss: Tensor
    predictions: int
    metrics: Metrics
    step_marks: tuple[Any, Any]
    optimizer_marks: tuple[Any, Any]


class Trainer:
    """A replica of the run. Two of them with one seed draw the same data, weights and dropout, side by side.

    Of several ranks each has its rows of every batch, and draws its own dropout.
    """

    def __init__(self, config: TrainConfig, library: str, task: Task, ranks: Ranks = ALONE) -> None:
        self.config, self.library, self.task, self.ranks = config, library, task, ranks
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = task.model(config).to(device=self.device, dtype=getattr(torch, DTYPES[config.dtype]))
        self.held_out = [self._share(batch) for batch in task.held_out(config)]
        self.wrapped = ranks.wrap(self.model, self.held_out[0][0])
        self.sampler = task.sampler(config, ranks.rows(config.batch_size))
        self.optimizer = make_optimizer(config, library, self.model)
        if ranks.mode == "fsdp":
            sharded.materialize(self.optimizer)
        self.update = (InStep if library == "fusedopt" else AroundStep)(config, self.model, self.optimizer)
        self.schedule = make_schedule(config, self.optimizer, task, ranks)
        self.name = describe(self.optimizer)
        self.steps_done = 0

    def _share(self, batch: Batch) -> tuple[Batch, int]:
        """This rank's rows of a batch, and how many predictions they are; where there is no row one that does not
        count: every rank runs the model equally often, as fsdp needs.
        """
        rows = self.ranks.rows(len(batch[-1]))
        own = tuple(tensor[rows] for tensor in batch)
        return (own, predictions(own)) if rows.stop > rows.start else (tuple(tensor[:1] for tensor in batch), 0)

    def step(self, measure: bool = False) -> StepRecord:
        """One batch forward and backward, update, schedule. measure: record the optimizer's metrics."""
        self._seed_dropout()
        start = self._mark()
        batch, count = self.sampler.next()
        loss = self._weighed(self._loss(self.wrapped, batch), batch, count)
        self.update.scale(loss).backward()
        before = self._mark()
        self.update.step()
        after = self._mark()
        metrics = self.update.metrics() if measure else {}
        self.optimizer.zero_grad()
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.schedule.step()
        self.steps_done += 1
        return StepRecord(self.steps_done, lr, loss.detach(), count, metrics, (start, after), (before, after))

    def evaluate(self) -> dict[str, float]:
        """Mean cross-entropy over the held-out batches, in nats: of the weights, and of their average."""
        switch_to_average(self.optimizer, True)
        losses = {"val_loss": self._held_out_loss(self.model)}
        switch_to_average(self.optimizer, False)
        if self.config.ema > 0 and self.steps_done:
            with self.update.averaged() as averaged:
                losses["val_loss_ema"] = self._held_out_loss(averaged)
        return losses

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """What the task measures of a finished run."""
        self.model.eval()
        measured = self.task.measure(self.model, self.config)
        self.model.train()
        self.ranks.reshard(self.model)
        return measured

    @torch.no_grad()
    def _held_out_loss(self, model: nn.Module) -> float:
        model.eval()
        losses = [(float(self._loss(model, batch)), n) for batch, n in self.held_out]
        model.train()
        self.ranks.reshard(model)
        own = math.fsum(loss * n for loss, n in losses), float(sum(n for _, n in losses))
        total, count = self.ranks.sum(torch.tensor(own, dtype=torch.float64)).tolist()
        return total / count

    def held_bytes(self) -> dict[str, int]:
        """What stays in memory of this rank; state: masters, scales and weight averages too."""
        weights = list(self.model.parameters())
        state = [x for entry in self.optimizer.state.values() for x in entry.values() if isinstance(x, Tensor)]
        held = {"weights": weights, "gradients": weights, "state": [*state, *self.update.average_weights()]}
        return {name: sum(on_this_rank(x).nbytes for x in tensors) for name, tensors in held.items()}

    def state_dict(self, tensors: bool = True) -> dict[str, Any]:
        """Everything that the next step depends on; tensors: weights and optimizer state too."""
        large = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()} if tensors else {}
        return {
            **large,
            **self.update.state_dict(),
            "schedule": self.schedule.state_dict(),
            "position": self.sampler.position,
            "steps_done": self.steps_done,
        }

    def load_state_dict(
        self, state: dict[str, Any], changed: TrainConfig | None = None, shards: Path | None = None
    ) -> None:
        """Continue exactly where `state` was taken; changed: the settings then, which this trainer's now replace.

        shards: where weights and optimizer state are if not in `state`.
        """
        own = self._settings_after(state["steps_done"]) if changed else []
        if shards is not None:
            sharded.load(self, shards, partly=changed is not None)
        elif self.ranks.mode == "fsdp":
            sharded.load_whole(self, state)
        else:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.update.load_state_dict(state)
        for group, settings in zip(self.optimizer.param_groups, own, strict=False):
            params = group["params"]
            group.clear()
            group.update(settings, params=params)
        schedule = schedule_state(changed, self.config, state["schedule"]) if changed else state["schedule"]
        if schedule is not None:
            self.schedule.load_state_dict(schedule)
        self.sampler.position = state["position"]
        self.steps_done = state["steps_done"]

    def _settings_after(self, steps: int) -> list[dict[str, Any]]:
        """Group options of a new optimizer, with learning rates as the schedule has them after some steps."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's steps
            for _ in range(steps):
                self.schedule.step()
        return [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]

    def _seed_dropout(self) -> None:
        """Masks are a function of (seed, step, rank): there is nothing to save, and other ranks have other masks."""
        numbers = self.config.seed, self.steps_done, self.ranks.rank
        torch.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]))

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        dtype = AUTOCAST[self.config.amp]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return model(*(tensor.to(self.device) for tensor in batch))

    def _weighed(self, loss: Tensor, batch: Batch, count: int) -> Tensor:
        """This rank's mean such that the mean over the ranks is that of the whole batch: rows differ in predictions."""
        if self.ranks.alone:
            return loss
        return loss * (predictions(batch) * self.ranks.world / count)

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


def largest_difference(first: nn.Module, second: nn.Module) -> tuple[float, str]:
    """The largest |difference| between equal-named parameters, and the name of the parameter."""
    others = dict(second.named_parameters())
    pairs = ((name, p.detach(), others[name].detach()) for name, p in first.named_parameters())
    return max((float((p.double() - q.double()).abs().max()), name) for name, p, q in pairs)
