"""Rules that torch.optim lacks against well-known packages: the same 50 steps in float64, wherever the forms agree.

Left out, because the package deviates from the paper or its authors' code:

- pytorch_optimizer: Lamb (divides the whole step, not the moment, by 1 − β₁ᵗ and adds ε to its norm), ADOPT with
  decoupled decay (decays on the first step too), NovoGrad with averaging (not on the first step), AdamW without a
  schedule (adds 1e-15 under the root). Its LARS has no ε, so ours takes part at ε = 0.
- adan-pytorch: its first step leaves all moments at zero.
- timm: NvNovoGrad (keeps its second moment in fp32, whatever the parameter).
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from compare import give_gradients, parameters
from table import RuleRow
from tolerances import TOLERANCES

STEPS = 50
SHAPES = ((4, 6), (2, 3, 2), (1, 9))
"""No vectors: some packages treat them as biases."""

SCHEDULE_FREE = dict(warmup_steps=10, r=0.5, weight_lr_power=1.5)
"""Other than the defaults in all that forms the weights of the average."""


def agree(rule: str, device: str, theirs: Callable[..., Any], options: dict[str, Any], other: dict[str, Any]) -> None:
    """Our rule and a package's class take the same steps. other: options by the package's names, or beyond ours."""
    ours = parameters(device, *SHAPES, dtype=torch.float64)
    copies = parameters(device, *SHAPES, dtype=torch.float64)
    optimizers = RuleRow(rule).cls(ours, **options), theirs(copies, **other)
    switch(optimizers, "train")
    for step in range(STEPS):
        give_gradients(step, ours, copies)
        for optimizer in optimizers:
            optimizer.step()
        if step == STEPS // 2:
            switch(optimizers, "eval")
            assert_agree(rule, ours, copies)
            switch(optimizers, "train")
    assert_agree(rule, ours, copies)


def switch(optimizers: tuple[Any, ...], mode: str) -> None:
    """Call ``train`` or ``eval`` of optimizers that have it."""
    for optimizer in optimizers:
        getattr(optimizer, mode, lambda: None)()


def assert_agree(rule: str, ours: list[torch.nn.Parameter], theirs: list[torch.nn.Parameter]) -> None:
    for p, q in zip(ours, theirs, strict=True):
        atol = TOLERANCES["packages"].value * max(1.0, float(q.detach().abs().max()))
        torch.testing.assert_close(p, q, rtol=0, atol=atol, msg=lambda text: f"{rule}: {text}")


def after_first(step: float) -> float:
    """c of ADOPT's authors, who count from the second step."""
    return (step - 1) ** 0.25


@pytest.mark.needs("pytorch_optimizer>=4.1")
def test_pytorch_optimizer(device: str) -> None:
    package = import_module("pytorch_optimizer")

    common = dict(lr=0.01, weight_decay=0.1)
    decoupled, coupled = dict(**common, weight_decouple=True), dict(**common, weight_decouple=False)
    agree("lion", device, package.Lion, common, decoupled)
    lars = dict(lr=1.0, momentum=0.9, weight_decay=0.01, trust_coefficient=0.02)
    agree("lars", device, package.LARS, dict(**lars, eps=0.0), lars)
    agree("lars", device, package.LARS, dict(**lars, eps=0.0, nesterov=True), dict(**lars, nesterov=True))
    agree("novograd", device, package.NovoGrad, common, coupled)
    agree("adan", device, package.Adan, common, coupled)
    agree("adan", device, package.Adan, dict(**common, no_prox=True), decoupled)
    warmup, theirs = dict(beta3_warmup=30, alpha_warmup=30), dict(t_alpha_beta3=30)
    agree("ademamix", device, package.AdEMAMix, dict(**common, alpha=5.0), decoupled)
    agree("ademamix", device, package.AdEMAMix, dict(**common, alpha=5.0, **warmup), dict(**decoupled, **theirs))
    agree("adopt", device, package.ADOPT, common, dict(**coupled, clip_lambda=after_first))
    agree("stable_adamw", device, package.StableAdamW, common, dict(**decoupled, kahan_sum=False))
    average = dict(**common, **SCHEDULE_FREE)
    agree("schedule_free_sgd", device, package.ScheduleFreeSGD, average, average)


@pytest.mark.needs("schedulefree>=1.4.1")
@pytest.mark.parametrize("rule", ["schedule_free_sgd", "schedule_free_adamw"])
def test_schedulefree(rule: str, device: str) -> None:
    cls = getattr(import_module("schedulefree"), RuleRow(rule).cls.__name__)
    for options in ({}, dict(lr=0.1, weight_decay=0.1), dict(lr=0.1, **SCHEDULE_FREE)):
        agree(rule, device, cls, options, dict(**options, foreach=False))


@pytest.mark.needs("torch-optimi>=0.3.3")
def test_optimi(device: str) -> None:
    optimi = import_module("optimi")
    common, plain = dict(lr=0.01, weight_decay=0.1), dict(foreach=False, triton=False)
    agree("lion", device, optimi.Lion, common, dict(**common, **plain))
    agree("adan", device, optimi.Adan, common, dict(**common, **plain, eps=1e-8))
    agree("stable_adamw", device, optimi.StableAdamW, common, dict(**common, **plain, eps=1e-8))


@pytest.mark.needs("lion-pytorch>=0.2.5")
def test_lion_pytorch(device: str) -> None:
    common = dict(lr=0.01, weight_decay=0.1)
    agree("lion", device, import_module("lion_pytorch").Lion, common, common)


@pytest.mark.needs("torch-adopt>=0.1")
@pytest.mark.filterwarnings("ignore:Use _accelerator_graph_capture_health_check", "ignore:.*is_compiling")
def test_torch_adopt(device: str) -> None:
    """The authors' own package."""
    cls = import_module("adopt").ADOPT
    for decay in ({}, dict(weight_decay=0.1), dict(weight_decay=0.1, decouple=True)):
        options = dict(lr=0.01, **decay)
        agree("adopt", device, cls, options, dict(**options, foreach=False))
        agree("adopt", device, cls, dict(**options, clip_exp=None), dict(**options, clip_lambda=None))


@pytest.mark.needs("timm>=1.0.31", "torchvision>=0.20")
def test_timm(device: str) -> None:
    optim = import_module("timm.optim")
    common = dict(lr=0.01, weight_decay=0.1)
    agree("lion", device, optim.Lion, common, common)
    agree("lamb", device, optim.Lamb, common, dict(**common, max_grad_norm=None))
    lars = dict(lr=1.0, momentum=0.9, weight_decay=0.01)
    for more in ({}, dict(dampening=0.3), dict(nesterov=True)):
        ours, theirs = dict(**lars, trust_coefficient=0.02, **more), dict(**lars, trust_coeff=0.02, **more)
        agree("lars", device, optim.Lars, ours, theirs)
    agree("adan", device, optim.Adan, common, common)
    agree("adan", device, optim.Adan, dict(**common, no_prox=True), dict(**common, no_prox=True))
    exponent = dict(**common, clip_exp=0.333)
    agree("adopt", device, optim.Adopt, exponent, exponent)
    agree("adopt", device, optim.Adopt, dict(**exponent, decouple=True), dict(**exponent, decoupled=True))
