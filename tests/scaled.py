"""Scaled gradients, with overflows where a test wants them: what the tests of mixed precision share."""

from typing import Any

import torch
from compare import give_gradients, make_sparse, parameters, params_of

import fusedopt

STOCK, OURS = torch.amp.GradScaler, fusedopt.GradScaler
SCALERS = (STOCK, OURS)


def adamw(device: str, *shapes: tuple[int, ...], **options: Any) -> Any:
    """An AdamW over parameters of some shapes."""
    return fusedopt.AdamW(parameters(device, *(shapes or ((3, 4), (5,), ()))), **options)


def scale_gradients(step: int, scaler: Any, *optimizers: Any, bad: float | None = None) -> None:
    """The gradients of `train` times the scale; ``bad`` takes the place of an element of the first optimizer's."""
    for optimizer in optimizers:
        params = params_of(optimizer)
        give_gradients(step, params)
        if type(optimizer).__name__ == "SparseAdam":
            make_sparse(step, params)
        for p in params:
            assert p.grad is not None
            p.grad = scaler.scale(p.grad).to(p.grad.dtype)  # two 0-dim tensors give fp32
    if bad is not None:
        values(params_of(optimizers[0])[0].grad).reshape(-1)[:1] = bad


def values(grad: Any) -> torch.Tensor:
    """What a gradient stores."""
    return grad._values() if grad.is_sparse else grad


def bits(optimizer: Any) -> list[Any]:
    """Every bit of parameters, gradients and state, for comparison with later."""
    found: list[Any] = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            grad = [] if p.grad is None else [values(p.grad)]
            found += [p.detach(), *grad, *(x for _, x in sorted(optimizer.state.get(p, {}).items()))]
    return [x.detach().reshape(-1).view(torch.uint8).tolist() if isinstance(x, torch.Tensor) else x for x in found]


def iterate(scaler: Any, *optimizers: Any, unscales: bool = False, clip: float | None = None) -> None:
    """One iteration after backward, as in torch's recipe: unscale and clip if wished, step, update."""
    for optimizer in optimizers:
        if unscales or clip is not None:
            scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(params_of(optimizer), clip)
        scaler.step(optimizer)
    scaler.update()
