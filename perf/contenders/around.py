"""What users write around an optimizer's step: fp32 copies of bf16 weights, unscaling, clipping, the scale's update."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import utils

from perf.contenders.base import Setup, table
from perf.work import FORMATS, MAX_NORM

Build = Callable[[Sequence[torch.Tensor]], Any]
"""From parameters to their optimizer."""

Clip = Callable[[Sequence[torch.Tensor], float], object]
"""Scales ``p.grad`` in place so that the norm of all is at most the number."""


class Steps:
    """One optimizer and what happens around its step.

    copied: it steps fp32 copies of the parameters, which are then written back. unscales: its step divides by the loss
    scale and skips what is not finite, all on the device; unscaling before it would be done twice.
    """

    def __init__(
        self,
        setup: Setup,
        build: Build,
        copied: bool = False,
        clip: Clip = utils.clip_grad_norm_,
        unscales: bool = False,
    ) -> None:
        self.setup, self.copied, self.clip, self.unscales = setup, copied, clip, unscales
        self.params: list[torch.Tensor] = [p.detach().float() if copied else p for p in setup.params]
        self.optimizer = build(self.params)
        self.scaler = torch.amp.GradScaler(setup.device.type, init_scale=setup.scale, enabled=setup.work.scaled)
        self.one = torch.ones((), device=setup.device)
        self.scaler.scale(self.one)  # it makes its tensors then
        self.grads = [torch.empty_like(p) for p in self.params] if copied else []
        for p, grad in zip(self.params, self.grads, strict=False):
            p.grad = grad

    def step(self) -> None:
        """One step, with all that belongs to the setup's work."""
        if self.copied:  # the cast rounds nothing: fp32 holds every bf16 number
            _copy(self.grads, [p.grad for p in self.setup.params])
        if self.setup.work.scaled:
            self._scaled()
        else:
            if self.setup.work.clip:
                self.clip(self.params, MAX_NORM)
            self.optimizer.step()
        if self.copied:
            with torch.no_grad():
                _copy(self.setup.params, self.params)

    def _scaled(self) -> None:
        if not self.unscales:
            self.scaler.unscale_(self.optimizer)
        if self.setup.work.clip and self.unscales:
            self._clip_scaled()
        elif self.setup.work.clip:
            self.clip(self.params, MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _clip_scaled(self) -> None:
        """As `torch.nn.utils.clip_grad_norm_`, by the norm that gradients will have once they are unscaled."""
        norm = utils.get_total_norm([p.grad for p in self.params if p.grad is not None])
        utils.clip_grads_with_norm_(self.params, MAX_NORM, norm / self.scaler.scale(self.one))


def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor | None]) -> None:
    copy: Any = torch._foreach_copy_  # pyright: ignore[reportPrivateImportUsage] # has no other name
    copy(list(targets), list(sources))


def traffic(copied: bool = False, **steps: float) -> Callable[[str, str], Any]:
    """A `Contender.traffic` from the bytes of a step by itself, for each format.

    Clipping reads gradients for their norm, then reads and writes them; unscaling reads and writes them. copied: bf16
    is fp32 over copies, with a cast of the gradients, 6 B, and of the weights, 6 B.
    """
    rows: dict[tuple[str, str], float] = {}
    for form, step in steps.items():
        grad = FORMATS[form].dtype.itemsize
        rows |= {(form, "step"): step, (form, "clip"): step + 3 * grad, (form, "amp"): step + 5 * grad}
    if copied:
        rows |= {("bf16", work): total + 12 for (form, work), total in list(rows.items()) if form == "fp32"}
    return table(rows)
