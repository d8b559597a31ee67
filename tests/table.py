"""The test table: one row per rule configuration, storage format and gradient transform. Tests run over all rows."""

from dataclasses import dataclass, field
from typing import Any

import torch

import fusedopt


@dataclass(frozen=True)
class RuleRow:
    """A rule under one set of options. name: the rule's file; options: keyword arguments of its public class."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    label: str = "plain"

    @property
    def cls(self) -> Any:
        from fusedopt.rules import RULES

        return getattr(fusedopt, RULES[self.name])

    @property
    def torch_cls(self) -> Any:
        return getattr(torch.optim, self.cls.__name__)

    def __str__(self) -> str:
        return f"{self.name}-{self.label}"


RULES = (
    RuleRow("sgd", dict(lr=0.1)),
    RuleRow("sgd", dict(lr=0.1, momentum=0.9, weight_decay=0.01), "momentum"),
    RuleRow("sgd", dict(lr=0.1, momentum=0.9, dampening=0.3, maximize=True), "dampening"),
    RuleRow("sgd", dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), "nesterov"),
    RuleRow("adam", dict(lr=0.01)),
    RuleRow("adam", dict(lr=0.01, weight_decay=0.1, maximize=True), "l2"),
    RuleRow("adam", dict(lr=0.01, amsgrad=True, betas=(0.8, 0.95)), "amsgrad"),
    RuleRow("adamw", dict(lr=0.01, weight_decay=0.1)),
    RuleRow("adamw", dict(lr=0.01, amsgrad=True, maximize=True), "amsgrad"),
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)

FORMATS: dict[str, dict[str, Any]] = {
    "bf16 state": {"state_dtype": {"exp_avg": torch.bfloat16, "momentum_buffer": torch.bfloat16}},
    "split16 weights": {"weights": "split16"},
    "norm and coefficient": {"max_norm": 0.5},
    "skip": {"skip_nonfinite": True},
}
"""Private switches of the engine, one example of every axis; each row joins the tests over all formats."""


def private(optimizer: Any, **options: Any) -> Any:
    """Switch engine options on that no public argument reaches yet."""
    for group in optimizer.param_groups:
        group["fusedopt"] = {"version": 1, **options}
    return optimizer
