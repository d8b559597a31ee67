"""State that comes from elsewhere: older files, other devices and programs, state that a user made or moved."""

import copy
from typing import Any

import pytest
import torch
from compare import (
    ALL,
    BACKENDS,
    EACH,
    THREE,
    assert_close,
    assert_equal,
    contents,
    parameters,
    parameters_of,
    params_of,
    reference,
    train,
)  # fmt: skip
from table import RULES, RuleRow, private

from fusedopt.rule import lookup

ADAMW = THREE[2]


def trained(row: RuleRow, device: str, steps: int = 1, **options: Any) -> Any:
    optimizer = row.cls(parameters_of(row.cls, device), **row.options, **options)
    train(range(steps), optimizer)
    return optimizer


def loaded(row: RuleRow, state_dict: Any, source: Any, **options: Any) -> Any:
    """A new optimizer on copies of the source's parameters, with the state loaded."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in params_of(source)]
    optimizer = row.cls(params, **row.options, **options)
    optimizer.load_state_dict(copy.deepcopy(state_dict))
    return optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [float, int, torch.tensor, lambda t: torch.tensor(t, dtype=torch.int64)])
def test_step_counts_of_any_form(form: Any, backend: str, device: str) -> None:
    """Older torch kept Python numbers; its for-loop keeps CPU tensors whatever the parameter's device."""
    source = trained(ADAMW, device, 2)
    state_dict = copy.deepcopy(source.state_dict())
    for state in state_dict["state"].values():
        state["step"] = form(2)
    ours = loaded(ADAMW, state_dict, source, backend=backend)
    assert all(isinstance(state["step"], torch.Tensor) and state["step"] == 2 for _, state in contents(ours))
    train([2], source, ours)
    assert_equal(source, ours)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_older_groups_get_the_missing_keys(row: RuleRow, device: str) -> None:
    newer = {"foreach", "fused", "capturable", "differentiable", "maximize", "amsgrad", "nesterov", "centered"}
    row = RuleRow(row.name, {k: v for k, v in row.options.items() if k not in newer | {"decoupled_weight_decay"}})
    source = trained(row, device)
    state_dict = copy.deepcopy(source.state_dict())
    state_dict["param_groups"] = [
        {k: v for k, v in group.items() if k not in newer | {"decoupled_weight_decay"}}
        for group in state_dict["param_groups"]
    ]
    ours = loaded(row, state_dict, source)
    assert ours.state_dict()["param_groups"] == source.state_dict()["param_groups"]
    train([1], source, ours)
    assert_equal(source, ours)


