"""torch.optim.AdamW in its forms, each with what torch's documentation tells to do around it.

bf16 weights that lose nothing are what torch's users write themselves: fp32 copies that are stepped, and copied back.
"""

from collections.abc import Callable
from typing import Any

import torch

from perf.contenders.around import Steps, traffic
from perf.contenders.base import Contender, Setup, Step, table
from perf.work import ADAMW, MAX_NORM

INSTALL = "pip install torch"
MOST_COMPILED = 150
"""Tensors whose updates Inductor compiles in well under a minute."""
MOST_VERSIONS = 200
"""Compiled in one process."""


def plain(**flags: Any) -> Callable[[Setup], Step]:
    """``unscale_``, ``clip_grad_norm_`` and a step, called one after the other."""
    return lambda setup: _steps(setup, flags).step


def compiled(whole: bool) -> Callable[[Setup], Step]:
    """torch.compile of the step, or of clipping and step together, which torch breaks in two graphs before the step."""

    def make(setup: Setup) -> Step:
        from torch._dynamo import config  # takes a second

        # Each optimizer's step is a version of the same function: past the limit, 8, torch would run it as it is.
        config.recompile_limit, config.fail_on_recompile_limit_hit = MOST_VERSIONS, True
        steps = _steps(setup, {"foreach": True})
        if whole:
            return torch.compile(steps.step)
        steps.optimizer.step = torch.compile(steps.optimizer.step)  # also what a scaler calls
        return steps.step

    return make


def _steps(setup: Setup, flags: dict[str, Any]) -> Steps:
    """Over the parameters, or over fp32 copies of bf16 ones.

    Raises:
        ValueError: the step cannot be captured.
    """
    if setup.graph and setup.work.scaled and not flags.get("fused"):
        raise ValueError("not captured: GradScaler.step waits for the device unless the optimizer is fused")
    copied = setup.form.dtype != torch.float32
    return Steps(setup, lambda p: torch.optim.AdamW(p, **ADAMW, **flags, capturable=setup.graph), copied=copied)


def by_grad_scale(setup: Setup) -> Step:
    """The fused kernel divides gradients by ``optimizer.grad_scale``: set to the clipping's divisor times the loss
    scale, it spares both passes. Not documented, but torch's own AMP path, with GradScaler's update of the scale.
    """
    optimizer: Any = torch.optim.AdamW(setup.params, **ADAMW, fused=True, capturable=setup.graph)
    scale = torch.full((), setup.scale, device=setup.device)
    optimizer.found_inf = torch.zeros((), device=setup.device)
    grown = torch.zeros((), dtype=torch.int32, device=setup.device)
    update: Any = torch._amp_update_scale_  # pyright: ignore[reportPrivateImportUsage] # has no other name

    def step() -> None:
        grads = [p.grad for p in setup.params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if setup.work.scaled:
            optimizer.found_inf = (~torch.isfinite(norm)).float()
            optimizer.grad_scale = scale * (norm / scale / MAX_NORM).clamp(min=1.0)
        else:
            optimizer.grad_scale = (norm / MAX_NORM).clamp(min=1.0)
        optimizer.step()
        if setup.work.scaled:
            update(scale, grown, optimizer.found_inf, 2.0, 0.5, 2000)

    return step


PLAIN = {"fp32": "fp32 moments"}
COPIED = {**PLAIN, "bf16": "fp32 copy of the weights, fp32 moments"}


TORCH = (
    Contender("torch for-loop", "torch", INSTALL, plain(foreach=False), COPIED, devices=("cuda", "cpu"),
              most_tensors=5000, traffic=traffic(copied=True, fp32=80)),
    Contender("torch foreach", "torch", INSTALL, plain(foreach=True), COPIED, devices=("cuda", "cpu"), graph=True,
              traffic=traffic(copied=True, fp32=80)),
    Contender("torch fused", "torch", INSTALL, plain(fused=True), COPIED, devices=("cuda", "cpu"), graph=True,
              traffic=traffic(copied=True, fp32=28)),
    Contender("torch fused, clipping by grad_scale", "torch", INSTALL, by_grad_scale, PLAIN, works=("clip", "amp"),
              devices=("cuda", "cpu"), graph=True, traffic=table({("fp32", "clip"): 36, ("fp32", "amp"): 36})),
    Contender("torch.compile of the step", "torch", INSTALL, compiled(False), PLAIN, traffic=traffic(fp32=28),
              most_tensors=MOST_COMPILED),
    Contender("torch.compile of clip + step", "torch", INSTALL, compiled(True), PLAIN, works=("clip",),
              traffic=table({("fp32", "clip"): 40}), most_tensors=MOST_COMPILED),
)  # fmt: skip
