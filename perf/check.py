"""Whether a contender does what it is timed for: three steps against AdamW in float64."""

from collections.abc import Sequence

import numpy as np
import torch

from perf.contenders.base import Contender, Setup
from perf.work import ADAMW, MAX_NORM, Format, Work

SHAPES = ((), (7,), (1000,), (64, 128), (96, 200), (3, 5, 7))
"""Two that quantised state takes, one of them with rows that are no whole groups."""
SIZES = (1.0, 2e-3, 1.0)
"""Of gradients that are clipped. The norm of the second is a third, to be left alone; with the loss scale it is not."""
STEPS = len(SIZES)
SCALE = 1024.0
ALONE = 5
"""How many times the tolerance one tensor may be off."""
DECAY = 0.6
"""Largest share by which weight decay may be off; of 4-bit moments a third is noise."""


def error(contender: Contender, form: Format, work: Work, device: str) -> float:
    """‖p − p*‖ / ‖p* − p₀‖ over all parameters after `STEPS` steps; inf or NaN when they are no numbers. p* is rounded
    to the parameters' dtype. A last step of scaled work has gradients that are not finite, and must be skipped.

    Raises:
        ArithmeticError: weight decay is lost, which the contender's tolerance hides.
    """
    generator = torch.Generator().manual_seed(0)
    begin = [(0.02 * torch.randn(shape, generator=generator)).to(form.dtype) for shape in SHAPES]
    params = [torch.nn.Parameter(p.to(device, copy=True)) for p in begin]
    grads = [
        [(size * torch.randn(shape, generator=generator)).to(form.dtype) for shape in SHAPES]
        for size in (SIZES if work.clip else [1.0] * STEPS)
    ]
    scale = SCALE if work.scaled else 1.0
    skipped = [[torch.full_like(grad, torch.inf) for grad in grads[0]]] if work.scaled else []
    for p in params:
        p.grad = torch.zeros_like(p)
    step = contender.make(Setup(params, form, work, scale))
    for given in grads + skipped:
        for p, grad in zip(params, given, strict=True):
            p.grad = (grad * scale).to(device)
        step()
    found, exact = [p.detach() for p in params], reference(begin, grads, work)
    rounded = [_wide(torch.tensor(e).to(form.dtype)) for e in exact]
    off = distance(begin, found, rounded)
    each = [distance([b], [f], [r]) for b, f, r in zip(begin, found, rounded, strict=True)]
    off = max(off, max(each) / ALONE)  # or tensors of few elements could be left out
    decay = 1 - _decay_off(begin, found, exact)
    if off <= contender.tolerance(form) and abs(1 - decay) > DECAY:
        raise ArithmeticError(f"weight decay is {decay:.0%} of what it should be")
    return off


def distance(begin: Sequence[torch.Tensor], found: Sequence[torch.Tensor], exact: Sequence[np.ndarray]) -> float:
    """Root of the squares of all errors, to that of all changes."""
    wrong = sum(float(((_wide(p) - e) ** 2).sum()) for p, e in zip(found, exact, strict=True))
    moved = sum(float(((e - _wide(b)) ** 2).sum()) for b, e in zip(begin, exact, strict=True))
    return (wrong / moved) ** 0.5


def _decay_off(begin: Sequence[torch.Tensor], found: Sequence[torch.Tensor], exact: Sequence[np.ndarray]) -> float:
    """Share of the decay that is missing: what of the error points from zero to the first weights. Roundings do not."""
    error = sum(float(((_wide(p) - e) * _wide(b)).sum()) for b, p, e in zip(begin, found, exact, strict=True))
    squares = sum(float((_wide(b) ** 2).sum()) for b in begin)
    return error / squares / (STEPS * ADAMW["lr"] * ADAMW["weight_decay"])


def reference(begin: Sequence[torch.Tensor], grads: Sequence[Sequence[torch.Tensor]], work: Work) -> list[np.ndarray]:
    """AdamW of Loshchilov & Hutter, Algorithm 2, with ε outside the root, in float64."""
    lr, (beta1, beta2), eps, decay = (ADAMW[name] for name in ("lr", "betas", "eps", "weight_decay"))
    params = [_wide(p) for p in begin]
    m, v = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
    for t, given in enumerate(grads, 1):
        wide = [_wide(g) for g in given]
        norm = sum(float((g**2).sum()) for g in wide) ** 0.5
        clip = min(1.0, MAX_NORM / (norm + 1e-6)) if work.clip else 1.0
        for i, g in enumerate(wide):
            g = clip * g
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            direction = m[i] / (1 - beta1**t) / (np.sqrt(v[i] / (1 - beta2**t)) + eps)
            params[i] = params[i] * (1 - lr * decay) - lr * direction
    return params


def _wide(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().double().numpy()
