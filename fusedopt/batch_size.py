"""Hyper-parameters for another batch size. With κ = new/old:

    linear    lr ← κ·lr      SGD. Goyal et al. (2017), arXiv:1706.02677
    sqrt      lr ← √κ·lr     Krizhevsky (2014), arXiv:1404.5997; Adam: Malladi et al. (2022), arXiv:2205.10287

For Adam the latter also take 1 − β ← κ·(1 − β) for both betas and ε ← ε/√κ.
"""

import difflib
import math
from numbers import Integral
from typing import Any

from .arguments import check_beta_range, check_nonnegative

POWERS = {"linear": 1.0, "sqrt": 0.5}
"""lr grows with this power of the batch size."""


def scale_lr(lr: float, old_batch_size: int, new_batch_size: int, rule: str = "sqrt") -> float:
    """The learning rate for another batch size: 0.0005 from 128 to 1024 gives 0.001414.

    rule: "sqrt", for Adam and its kin; "linear", for SGD.

    Raises:
        ValueError: an unknown rule, a negative lr, a batch size below 1. TypeError: what is no number.
    """
    if rule not in POWERS:
        close = difflib.get_close_matches(str(rule), POWERS, n=1)
        raise ValueError(
            f"rule must be {' or '.join(POWERS)}, got {rule!r}{f': did you mean {close[0]}?' if close else ''}"
        )
    check_nonnegative("lr", lr)
    if lr == math.inf:
        raise ValueError("Invalid lr value: inf; it must be finite")
    return lr * _ratio(old_batch_size, new_batch_size) ** POWERS[rule]


def scale_adam(
    lr: float,
    old_batch_size: int,
    new_batch_size: int,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> dict[str, Any]:
    """lr, betas and eps of Adam for another batch size, as arguments of the optimizer.

    Raises:
        ValueError: numbers out of range; a batch so much larger that a beta would be negative. TypeError: no numbers.
    """
    check_beta_range(betas)
    check_nonnegative("eps", eps)
    ratio = _ratio(old_batch_size, new_batch_size)
    scaled = tuple(1.0 - ratio * (1.0 - beta) for beta in betas)
    if min(scaled) < 0.0:
        raise ValueError(
            f"betas {betas} have no counterpart at {ratio:g} times the batch size: {min(betas)} would become "
            f"{min(scaled):g}; use scale_lr, or betas closer to 1"
        )
    return dict(lr=scale_lr(lr, old_batch_size, new_batch_size), betas=scaled, eps=eps / math.sqrt(ratio))


def _ratio(old: int, new: int) -> float:
    for name, size in (("old_batch_size", old), ("new_batch_size", new)):
        if not isinstance(size, Integral) or isinstance(size, bool):
            raise TypeError(f"{name} must be an integer, got {size!r}")
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    return new / old
