"""The torch.optim face: arguments, errors, groups, closures and gradients are those of torch's classes."""

import inspect
from typing import Any

import pytest
import torch
from compare import (
    BACKENDS,
    EACH,
    IN_TORCH,
    assert_close,
    assert_equal,
    contents,
    give_gradients,
    parameters,
    parameters_of,
    reference,
    train,
)  # fmt: skip
from table import RuleRow

import fusedopt

CLASSES = tuple(row.cls.__name__ for row in EACH)
DENSE = tuple(row for row in EACH if row.cls.rule.sparse != "only")


def classes(name: str) -> tuple[Any, Any]:
    return getattr(fusedopt, name), getattr(torch.optim, name)


def takes(name: str, *options: str) -> bool:
    """Whether torch's class has these arguments."""
    return set(options) <= set(inspect.signature(getattr(torch.optim, name)).parameters)


@pytest.mark.parametrize("name", CLASSES)
def test_signature_is_torchs_plus_options(name: str) -> None:
    """What only we have can be given by keyword alone."""
    ours, theirs = (list(inspect.signature(cls).parameters.values()) for cls in classes(name))
    assert (last := ours.pop()).name == "options" and last.kind == last.VAR_KEYWORD
    same = len(theirs)
    assert [(p.name, p.kind, p.default) for p in ours[:same]] == [(p.name, p.kind, p.default) for p in theirs]
    assert all(p.kind == p.KEYWORD_ONLY and p.default is None and name == "Muon" for p in ours[same:])


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_groups_and_printed_form_are_torchs(name: str, device: str) -> None:
    ours, theirs = (
        cls([{"params": parameters_of(cls, device)}, {"params": parameters_of(cls, device), "lr": 1}])
        for cls in classes(name)
    )
    assert ours.defaults == theirs.defaults and list(ours.defaults) == list(theirs.defaults)
    assert [list(group) for group in ours.param_groups] == [list(group) for group in theirs.param_groups]
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    assert repr(ours) == repr(theirs)
    assert not ours.state
    if theirs.state:  # Adagrad makes state in its constructor; here that takes a call
        ours.materialize_state()
        assert_close(ours, theirs, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", IN_TORCH, ids=str)
def test_three_steps_equal_torch(row: RuleRow, backend: str, device: str) -> None:
    ours = row.cls(parameters_of(row.cls, device), **row.options, backend=backend)
    theirs = reference(row.torch_cls, parameters_of(row.cls, device), **row.options)
    train(range(3), ours, theirs)
    assert_close(ours, theirs, 3)
    for (_, state), (_, other) in zip(contents(ours), contents(theirs), strict=True):
        assert state.keys() == {key for key, value in other.items() if value is not None}


FLAGS = (dict(foreach=True), dict(foreach=False), dict(fused=True), dict(fused=False), dict(capturable=True))


@pytest.mark.parametrize("name", CLASSES)
def test_flags_select_nothing(name: str, device: str) -> None:
    ours, theirs = classes(name)
    plain = ours(parameters_of(ours, device))
    train(range(2), plain)
    for flags in FLAGS:
        if takes(name, *flags):
            flagged = ours(parameters_of(ours, device), **flags)
            assert flagged.defaults == theirs(parameters_of(ours, device), **flags).defaults
            train(range(2), flagged)
            assert_equal(plain, flagged)
        else:
            with pytest.raises(TypeError, match="unexpected keyword argument"):
                ours(parameters_of(ours, device), **flags)


def raised(cls: Any, params: Any, kwargs: dict[str, Any]) -> tuple[type | None, str]:
    """Type and text of what a constructor raises, (None, "") if nothing; warnings are errors in these tests."""
    try:
        cls(params, **kwargs)
    except Exception as error:
        return type(error), str(error)
    return None, ""


TENSOR = torch.tensor(0.5)
BAD: tuple[dict[str, Any], ...] = (
    dict(lr=-0.1), dict(lr=0.0), dict(lr=0), dict(lr=torch.ones(2)), dict(lr=torch.tensor(0.1), foreach=True),
    dict(weight_decay=-0.1), dict(fused=True, foreach=True), dict(fused=True, differentiable=True),
    dict(eps=-1e-8), dict(eps=0.0), dict(betas=(-0.1, 0.5)), dict(betas=(0.5, 1.0)), dict(betas=(0, 0)),
    dict(betas=(0.5, TENSOR)), dict(betas=(TENSOR, TENSOR)), dict(betas=(TENSOR, TENSOR), foreach=True),
    dict(momentum=-0.1), dict(nesterov=True), dict(nesterov=True, momentum=0.9),
    dict(nesterov=True, momentum=0.9, dampening=0.1), dict(rho=-0.1), dict(rho=1.0), dict(rho=1.1), dict(alpha=-0.1),
    dict(lr_decay=-0.1), dict(initial_accumulator_value=-0.1), dict(momentum_decay=-0.1), dict(etas=(1.0, 1.2)),
    dict(etas=(0.5, 0.9)), dict(etas=(0.0, 1.2)),
)  # fmt: skip
"""Arguments that some class of torch refuses, or nearly so; each is tried on every class that has it."""


CASES = [
    (name, kwargs)
    for name in CLASSES
    for kwargs in BAD
    if takes(name, *kwargs) and not (name == "Adafactor" and "eps" in kwargs)  # its eps is a pair
]


@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=str)
def test_bad_arguments_raise_as_in_torch(name: str, kwargs: dict[str, Any]) -> None:
    ours, theirs = (raised(cls, [torch.ones(2, 2)], kwargs) for cls in classes(name))
    assert ours[0] is theirs[0] and ours[1].startswith(theirs[1])


