"""For `transformers.Trainer`: the norm and the clipping of gradients are the optimizer step's."""

import math
from contextlib import nullcontext
from typing import Any

from ..optimizer import FusedOptimizer
from ..options import FORMAT_VERSION, KEY

TAKEN_OVER = ("_clip_grad_norm", "_get_grad_norm", "_maybe_log_save_evaluate")
"""Private methods of the Trainer."""


class StepClips:
    """Mixin that hands ``max_grad_norm`` to the step: ``class MyTrainer(StepClips, Trainer): pass``.

    The Trainer's own passes over the gradients are left out: each of its steps takes their norm, even with
    ``max_grad_norm=0``, and multiplies them. Here the step does both, gradients stay as they are, ``grad_norm`` in the
    logs is the step's, and NaN where a GradScaler left the step out. With ``max_grad_norm=0`` no norm is taken, or
    logged, unless the optimizer has ``metrics=("grad_norm",)`` or another use for it. ``max_grad_norm`` is read before
    every step, so that neither a resume nor a callback that changes it leaves an old one behind.

    Raises:
        TypeError: when training starts, the optimizer is not one of fusedopt's, or the Trainer is of transformers 4.
        ValueError: likewise, it cannot clip all gradients of the model at once, or has a ``clip_grad_norm`` of its own.
    """

    args: Any
    accelerator: Any
    control: Any
    optimizer: Any
    is_deepspeed_enabled: bool
    is_fsdp_enabled: bool
    _step_clips_for: FusedOptimizer | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; refuses what this class cannot work with."""
        trainer: Any = super()
        made = trainer.create_optimizer(*args, **kwargs)
        optimizer = _unwrapped(made)
        if optimizer is not self._step_clips_for:
            self._refuse(optimizer)
            self._step_clips_for = optimizer
        return made

    def _refuse(self, optimizer: Any) -> None:
        trainer: Any = super()
        if missing := [name for name in TAKEN_OVER if not hasattr(trainer, name)]:
            raise TypeError(
                f"StepClips takes over {missing[0]} of the Trainer, which this one lacks: use transformers 5"
            )
        if not isinstance(optimizer, FusedOptimizer):
            raise TypeError(
                f"StepClips needs an optimizer of fusedopt, got {type(optimizer).__name__}: pass "
                "optimizer_cls_and_kwargs=(fusedopt.AdamW, {'lr': 1e-4}) or optimizers=(optimizer, scheduler)"
            )
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.is_deepspeed_enabled:
            raise ValueError(
                "StepClips: DeepSpeed clips, and steps a part of the model at a time: use the plain Trainer"
            )
        if self.is_fsdp_enabled and getattr(plugin, "fsdp_version", 1) == 1 and optimizer._norm_group is None:
            raise ValueError(
                "StepClips: under FSDP1 a step sees this rank's pieces, not the model's norm: give the optimizer "
                "norm_group=torch.distributed.group.WORLD, or use FSDP2 (fsdp_version=2)"
            )
        if optimizer._release_gradients:
            raise ValueError(
                "StepClips: under release_gradients=True gradients never exist all at once, and have no norm to clip "
                "or to log: use the plain Trainer with max_grad_norm=0"
            )
        own = {group.get(KEY, {}).get("clip_grad_norm") for group in optimizer.param_groups} - {None}
        if other := [limit for limit in own if limit != self.args.max_grad_norm]:
            raise ValueError(
                f"StepClips: clip_grad_norm={other[0]!r} of the optimizer and max_grad_norm="
                f"{self.args.max_grad_norm!r} of the TrainingArguments disagree: leave clip_grad_norm out"
            )

    # ------------------------------------------------------------------------------------------------ a train step
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; tells the optimizer when more is to be added to the gradients."""
        optimizer: FusedOptimizer = _unwrapped(self.optimizer)
        trainer: Any = super()
        with nullcontext() if self.accelerator.sync_gradients else optimizer.accumulate():
            return trainer.training_step(*args, **kwargs)

    def _clip_grad_norm(self, model: Any) -> None:
        """The step clips."""

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        """Called before every step, which is told how to clip; the norm is not known yet."""
        limit = self.args.max_grad_norm if self.args.max_grad_norm > 0 else None
        for group in _unwrapped(self.optimizer).param_groups:
            if limit is not None:
                group.setdefault(KEY, {"version": FORMAT_VERSION})["clip_grad_norm"] = limit
            elif group.get(KEY, {}).pop("clip_grad_norm", None) is not None and group[KEY].keys() == {"version"}:
                del group[KEY]
        return math.nan

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, which passes what `_get_grad_norm` returned, or None where there was no step yet."""
        if grad_norm is not None and self.control.should_log and not self.accelerator.optimizer_step_was_skipped:
            grad_norm = _unwrapped(self.optimizer).metrics().get("grad_norm")
        trainer: Any = super()
        trainer._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)


def _unwrapped(optimizer: Any) -> Any:
    """What accelerate has wrapped."""
    return getattr(optimizer, "optimizer", optimizer)
