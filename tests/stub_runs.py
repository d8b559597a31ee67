"""A stand-in for `train.session.run`: losses by a formula, at once, with the same files and errors."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fusedopt.train import job
from fusedopt.train.errors import BadInput, Diverged
from fusedopt.train.session import Finished

FIRST, BEST_LR = 6.0, {"sgd": 0.1, "adamw": 0.01}


class StubRuns:
    """Called as `session.run`. ran: (settings, folder) of each call. diverges: the rate from which on a run diverges.
    broken: an optimizer that is refused. stop: raised at the start of the run of this number.
    """

    def __init__(self, diverges: float = math.inf, broken: str = "", stop: tuple[int, BaseException] | None = None):
        self.ran: list[tuple[dict[str, Any], Path]] = []
        self.diverges, self.broken, self.stop = diverges, broken, stop

    def __call__(self, settings: dict[str, Any], folder: Path, *, watch: Callable[[list[dict[str, Any]]], None]) -> Any:
        self.ran.append((settings, folder))
        if self.stop and len(self.ran) == self.stop[0]:
            raise self.stop[1]
        config = job.validated(settings)
        if config.optimizer == self.broken:
            raise BadInput(f"{config.optimizer} does not work here")
        rows = [self.row(config, step) for step in range(0, config.steps + 1)]
        diverged = config.lr >= self.diverges
        if diverged:
            del rows[2:]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        watch(rows)
        if diverged:
            raise Diverged("the loss is no longer finite at step 2", 2)
        losses = {row["step"]: row["val_loss"] for row in rows}
        best = min(losses, key=lambda step: losses[step])
        last = list(losses.values())[-1]
        run = {
            "optimizer": "stub", "val_loss_first": FIRST, "val_loss_last": last, "val_loss_best": losses[best],
            "best_step": best, "loss_last": last, "step_ms": 2.0, "optimizer_ms": 0.5, "held_bytes": 3_000_000,
            "peak_bytes": None, "bytes_per_parameter": {}, "measured": {"chrf_held_out": 10 * (FIRST - last)},
        }  # fmt: skip
        summary = {"step": config.steps, "stopped_early": False, "seconds": 1.5, "unit": "byte"}
        return Finished(config, {**summary, "runs": {"fusedopt": run}})

    def row(self, config: Any, step: int) -> dict[str, Any]:
        """The loss falls at a rate that has its maximum at `BEST_LR`; each seed has an offset."""
        off = math.log10(config.lr / BEST_LR.get(config.optimizer, 0.001))
        speed = math.exp(-(off**2)) * (0.5 if config.schedule == "constant" else 1.0)
        offset = random.Random(f"{config.seed} {config.optimizer}").uniform(0.0, 0.1) if step else 0.0
        loss = FIRST * math.exp(-speed * step / config.steps) + offset
        return {"run": "fusedopt", "step": step, "loss": loss, "lr": config.lr, "val_loss": loss}
