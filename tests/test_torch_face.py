"""The torch.optim face: arguments, errors, groups, closures and gradients are those of torch's classes."""

import inspect
from typing import Any

import pytest
import torch
from compare import BACKENDS, THREE, assert_close, assert_equal, contents, give_gradients, parameters, train
from table import RULES, RuleRow

import fusedopt

CLASSES = ("SGD", "Adam", "AdamW")
IMPLEMENTATION = ("foreach", "fused", "capturable", "differentiable")


def classes(name: str) -> tuple[Any, Any]:
    return getattr(fusedopt, name), getattr(torch.optim, name)


@pytest.mark.parametrize("name", CLASSES)
def test_signature_is_torchs_plus_options(name: str) -> None:
    ours, theirs = (list(inspect.signature(cls).parameters.values()) for cls in classes(name))
    assert (last := ours.pop()).name == "options" and last.kind == last.VAR_KEYWORD
    assert [(p.name, p.kind, p.default) for p in ours] == [(p.name, p.kind, p.default) for p in theirs]


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_groups_and_printed_form_are_torchs(name: str, device: str) -> None:
    ours, theirs = (
        cls([{"params": parameters(device)}, {"params": parameters(device), "lr": 1}]) for cls in classes(name)
    )
    assert ours.defaults == theirs.defaults and list(ours.defaults) == list(theirs.defaults)
    assert [list(group) for group in ours.param_groups] == [list(group) for group in theirs.param_groups]
    assert ours.state_dict() == theirs.state_dict()
    assert repr(ours) == repr(theirs)
    assert not ours.state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", RULES, ids=str)
def test_three_steps_equal_torch(row: RuleRow, backend: str, device: str) -> None:
    ours = row.cls(parameters(device), **row.options, backend=backend)
    theirs = row.torch_cls(parameters(device), **row.options, foreach=False)
    train(range(3), ours, theirs)
    assert_close(ours, theirs, 3)
    for (_, state), (_, other) in zip(contents(ours), contents(theirs), strict=True):
        assert list(state) == [key for key, value in other.items() if value is not None]


@pytest.mark.parametrize("name", CLASSES)
def test_flags_select_nothing(name: str, device: str) -> None:
    ours, theirs = classes(name)
    plain = ours(parameters(device))
    train(range(2), plain)
    for flags in (dict(foreach=True), dict(foreach=False), dict(fused=True), dict(fused=False), dict(capturable=True)):
        if "capturable" in flags and name == "SGD":
            continue
        flagged = ours(parameters(device), **flags)
        assert flagged.defaults == theirs(parameters(device), **flags).defaults
        train(range(2), flagged)
        assert_equal(plain, flagged)


def raised(cls: Any, params: Any, kwargs: dict[str, Any]) -> tuple[type, str]:
    """Type and text of what a constructor raises; warnings are errors in these tests."""
    with pytest.raises(Exception) as caught:
        cls(params, **kwargs)
    return caught.type, str(caught.value)


BAD: tuple[tuple[str, dict[str, Any]], ...] = (
    *((name, dict(lr=-0.1)) for name in CLASSES),
    *((name, dict(weight_decay=-0.1)) for name in CLASSES),
    *((name, dict(fused=True, foreach=True)) for name in CLASSES),
    *((name, dict(fused=True, differentiable=True)) for name in CLASSES),
    *((name, dict(lr=torch.ones(2))) for name in CLASSES),
    *((name, dict(eps=-1e-8)) for name in CLASSES[1:]),
    *((name, dict(betas=(-0.1, 0.5))) for name in CLASSES[1:]),
    *((name, dict(betas=(0.5, 1.0))) for name in CLASSES[1:]),
    *((name, dict(betas=(0, 0))) for name in CLASSES[1:]),
    *((name, dict(betas=(torch.tensor(0.5), torch.tensor(0.5)), foreach=True)) for name in CLASSES[1:]),
    ("Adam", dict(lr=torch.tensor(0.1), foreach=True)),
    ("SGD", dict(momentum=-0.1)),
    ("SGD", dict(nesterov=True)),
    ("SGD", dict(nesterov=True, momentum=0.9, dampening=0.1)),
)


