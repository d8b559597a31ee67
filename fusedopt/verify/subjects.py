"""What is measured: torch.optim's forms and fusedopt's backends, run over a problem step by step."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .formats import DType
from .oracle import Configuration
from .problem import Problem

if TYPE_CHECKING:
    from fusedopt.rule import Rule

TORCH_FORMS: dict[str, dict[str, bool]] = {
    "for-loop": dict(foreach=False, fused=False),
    "foreach": dict(foreach=True),
    "fused": dict(fused=True),
}

Outcome = list[dict[str, list[np.ndarray]]]
"""For every step: slot (or ``"param"``) → one array per tensor, of the dtype's carrier type, complex as pairs."""

MakeOptimizer = Callable[[list[torch.Tensor]], torch.optim.Optimizer]


def torch_forms(rule: str) -> list[str]:
    """Forms in which torch.optim has a rule: none without a class of its name."""
    name = class_name(rule)
    if not hasattr(torch.optim, name):
        return []
    known = inspect.signature(getattr(torch.optim, name)).parameters
    return [form for form in TORCH_FORMS if form == "for-loop" or form in known]


def torch_subject(config: Configuration, form: str) -> MakeOptimizer:
    """torch.optim's class of the same name in one of its forms."""
    cls = getattr(torch.optim, class_name(config.rule))
    known = inspect.signature(cls).parameters
    switches = {key: value for key, value in TORCH_FORMS[form].items() if key in known}
    options: Mapping[str, Any] = {**config.options, **switches}
    return lambda params: cls(params, **options)


def fusedopt_subject(config: Configuration, backend: str) -> MakeOptimizer:
    """fusedopt's class on a backend (``"eager"`` or ``"triton"``)."""
    import fusedopt

    cls = getattr(fusedopt, class_name(config.rule))
    return lambda params: cls(params, **config.options, backend=backend)


def rule_of(name: str) -> Rule:
    """A rule of the library."""
    import fusedopt

    return getattr(fusedopt, class_name(name)).rule


def takes_norms(rule: Rule) -> bool:
    """Whether a step depends on norms over the parameter or its gradient."""
    return bool(rule.n_norms or rule.grad_norm)


def class_name(rule: str) -> str:
    """Public class of a rule, here and in torch.optim."""
    from fusedopt.rules import RULES

    return RULES[rule]


def run(make: MakeOptimizer, problem: Problem, device: str = "cpu") -> Outcome:
    """One optimizer over all steps, parameter and state overwritten in place with the oracle's before each."""
    dtype = problem.dtype
    params = [to_torch(x, dtype, device).requires_grad_() for x in problem.steps[0].params]
    with warnings.catch_warnings():
        # Low-precision state is what is measured here; the advice to keep it in fp32 is for training.
        warnings.simplefilter("ignore")
        optimizer = make(params)
        getattr(optimizer, "train", lambda: None)()  # schedule-free rules step in train mode only
        return [_run_step(optimizer, params, problem, index, device) for index in range(len(problem.steps))]


def _run_step(
    optimizer: torch.optim.Optimizer, params: list[torch.Tensor], problem: Problem, index: int, device: str
) -> dict[str, list[np.ndarray]]:
    case, dtype = problem.steps[index], problem.dtype
    with torch.no_grad():
        for p, value, grad, state in zip(params, case.params, case.grads, case.states, strict=True):
            p.copy_(to_torch(value, dtype, device))
            p.grad = gradient(problem, grad, device)
            for key, slot in state.items():
                optimizer.state[p][key].copy_(to_torch(slot, problem.dtype_of(key), device))
            if state and "step" in optimizer.state[p]:
                optimizer.state[p]["step"] += case.t - 1 - int(optimizer.state[p]["step"])
    optimizer.step()
    return {
        key: [to_numpy(p if key == "param" else optimizer.state[p][key], problem.dtype_of(key)) for p in params]
        for key in problem.slots
    }


def gradient(problem: Problem, x: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """A gradient as the rule takes it."""
    dense = to_torch(x, problem.dtype, device)
    return all_rows(dense) if problem.sparse else dense


def all_rows(dense: torch.Tensor) -> torch.Tensor:
    """The same numbers as a sparse tensor that holds every row."""
    rows = torch.arange(len(dense), device=dense.device)
    return torch.sparse_coo_tensor(rows[None], dense, dense.shape, is_coalesced=True, check_invariants=True)


def to_torch(x: np.ndarray, dtype: DType, device: str = "cpu") -> torch.Tensor:
    """A tensor with exactly these values (they must be representable)."""
    tensor = torch.from_numpy(np.array(x, dtype=dtype.carrier))
    if dtype.parts > 1:
        return torch.view_as_complex(tensor).to(device)
    return tensor.to(getattr(torch, dtype.name)).to(device)


def to_numpy(tensor: torch.Tensor, dtype: DType) -> np.ndarray:
    """The tensor's values, exactly, as an array of the carrier type; complex numbers as pairs."""
    tensor = tensor.detach().cpu()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.to(torch.float64 if dtype.carrier is np.float64 else torch.float32).numpy().copy()
