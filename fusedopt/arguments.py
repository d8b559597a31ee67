"""Checks of hyper-parameters, with torch.optim's error types and words where torch has them."""

from collections.abc import Sequence
from numbers import Real
from typing import Any

import torch


def check_number(name: str, value: Any) -> None:
    """A number or a tensor."""
    if not isinstance(value, Real | torch.Tensor):
        raise TypeError(f"{name} must be a number or a one-element tensor, got {value!r}")


def check_lr(
    lr: float | torch.Tensor, foreach: bool | None = None, capturable: bool = True, positive: bool = False
) -> None:
    """lr ≥ 0, or > 0; a tensor has one element and is not combined with ``foreach=True`` unless capturable."""
    if isinstance(lr, torch.Tensor):
        if foreach and not capturable:
            raise ValueError("lr as a Tensor is not supported for capturable=False and foreach=True")
        if lr.numel() != 1:
            raise ValueError("Tensor lr must be 1-element")
    check_number("lr", lr)
    if not (lr > 0.0 if positive else lr >= 0.0):
        raise ValueError(f"Invalid learning rate: {lr}; it must be {'above' if positive else 'at least'} 0")


def check_nonnegative(name: str, value: float | torch.Tensor) -> None:
    """value ≥ 0 (NaN is refused)."""
    check_number(name, value)
    if not value >= 0.0:
        raise ValueError(f"Invalid {name} value: {value}; it must be at least 0")


def check_at_least(name: str, value: float | torch.Tensor, least: float = 0) -> None:
    """value ≥ least, in the words of torch.optim's newer classes."""
    check_number(name, value)
    if not value >= least:
        raise ValueError(f"{name} should be >= {least} but is: {value}")


def check_positive(name: str, value: float | torch.Tensor) -> None:
    """value > 0."""
    check_number(name, value)
    if not value > 0.0:
        raise ValueError(f"Invalid {name} value: {value}; it must be above 0")


def check_unit(name: str, value: float | torch.Tensor) -> None:
    """0 ≤ value ≤ 1."""
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"Invalid {name} value: {value}; it must lie in [0, 1]")


def check_pair(name: str, pair: Any, entries: tuple[str, str]) -> None:
    """Two numbers, in a tuple or list; ``entries`` name them in errors."""
    if not isinstance(pair, tuple | list):
        raise TypeError(f"{name} must be a pair ({', '.join(entries)}), got {pair!r}")
    if len(pair) != 2:
        raise ValueError(f"{name} must be a pair ({', '.join(entries)}), got {len(pair)} values")
    for i, value in enumerate(pair):
        check_number(f"{name}[{i}]", value)


def check_beta_range(betas: tuple[Any, Any]) -> None:
    """A pair of numbers in [0, 1)."""
    check_pair("betas", betas, ("beta1", "beta2"))
    _check_decay_rates(betas)


def check_three_betas(betas: tuple[Any, Any, Any]) -> None:
    """Three numbers in [0, 1)."""
    if not isinstance(betas, tuple | list) or len(betas) != 3:
        raise ValueError(f"betas must be three numbers (beta1, beta2, beta3), got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta)
    _check_decay_rates(betas)


def _check_decay_rates(betas: Sequence[Any]) -> None:
    for i, beta in enumerate(betas):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta}; it must lie in [0, 1)")


def check_betas(betas: tuple[Any, Any], foreach: bool | None, capturable: bool) -> tuple[Any, Any]:
    """Both in [0, 1), both floats or both one-element tensors; returns them with tensors as 0-dim."""
    check_beta_range(betas)
    kinds = {isinstance(beta, torch.Tensor) for beta in betas}
    if len(kinds) != 1 or (kinds == {False} and not all(isinstance(beta, float) for beta in betas)):
        raise ValueError("betas must be either both floats or both Tensors")
    for i, beta in enumerate(betas):
        if isinstance(beta, torch.Tensor):
            if foreach and not capturable:
                raise ValueError(f"betas[{i}] as a Tensor is not supported for capturable=False and foreach=True")
            if beta.numel() != 1:
                raise ValueError(f"Tensor betas[{i}] must be 1-element")
    first, second = (b.squeeze() if isinstance(b, torch.Tensor) and b.dim() else b for b in betas)
    return first, second


def check_flags(foreach: Any, fused: Any, differentiable: Any) -> None:
    """Implementation flags are checked as torch checks them and then select nothing; differentiable is refused."""
    if fused and differentiable:
        raise RuntimeError("`fused` does not support `differentiable`")
    if fused and foreach:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if differentiable:
        raise RuntimeError(
            "differentiable=True is not supported: fusedopt's step runs outside autograd; use torch.optim for it"
        )


def check_backend(backend: str) -> None:
    """One of auto, triton, eager."""
    if backend not in ("auto", "triton", "eager"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'eager', got {backend!r}")


def check_given(name: str, value: Any) -> None:
    """What a step is given: None, a number of at least 0 (or NaN), or a one-element fp32 or fp64 tensor."""
    if value is None:
        return
    check_number(name, value)
    if isinstance(value, torch.Tensor):
        if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"{name} must be a number or a one-element float32 or float64 tensor, got {value.dtype} of shape "
                f"{tuple(value.shape)}"
            )
    elif value < 0.0 or (value == 0.0 and name == "grad_scale"):
        raise ValueError(
            f"Invalid {name} value: {value}; it must be {'above' if name == 'grad_scale' else 'at least'} 0"
        )


def own(optimizer: Any) -> Any:
    """The optimizer itself, where Lightning or Fabric call through a wrapper of a class that they derive from ours."""
    return vars(optimizer).get("_optimizer", optimizer)