def test_the_bad_arguments_are_bad() -> None:
    found = [raised(classes(name)[1], [torch.ones(2, 2)], kwargs) for name, kwargs in CASES]
    assert sum(error is not None for error, _ in found) > 70


@pytest.mark.parametrize("name", CLASSES)
def test_what_only_fusedopt_refuses(name: str) -> None:
    cls = getattr(fusedopt, name)
    with pytest.raises(ValueError, match="backend must be"):
        cls([torch.ones(1, 1)], backend="cuda")
    with pytest.raises(TypeError, match="unexpected keyword argument 'clip'"):
        cls([torch.ones(1, 1)], clip=1.0)
    if takes(name, "differentiable"):
        with pytest.raises(RuntimeError, match="differentiable=True is not supported"):
            cls([torch.ones(1, 1)], differentiable=True)
    for pair in ("betas", "etas", "step_sizes"):
        if takes(name, pair):
            with pytest.raises(ValueError, match="a pair"):
                cls([torch.ones(1, 1)], **{pair: (0.5,)})


CHANGES: tuple[dict[str, Any], ...] = (
    {}, dict(lr=0.03), dict(weight_decay=0.25), dict(maximize=True, weight_decay=0.0), dict(maximize=False),
    dict(momentum=0.5, dampening=0.25), dict(momentum=0.5), dict(momentum=0.0), dict(nesterov=True),
    dict(betas=(0.5, 0.75), eps=0.1), dict(amsgrad=False), dict(amsgrad=True), dict(rho=0.5, eps=0.1), dict(alpha=0.7),
    dict(decoupled_weight_decay=True, weight_decay=0.25), dict(decoupled_weight_decay=False, weight_decay=0.25),
    dict(centered=False), dict(lr_decay=0.5), dict(momentum_decay=0.1), dict(lambd=0.3), dict(t0=2.0),
    dict(etas=(0.4, 1.5)), dict(step_sizes=(1e-4, 0.015)), dict(beta2_decay=-0.5), dict(d=1.5),
)  # fmt: skip
"""What a group may set apart from the others; decay by binary fractions, so that g + λ·p is 0 or far from it."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", EACH, ids=str)
def test_per_group_overrides(row: RuleRow, backend: str, device: str) -> None:
    keys = row.torch_cls(parameters_of(row.cls, device)).param_groups[0].keys()

    def groups() -> list[dict[str, Any]]:
        given = [options for options in CHANGES if options.keys() <= keys]
        return [{"params": parameters_of(row.cls, device, seed=i)[:2], **options} for i, options in enumerate(given)]

    ours = row.cls(groups(), **row.options, backend=backend)
    theirs = reference(row.torch_cls, groups(), **row.options)
    train(range(3), ours, theirs)
    assert_close(ours, theirs, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row", EACH, ids=str)
def test_tensor_hypers_changed_in_place_are_read_at_every_step(
    row: RuleRow, kind: torch.dtype, backend: str, device: str
) -> None:
    """Against the same numbers as floats (binary fractions), bit for bit."""

    def make(x: float) -> torch.Tensor:
        return torch.tensor(x, dtype=kind, device=device)

    floats = dict(row.options, lr=0.125)
    tensors = dict(row.options, lr=make(0.125).reshape(1))
    if takes(row.cls.__name__, "betas"):
        floats["betas"], tensors["betas"] = (0.5, 0.75), (make(0.5), make(0.75))
    elif takes(row.cls.__name__, "weight_decay"):
        floats["weight_decay"], tensors["weight_decay"] = 0.25, make(0.25)
    a = row.cls(parameters_of(row.cls, device), **floats)
    b = row.cls(parameters_of(row.cls, device), **tensors, backend=backend)
    still, live = a.param_groups[0], b.param_groups[0]
    assert live["lr"] is tensors["lr"] and live.get("betas") == tensors.get("betas")
    for step, lr in enumerate((0.25, 0.5)):
        train([step], a, b)
        still["lr"] = lr
        live["lr"].fill_(lr)
        if "betas" in tensors:
            still["betas"] = (0.75, 0.5)
            live["betas"][0].fill_(0.75)
            live["betas"][1].fill_(0.5)
        elif "weight_decay" in tensors:
            still["weight_decay"] = 0.5
            live["weight_decay"].fill_(0.5)
    train([2], a, b)
    assert_equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", DENSE, ids=str)
def test_closure(row: RuleRow, backend: str, device: str) -> None:
    """Called once, with gradients on, before gradients are read; its result is returned."""
    ours, theirs = parameters(device, (4, 3)), parameters(device, (4, 3))
    calls = []

    def closure(optimizer: Any, p: torch.Tensor) -> Any:
        def loss() -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            value = (p * p).sum()
            value.backward()
            return value

        return loss

    a, b = row.cls(ours, **row.options, backend=backend), reference(row.torch_cls, theirs, **row.options)
    with torch.no_grad():
        results = [a.step(closure(a, ours[0])), a.step(closure=closure(a, ours[0]))]
        expected = [b.step(closure(b, theirs[0])), b.step(closure(b, theirs[0]))]
    assert calls == [True] * 4 and a.step() is None
    b.step()
    torch.testing.assert_close(results, expected, rtol=1e-6, atol=0)
    assert_close(a, b, 3)


@pytest.mark.parametrize("flags", [{}, dict(foreach=True), dict(fused=True)], ids=str)
def test_zero_grad_both_ways(flags: dict[str, Any], device: str) -> None:
    params = parameters(device)
    optimizer = fusedopt.AdamW(params, **flags)
    give_gradients(0, params)
    grads = [p.grad for p in params]
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is g and not g.any() for p, g in zip(params, grads, strict=True) if g is not None)
    optimizer.step()
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)
    before = [p.detach().clone() for p in params]
    assert optimizer.step() is None
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_step_counts_follow_the_default_dtype(backend: str, device: str) -> None:
    """As in torch's for-loop: fp64 counts under a float64 default, and they stay so."""
    ours = fusedopt.AdamW(parameters(device, dtype=torch.float64), backend=backend)
    theirs = torch.optim.AdamW(parameters(device, dtype=torch.float64), foreach=False)
    torch.set_default_dtype(torch.float64)
    try:
        train(range(2), ours, theirs)
    finally:
        torch.set_default_dtype(torch.float32)
    for (_, state), (_, other) in zip(contents(ours), contents(theirs), strict=True):
        assert state["step"].dtype == other["step"].dtype == torch.float64 and state["step"] == 2
