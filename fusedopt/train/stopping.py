"""Early stopping: a run ends when its validation loss has not improved for some validations in a row."""

from __future__ import annotations

from typing import Any


class Stopping:
    """Watches the validation losses of a run. patience: how many without an improvement end it; 0 = none do."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.best_step, self.best_loss, self.waited = 0, float("inf"), 0

    def see(self, step: int, loss: float) -> bool:
        """A validation after `step` steps; whether it is the best yet."""
        improved = loss < self.best_loss
        if improved:
            self.best_step, self.best_loss = step, loss
        self.waited = 0 if improved else self.waited + 1
        return improved

    @property
    def stops(self) -> bool:
        """Whether the run ends here."""
        return 0 < self.patience <= self.waited

    def state_dict(self) -> dict[str, Any]:
        """What has been seen."""
        return {"best_step": self.best_step, "best_loss": self.best_loss, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self.best_step, self.best_loss, self.waited = state["best_step"], state["best_loss"], state["waited"]
