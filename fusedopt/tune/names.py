"""What the options of `fusedopt tune` can be, for its help: nothing here imports torch or Optuna."""

from __future__ import annotations

from typing import Literal

SAMPLERS = ("grid", "random", "tpe", "gp", "cmaes", "pso")
PRUNERS = ("none", "median", "halving", "hyperband")

Direction = Literal["minimize", "maximize"]
OBJECTIVES: dict[str, Direction] = {
    "val_loss_best": "minimize",
    "val_loss_last": "minimize",
    "val_loss_ema_last": "minimize",
    "loss_last": "minimize",
    "chrf_held_out": "maximize",
    "bleu_held_out": "maximize",
}
"""What a run's summary says it is worth, and which way is better."""