def test_adamw_stays_decoupled_whatever_is_loaded(device: str) -> None:
    """A file of torch's Adam turns torch's AdamW into itself again, and an AdamW file makes Adam decoupled: so here."""
    source = trained(ADAMW, device)
    for cls, theirs in ((ADAMW.cls, ADAMW.torch_cls), (RULES[4].cls, RULES[4].torch_cls)):
        for decoupled in (False, True):
            state_dict = copy.deepcopy(source.state_dict())
            state_dict["param_groups"][0]["decoupled_weight_decay"] = decoupled
            found = []
            for make in (cls, theirs):
                optimizer = make([torch.nn.Parameter(p.detach().clone()) for p in params_of(source)])
                optimizer.load_state_dict(copy.deepcopy(state_dict))
                train([1], optimizer)
                found.append(optimizer)
            assert (
                found[0].param_groups[0]["decoupled_weight_decay"] is found[1].param_groups[0]["decoupled_weight_decay"]
            )
            assert_close(*found, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_momentum_buffers_of_none_start_anew(backend: str, device: str) -> None:
    """Older SGD files hold None for a buffer not yet made; with dampening the next step must be the first."""
    row = RULES[2]
    params = [parameters(device) for _ in range(2)]
    ours = row.cls(params[0], **row.options, backend=backend)
    theirs = row.torch_cls(params[1], **row.options, foreach=False)
    for optimizer in (ours, theirs):
        state_dict = optimizer.state_dict()
        state_dict["state"] = {i: {"momentum_buffer": None} for i in range(len(params[0]))}
        optimizer.load_state_dict(state_dict)
    train(range(2), ours, theirs)
    assert_close(ours, theirs, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [RULES[2], *(row for row in EACH if row.name != "adagrad")], ids=str)
def test_state_that_the_user_replaces_or_clears(row: RuleRow, backend: str, device: str) -> None:
    """But for Adagrad: torch's makes state in its constructor and cannot do without."""
    ours = row.cls(parameters_of(row.cls, device), **row.options, backend=backend)
    theirs = reference(row.torch_cls, parameters_of(row.cls, device), **row.options)
    train([0], ours, theirs)
    names = [slot.name for slot in row.cls.rule.state]
    for optimizer in (ours, theirs):
        for p in params_of(optimizer):
            name = next(name for name in names if name in optimizer.state[p])
            optimizer.state[p][name] = optimizer.state[p][name] * 2
    train([1], ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.state[params_of(optimizer)[0]] = {}
        optimizer.state.pop(params_of(optimizer)[1])
    train([2], ours, theirs)
    assert_close(ours, theirs, 3)


def test_state_of_no_parameter_and_nested_dicts_come_through(device: str) -> None:
    """torch keeps entries of ``state`` that belong to no parameter, whatever they are."""
    source = trained(ADAMW, device)
    state_dict = copy.deepcopy(source.state_dict())
    state_dict["state"].update(count=3, table={"a": torch.ones(2)})
    state_dict["state"][0]["extra"] = {"inner": torch.ones(2, device=device), "note": "kept"}
    ours = ADAMW.cls(parameters(device), **ADAMW.options)
    ours.load_state_dict(state_dict)
    assert ours.state["count"] == 3 and torch.equal(ours.state["table"]["a"], torch.ones(2))
    extra = ours.state[params_of(ours)[0]]["extra"]
    assert torch.equal(extra["inner"], torch.ones(2, device=device)) and extra["note"] == "kept"
    train(range(2), ours)


def test_loading_is_strict_about_groups_as_torch(device: str) -> None:
    source = trained(ADAMW, device)
    for params in ([{"params": params_of(source)[:1]}, {"params": params_of(source)[1:]}], params_of(source)[1:]):
        texts = []
        for cls in (ADAMW.cls, ADAMW.torch_cls):
            with pytest.raises(ValueError, match="loaded state dict") as caught:
                cls(params).load_state_dict(source.state_dict())
            texts.append(str(caught.value))
        assert texts[0] == texts[1]


def test_a_newer_format_is_refused_and_changes_nothing(device: str) -> None:
    source = private(trained(ADAMW, device))
    state_dict = copy.deepcopy(source.state_dict())
    state_dict["param_groups"][0]["fusedopt"]["version"] = 2
    before = copy.deepcopy(source)
    with pytest.raises(ValueError, match="written in format version 2; this fusedopt reads up to 1"):
        source.load_state_dict(state_dict)
    assert_equal(source, before)
    assert not source._optimizer_load_state_dict_pre_hooks


def test_loading_twice_and_between_steps(device: str) -> None:
    """Loading replaces state, groups and a tensor lr in the middle of a run; the next step sees all of it."""
    lr = torch.tensor(0.5, device=device)
    source = ADAMW.cls(parameters(device), lr=lr)
    train([0], source)
    first = copy.deepcopy(source.state_dict())
    weights = [p.detach().clone() for p in params_of(source)]
    train([1], source)
    expected = copy.deepcopy(source)
    for _ in range(2):
        with torch.no_grad():
            for p, w in zip(params_of(source), weights, strict=True):
                p.copy_(w)
        source.load_state_dict(copy.deepcopy(first))
        assert source.param_groups[0]["lr"] is not lr and source.param_groups[0]["lr"] == 0.5
        lr.fill_(100.0)
        train([1], source)
        assert_equal(source, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "bad", [torch.zeros(7), torch.zeros(5, dtype=torch.int32), torch.zeros(5, dtype=torch.complex64)], ids=str
)
def test_state_that_does_not_fit_is_refused(bad: torch.Tensor, backend: str, device: str) -> None:
    optimizer = ADAMW.cls(parameters(device, (5,)), backend=backend)
    train([0], optimizer)
    optimizer.state[params_of(optimizer)[0]]["exp_avg"] = bad.to(device)
    with pytest.raises(RuntimeError, match=r"'exp_avg' of shape .* does not fit a parameter of shape \(5,\)"):
        train([1], optimizer)


@pytest.mark.parametrize("row", ALL, ids=str)
def test_to_moves_state_and_a_step_brings_it_back(row: RuleRow, device: str) -> None:
    ours, plain = trained(row, device), trained(row, device)
    assert ours.to("cpu") is ours
    assert all(v.device.type == "cpu" for _, state in contents(ours) for v in state.values())
    train([1], ours, plain)
    assert all(v.device == p.device for p, state in contents(ours) for v in state.values())
    assert_equal(ours, plain)


@pytest.mark.parametrize("row", ALL, ids=str)
def test_materialize_state(row: RuleRow, device: str) -> None:
    """What a first step would create, as its slots declare it, without the step; frozen parameters get none."""
    ours, plain = (row.cls(parameters_of(row.cls, device), **row.options) for _ in range(2))
    start = [p.detach().clone() for p in params_of(ours)]
    params_of(ours)[0].requires_grad_(False)
    ours.materialize_state()
    assert params_of(ours)[0] not in ours.state
    params_of(ours)[0].requires_grad_(True)
    ours.materialize_state()
    ours.materialize_state()
    made = copy.deepcopy([state for _, state in contents(ours)])
    train([0], ours, plain)
    assert_equal(ours, plain)
    group = ours.param_groups[0]
    for (_, state), before, p in zip(contents(plain), made, start, strict=True):
        assert {k: (v.dtype, v.shape) for k, v in state.items()} == {k: (v.dtype, v.shape) for k, v in before.items()}
        for slot in row.cls.rule.state:
            if (value := before.pop(slot.name, None)) is not None:
                begin = (
                    lookup({"zeros": 0.0, "param": p, **group}, slot.init) if isinstance(slot.init, str) else slot.init
                )
                torch.testing.assert_close(value, torch.as_tensor(begin).to(value).expand_as(value), rtol=0, atol=0)
        assert not any(v.any() for v in before.values())


def test_sgds_first_step_is_told_from_later_ones(device: str) -> None:
    """torch keeps no step count for SGD; dampening acts from the second step on, whatever happened to the state."""
    row = RULES[2]
    later, first = trained(row, device, 1), trained(row, device, 0)
    loaded_over = row.cls([torch.nn.Parameter(p.detach().clone()) for p in params_of(later)], **row.options)
    loaded_over.materialize_state()
    loaded_over.load_state_dict(copy.deepcopy(later.state_dict()))
    made = row.cls(parameters(device), **row.options)
    made.materialize_state()
    copied = copy.deepcopy(made)
    train([1], later, loaded_over, first, made, copied)
    assert_equal(later, loaded_over)
    assert_equal(first, made)
    assert_equal(first, copied)


@pytest.mark.parametrize("row", THREE, ids=str)
def test_warmup_changes_nothing(row: RuleRow, device: str) -> None:
    optimizer = row.cls(parameters(device), **row.options, backend="triton")
    before = copy.deepcopy(optimizer)
    count, seconds = optimizer.warmup()
    assert count >= 0 and seconds >= 0.0 and not optimizer.state
    assert optimizer.warmup()[0] == 0  # everything is ready now
    assert_equal(optimizer, before)
    assert row.cls(parameters("cpu"), **row.options, backend="eager").warmup()[0] == 0
