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

    @property
    def in_torch(self) -> bool:
        from fusedopt.rules import RULES

        return hasattr(torch.optim, RULES[self.name])

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
    RuleRow("adagrad", dict(lr=0.1)),
    RuleRow("adagrad", dict(lr=0.1, lr_decay=0.1, weight_decay=0.05, initial_accumulator_value=0.3), "lr_decay"),
    RuleRow("rmsprop", dict(lr=0.01)),
    RuleRow("rmsprop", dict(lr=0.01, momentum=0.9, maximize=True), "momentum"),
    RuleRow("rmsprop", dict(lr=0.01, centered=True), "centered"),
    RuleRow("rmsprop", dict(lr=0.01, momentum=0.9, centered=True, weight_decay=0.1), "both"),
    RuleRow("adadelta"),
    RuleRow("adadelta", dict(lr=0.3, rho=0.5, eps=1e-3, weight_decay=0.1, maximize=True), "l2"),
    RuleRow("adamax"),
    RuleRow("adamax", dict(betas=(0.5, 0.6), weight_decay=0.1, maximize=True), "l2"),
    RuleRow("nadam"),
    RuleRow("nadam", dict(weight_decay=0.1, maximize=True), "l2"),
    RuleRow("nadam", dict(weight_decay=0.1, decoupled_weight_decay=True, momentum_decay=0.3), "decoupled"),
    RuleRow("radam"),
    RuleRow("radam", dict(weight_decay=0.1, maximize=True), "l2"),
    RuleRow("radam", dict(weight_decay=0.1, decoupled_weight_decay=True, betas=(0.8, 0.95)), "decoupled"),
    RuleRow("asgd"),
    RuleRow("asgd", dict(lr=0.1, t0=1, lambd=0.1, alpha=0.5, weight_decay=0.1, maximize=True), "averaging"),
    RuleRow("rprop"),
    RuleRow("rprop", dict(etas=(0.3, 1.7), step_sizes=(1e-3, 0.02), maximize=True), "etas"),
    RuleRow("adabelief", dict(lr=0.01, weight_decay=0.1)),
    RuleRow("lion", dict(lr=0.01)),
    RuleRow("lion", dict(lr=0.01, weight_decay=0.1, maximize=True), "decay"),
    RuleRow("lamb", dict(lr=0.01)),
    RuleRow("lamb", dict(lr=0.01, weight_decay=0.01, phi_range=(0.5, 2.0), bias_correction=False), "phi"),
    RuleRow("lars", dict(lr=10.0)),
    RuleRow("lars", dict(lr=10.0, momentum=0.9, dampening=0.3, weight_decay=1e-3), "momentum"),
    RuleRow("lars", dict(lr=10.0, momentum=0.9, nesterov=True, weight_decay=1e-4), "nesterov"),
    RuleRow("novograd", dict(lr=0.1)),
    RuleRow("novograd", dict(lr=0.1, weight_decay=0.01, grad_averaging=True), "averaging"),
    RuleRow("adan", dict(lr=0.01, weight_decay=0.1)),
    RuleRow("adan", dict(lr=0.01, weight_decay=0.1, no_prox=True, maximize=True), "no_prox"),
    RuleRow("ademamix"),
    RuleRow("ademamix", dict(alpha=5.0, beta3_warmup=20, alpha_warmup=25, weight_decay=0.1, maximize=True), "warmup"),
    RuleRow("adopt"),
    RuleRow("adopt", dict(weight_decay=0.01, maximize=True), "l2"),
    RuleRow("adopt", dict(lr=0.01, weight_decay=0.1, decouple=True), "decouple"),
    RuleRow("adopt", dict(clip_exp=None), "unclipped"),
    RuleRow("stable_adamw", dict(lr=0.01)),
    RuleRow("stable_adamw", dict(lr=0.01, weight_decay=0.1, maximize=True), "decay"),
    RuleRow("schedule_free_sgd", dict(lr=0.1)),
    RuleRow("schedule_free_sgd", dict(lr=0.1, momentum=0.95, weight_decay=0.01, warmup_steps=10, r=0.5), "warmup"),
    RuleRow("schedule_free_adamw"),
    RuleRow("schedule_free_adamw", dict(weight_decay=0.1, warmup_steps=10, weight_lr_power=1.5), "warmup"),
)
MATRIX_RULES = (
    RuleRow("adafactor"),
    RuleRow("adafactor", dict(lr=0.05, weight_decay=0.1, maximize=True, d=1.5), "decay"),
    RuleRow("muon", dict(lr=0.02)),
    RuleRow("muon", dict(lr=0.02, adjust_lr_fn="match_rms_adamw", momentum=0.9), "match"),
)
"""Rules with kernels of their own, for matrices; their tests stand in test_adafactor.py and test_muon*.py."""
SPARSE_RULES = (RuleRow("sparse_adam"), RuleRow("sparse_adam", dict(betas=(0.5, 0.6), maximize=True), "maximize"))
"""Rules for sparse gradients alone."""
TORCH_RULES = tuple(row for row in RULES if row.in_torch)
"""Rows that torch.optim can run as well."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)

BASIC: dict[str, dict[str, Any]] = {
    "bf16 state": {"state_dtype": "bfloat16"},
    "split16 weights": {"master_weights": "split16"},
    "norm and coefficient": {"clip_grad_norm": 0.5},
    "skip": {"skip_nonfinite": True},
}
"""Switches of the engine that go together and with parameters of every shape."""
FORMATS: dict[str, dict[str, Any]] = {
    **BASIC,
    "stochastic state": {"state_dtype": "bfloat16", "state_rounding": "stochastic"},
    "int8 state": {"state_dtype": "int8"},
    "float8 state": {"state_dtype": "float8_e4m3", "state_rounding": "stochastic"},
    "int4 state": {"state_dtype": "int4"},
    "fp32 masters": {"master_weights": "float32"},
    "split8 weights": {"master_weights": "split8"},
    "kahan weights": {"master_weights": "kahan"},
    "stochastic weights": {"master_weights": "stochastic"},
}
"""The same and one example of every further format; each row joins the tests over all formats."""


def dtype_for(switches: dict[str, Any]) -> torch.dtype:
    """Dtype of parameters that switches do something to."""
    return torch.bfloat16 if "master_weights" in switches else torch.float32


def shape_for(switches: dict[str, Any], shape: tuple[int, ...] = (3,)) -> tuple[int, ...]:
    """Shape of such a parameter, ``shape`` if it does not matter."""
    return (64, 64) if switches.get("state_dtype") in ("int8", "int4", "float8_e4m3") else shape


def private(optimizer: Any, **options: Any) -> Any:
    """Switch engine options on that no public argument reaches yet."""
    for group in optimizer.param_groups:
        group["fusedopt"] = {"version": 1, **options}
    return optimizer