@pytest.mark.parametrize(("name", "kwargs"), BAD, ids=lambda x: str(x))
def test_bad_arguments_raise_as_in_torch(name: str, kwargs: dict[str, Any]) -> None:
    ours, theirs = (raised(cls, [torch.ones(2)], kwargs) for cls in classes(name))
    assert ours[0] is theirs[0] and ours[1].startswith(theirs[1])


@pytest.mark.parametrize("name", CLASSES)
def test_what_only_fusedopt_refuses(name: str) -> None:
    cls = getattr(fusedopt, name)
    with pytest.raises(RuntimeError, match="differentiable=True is not supported"):
        cls([torch.ones(1)], differentiable=True)
    with pytest.raises(ValueError, match="backend must be"):
        cls([torch.ones(1)], backend="cuda")
    with pytest.raises(TypeError, match="unexpected keyword argument 'clip'"):
        cls([torch.ones(1)], clip=1.0)
    if name != "SGD":
        with pytest.raises(ValueError, match="a pair"):
            cls([torch.ones(1)], betas=(0.5,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", THREE, ids=str)
def test_per_group_overrides(row: RuleRow, backend: str, device: str) -> None:
    numbers: list[dict[str, Any]] = [{}, dict(lr=0.03, weight_decay=0.2), dict(maximize=True, weight_decay=0.0)]
    if row.name == "sgd":
        numbers += [dict(momentum=0.5, dampening=0.25), dict(momentum=0.0), dict(nesterov=True)]
    else:
        numbers += [dict(betas=(0.5, 0.75), eps=0.1), dict(amsgrad=not row.options.get("amsgrad", False))]
        numbers += [dict(decoupled_weight_decay=row.name == "adam", weight_decay=0.2)]

    def groups() -> list[dict[str, Any]]:
        return [{"params": parameters(device, (2, 2), (3,), seed=i), **options} for i, options in enumerate(numbers)]

    ours = row.cls(groups(), **row.options, backend=backend)
    theirs = row.torch_cls(groups(), **row.options, foreach=False)
    train(range(2), ours, theirs)
    assert_close(ours, theirs, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row", THREE, ids=str)
def test_tensor_hypers_changed_in_place_are_read_at_every_step(
    row: RuleRow, kind: torch.dtype, backend: str, device: str
) -> None:
    """Against the same numbers as floats (binary fractions), bit for bit."""
    floats = dict(row.options, lr=0.125)
    tensors = dict(row.options, lr=torch.tensor([0.125], dtype=kind, device=device))
    if row.name == "sgd":
        floats["weight_decay"], tensors["weight_decay"] = 0.25, torch.tensor(0.25, dtype=kind, device=device)
    else:
        floats["betas"] = (0.5, 0.75)
        tensors["betas"] = tuple(torch.tensor(b, dtype=kind, device=device) for b in (0.5, 0.75))
    a, b = row.cls(parameters(device), **floats), row.cls(parameters(device), **tensors, backend=backend)
    live = b.param_groups[0]
    assert live["lr"] is tensors["lr"] and live.get("betas") == tensors.get("betas")
    for step, lr in enumerate((0.25, 0.5)):
        train([step], a, b)
        a.param_groups[0]["lr"] = lr
        live["lr"].fill_(lr)
        if row.name == "sgd":
            a.param_groups[0]["weight_decay"] = 0.5
            live["weight_decay"].fill_(0.5)
        else:
            a.param_groups[0]["betas"] = (0.75, 0.5)
            live["betas"][0].fill_(0.75)
            live["betas"][1].fill_(0.5)
    train([2], a, b)
    assert_equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_closure(backend: str, device: str) -> None:
    """Called once, with gradients on, before gradients are read; its result is returned."""
    ours, theirs = parameters(device, (4,)), parameters(device, (4,))
    calls = []

    def closure(optimizer: Any, p: torch.Tensor) -> Any:
        def loss() -> torch.Tensor:
            calls.append(torch.is_grad_enabled())
            optimizer.zero_grad()
            value = (p * p).sum()
            value.backward()
            return value

        return loss

    a, b = fusedopt.AdamW(ours, backend=backend), torch.optim.AdamW(theirs, foreach=False)
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
