"""Parameters and groups as training code uses them: named, added, shared out, replaced after construction."""

import copy
from typing import Any

import pytest
import torch
from compare import BACKENDS, THREE, assert_close, assert_equal, contents, give_gradients, parameters, params_of, train
from table import RULES, RuleRow

import fusedopt


def named(device: str, **kwargs: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(f"p{i}", p) for i, p in enumerate(parameters(device, **kwargs))]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", THREE, ids=str)
def test_a_group_added_in_mid_run(row: RuleRow, backend: str, device: str) -> None:
    ours = row.cls(parameters(device), **row.options, backend=backend)
    theirs = row.torch_cls(parameters(device), **row.options, foreach=False)
    train([0], ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": parameters(device, (2,), seed=5)[0], "lr": 0.02})
    train([1], ours, theirs)
    assert_close(ours, theirs, 2)
    assert ours.param_groups[1].keys() == theirs.param_groups[1].keys()
    texts = []
    for optimizer in (ours, theirs):
        with pytest.raises(ValueError, match="more than one parameter group") as caught:
            optimizer.add_param_group({"params": params_of(optimizer)[:1]})
        texts.append(str(caught.value))
    assert texts[0] == texts[1]


def test_named_parameters(device: str) -> None:
    """Names are kept in the groups, in the state dict and through loads, as in torch."""
    ours, theirs = fusedopt.AdamW(named(device)), torch.optim.AdamW(named(device))
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": [("late", parameters(device, (2,))[0])]})
    train(range(2), ours, theirs)
    assert_close(ours, theirs, 2)
    assert [group["param_names"] for group in ours.param_groups] == [["p0", "p1", "p2", "p3"], ["late"]]
    assert ours.state_dict()["param_groups"] == theirs.state_dict()["param_groups"]
    twin = copy.deepcopy(ours)
    twin.load_state_dict(theirs.state_dict())
    assert [group["param_names"] for group in twin.param_groups] == [["p0", "p1", "p2", "p3"], ["late"]]
    with pytest.raises(ValueError, match="without names to the optimizer"):
        ours.add_param_group({"params": parameters(device, (2,))})


def test_two_optimizers_do_not_know_of_each_other(device: str) -> None:
    first, second, one, two = (RULES[i].cls(parameters(device, seed=i), lr=0.1) for i in (1, 7, 1, 7))
    train([0], first)
    train([1], second)
    train([2], first)
    train([0, 2], one)
    train([1], two)
    assert_equal(first, one)
    assert_equal(second, two)


def test_one_parameter_in_two_optimizers(device: str) -> None:
    """Each sees what the other wrote: alternating, as with two phases of a training run."""
    ours, theirs = parameters(device), parameters(device)
    pairs = [(RULES[i].cls(ours, lr=0.1), RULES[i].torch_cls(theirs, lr=0.1, foreach=False)) for i in (0, 7)]
    for step in range(4):
        train([step], *pairs[step % 2])
    for pair in pairs:
        assert_close(*pair, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_in_no_group_is_left_alone(backend: str, device: str) -> None:
    model = torch.nn.Linear(3, 2, device=device)
    optimizer = fusedopt.AdamW([model.weight], lr=0.1, backend=backend)
    bias, version = model.bias.detach().clone(), model.bias._version
    model(torch.ones(1, 3, device=device)).sum().backward()
    optimizer.step()
    assert torch.equal(model.bias, bias) and model.bias._version == version
    assert model.weight._version > 0 and set(optimizer.state) == {model.weight}


@pytest.mark.parametrize("row", THREE, ids=str)
def test_parameters_replaced_after_construction(row: RuleRow, device: str) -> None:
    """A sharding framework: construct on placeholders, round-trip the state dict, then swap every entry."""
    placeholders = [torch.nn.Parameter(torch.empty(1, device=device)) for _ in range(4)]
    groups = [{"params": placeholders[:3]}, {"params": placeholders[3:], "weight_decay": 0.0}]
    ours = row.cls(groups, **row.options)
    ours.load_state_dict(ours.state_dict())
    real = parameters(device)
    for group in ours.param_groups:
        group["params"] = [real.pop(0) for _ in group["params"]]
    fresh = parameters(device)
    plain = row.cls([{"params": fresh[:3]}, {"params": fresh[3:], "weight_decay": 0.0}], **row.options)
    train(range(2), ours, plain)
    assert_equal(ours, plain)
    assert set(ours.state) == ({p for p, s in contents(ours) if s})


@pytest.mark.parametrize("row", THREE, ids=str)
def test_groups_stepped_one_by_one(row: RuleRow, device: str) -> None:
    """What ZeRO does: several steps per iteration, each with other groups in place, and empty ones in between."""
    ours, plain = (row.cls([{"params": [p]} for p in parameters(device)], **row.options) for _ in range(2))
    groups = ours.param_groups
    for step in range(2):
        give_gradients(step, params_of(ours), params_of(plain))
        for group in groups:
            ours.param_groups = [group]
            ours.step()
            members, group["params"] = group["params"], []
            ours.step()
            group["params"] = members
        ours.param_groups = groups
        plain.step()
    assert_equal(ours, plain)


@pytest.mark.parametrize("row", THREE, ids=str)
def test_an_optimizer_per_parameter_in_the_backward_pass(row: RuleRow, device: str) -> None:
    """Gradient release: each steps in its parameter's hook and frees the gradient."""
    released, plain_model = (torch.nn.Linear(3, 2, device=device) for _ in range(2))
    plain_model.load_state_dict(released.state_dict())
    optimizers = {p: row.cls([p], **row.options) for p in released.parameters()}

    def release(p: torch.Tensor) -> None:
        optimizers[p].step()  # pyright: ignore[reportArgumentType]  # the hook gets a plain Tensor
        optimizers[p].zero_grad()  # pyright: ignore[reportArgumentType]  # as above

    for p in released.parameters():
        p.register_post_accumulate_grad_hook(release)
    plain = row.cls(plain_model.parameters(), **row.options)
    for step in range(2):
        x = torch.full((4, 3), 0.5 + step, device=device)
        released(x).square().sum().backward()
        plain.zero_grad()
        plain_model(x).square().sum().backward()
        plain.step()
    for p, q in zip(released.parameters(), plain_model.parameters(), strict=True):
        assert torch.equal(p, q) and p.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_notices_the_step(backend: str, device: str) -> None:
    """A weight saved for a backward pass that a step has changed since must not be used silently."""
    weight = torch.nn.Parameter(torch.ones(2, 2, device=device))
    optimizer = fusedopt.SGD([weight], lr=0.1, backend=backend)
    x = torch.ones(2, 2, device=device, requires_grad=True)
    loss = (x @ weight).sum()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert weight.is_leaf and weight.requires_grad


def test_nothing_happens_at_construction(device: str) -> None:
    params = parameters(device)
    give_gradients(0, params)
    optimizer = fusedopt.AdamW(params)
    assert not optimizer.state and optimizer._plan is None and not optimizer._tables and not optimizer._eager
