"""Muon's groups: AdamW for what is no matrix, and state dicts of both and of torch.optim."""

import copy
import pickle
from typing import Any

import pytest
import torch
from compare import BACKENDS, assert_equal, contents, parameters, params_of, train, uniform

from fusedopt import AdamW
from fusedopt.rules.muon import Muon

SHAPES = ((8, 16), (16, 8), (1, 5))
AROUND = {"embedding": (12, 4), "weight": (8, 4), "bias": (8,), "scale": ()}
"""A small model: an embedding that Muon should not have, a matrix, a vector, a scalar."""


def named(device: str, *names: str) -> list[tuple[str, torch.nn.Parameter]]:
    return list(zip(names, parameters(device, *(AROUND[name] for name in names)), strict=True))


def test_a_mixed_list_becomes_two_groups(device: str) -> None:
    optimizer = Muon(named(device, "weight", "bias", "scale"), lr=0.02, adamw=dict(lr=1e-3, weight_decay=0.3))
    muon, adamw = optimizer.param_groups
    assert (muon["param_names"], adamw["param_names"]) == (["weight"], ["bias", "scale"])
    assert set(muon) == {*torch.optim.Muon(parameters(device, (2, 2))).param_groups[0], "param_names"}
    assert set(adamw) == {*AdamW(parameters(device, (2,))).param_groups[0], "param_names", "use_muon"}
    assert (muon["lr"], adamw["lr"], adamw["weight_decay"], adamw["eps"]) == (0.02, 1e-3, 0.3, 1e-8)


def test_groups_given_by_the_user(device: str) -> None:
    embedding, weight, bias = (p for _, p in named(device, "embedding", "weight", "bias"))
    groups = [
        dict(params=[embedding], use_muon=False, lr=0.5),
        dict(params=[weight], weight_decay=0.0),
        dict(params=[bias], weight_decay=0.7),
    ]
    optimizer = Muon(groups, adamw={})
    assert [g.get("use_muon", True) for g in optimizer.param_groups] == [False, True, False]
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 1e-3, 1e-3]
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.01, 0.0, 0.7]
    more = parameters(device, (2, 2), (3,))
    for wrong, words in (
        (dict(params=more, lr=0.1), "for which of them"),
        (dict(params=more, use_muon=True), "2D parameters"),
        (dict(params=[*more, embedding]), "more than one parameter group"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.add_param_group(wrong)
        assert len(optimizer.param_groups) == 3 and optimizer.defaults["momentum"] == 0.95
    with pytest.raises(ValueError, match="pass adamw="):
        Muon([dict(params=[weight], use_muon=False)])
    with pytest.raises(TypeError, match="adamw takes"):
        Muon([weight], adamw=dict(momentum=0.9))
    with pytest.raises(ValueError, match="beta"):
        Muon([weight], adamw=dict(betas=(2.0, 0.9)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rest_is_updated_by_adamw(backend: str, device: str) -> None:
    """As by an optimizer of its own, with its own state."""
    given = dict(lr=0.1, betas=(0.8, 0.9), weight_decay=0.2)
    one = Muon([p for _, p in named(device, *AROUND)], lr=0.02, adamw=given, backend=backend)
    embedding, weight, bias, scale = (p for _, p in named(device, *AROUND))
    muon = Muon([embedding, weight], lr=0.02, backend=backend)
    adamw = AdamW([bias, scale], **given, backend=backend)
    for step in range(3):
        for p, q in zip(params_of(one), (embedding, weight, bias, scale), strict=True):
            p.grad, q.grad = (uniform([tuple(p.shape)], device, p.dtype, step)[0] for _ in "12")
        for optimizer in (one, muon, adamw):
            optimizer.step()
    others = [*contents(muon), *contents(adamw)]
    torch.testing.assert_close(contents(one), others, rtol=0, atol=0)


def test_checkpoints_of_both_in_one(device: str) -> None:
    """State dicts, deep copies and pickles keep groups apart; the copies train on alike."""

    def make() -> Any:
        return Muon(named(device, *AROUND), lr=0.02, adamw=dict(lr=0.1), backend="eager")

    first, second = make(), make()
    train(range(2), first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p, q in zip(params_of(first), params_of(second), strict=True):
        q.data.copy_(p.data)
    third = pickle.loads(pickle.dumps(copy.deepcopy(first)))
    third.add_param_group({"params": [("late", *parameters(device, (3,), seed=9))]})
    assert third.param_groups[-1]["lr"] == 0.1
    del third.param_groups[-1]
    train(range(2, 4), first, second, third)
    assert_equal(first, second)
    assert_equal(first, third)


def test_checkpoints_of_torch(device: str) -> None:
    """Without ``adamw`` state dicts and groups are torch's, both ways."""
    ours, theirs = Muon(parameters(device, *SHAPES), backend="eager"), torch.optim.Muon(parameters(device, *SHAPES))
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
    train(range(2), ours, theirs)
    again, back = Muon(parameters(device, *SHAPES), backend="eager"), torch.optim.Muon(parameters(device, *SHAPES))
    again.load_state_dict(theirs.state_dict())
    back.load_state_dict(ours.state_dict())
    torch.testing.assert_close([s for _, s in contents(again)], [s for _, s in contents(theirs)], rtol=0, atol=0)
    torch.testing.assert_close([s for _, s in contents(back)], [s for _, s in contents(ours)], rtol=0, atol=0)
    train([2], again)
    materialised = Muon(parameters(device, *SHAPES))
    materialised.materialize_state()
    assert all(list(state) == ["momentum_buffer"] for _, state in contents(materialised))
