"""What a review of the rules and options found, one test each."""

import copy
import math
from typing import Any

import pytest
import torch
from compare import BACKENDS, assert_equal, give_gradients, parameters, params_of, train

import fusedopt


@pytest.mark.parametrize("backend", BACKENDS)
def test_cautious_does_not_hide_nan(backend: Any, device: str) -> None:
    p = parameters(device, (4,))[0]
    p.grad = torch.tensor([math.nan, 1.0, -1.0, 0.0], device=device)
    fusedopt.AdamW([p], cautious=True, backend=backend).step()
    assert p.isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_numbers_are_thresholds_too(backend: Any, device: str) -> None:
    both = [
        fusedopt.SGD(parameters(device), lr=0.1, clip_grad_norm=one, skip_norm_above=10 * one, backend=backend)
        for one in (1, 1.0)
    ]
    train(range(2), *both)
    give_gradients(2, *map(params_of, both))
    both[0].step(total_norm=5)
    both[1].step(total_norm=5.0)
    assert_equal(*both)


def test_a_given_norm_is_checked_and_not_lost_in_a_graph() -> None:
    optimizer = fusedopt.SGD(parameters("cpu"), lr=0.1, clip_grad_norm=1.0)
    give_gradients(0, params_of(optimizer))
    with pytest.raises(ValueError, match="Invalid total_norm"):
        optimizer.step(total_norm=-1.0)
    with pytest.raises(TypeError, match=r"total_norm must be a number or a one-element float32"):
        optimizer.step(total_norm=torch.ones(2))
    with pytest.raises(Exception, match="total_norm"):
        torch.compile(lambda: optimizer.step(total_norm=1.0), backend="aot_eager", fullgraph=True)()
    alone = fusedopt.SGD(parameters("cpu"), lr=0.1, clip_grad_norm=1.0, clip_scope="tensor")
    give_gradients(0, params_of(alone))
    with pytest.raises(ValueError, match=r"clip_scope=.global"):
        alone.step(total_norm=1.0)


def test_independent_decay_knows_its_initial_lr_or_asks() -> None:
    late = fusedopt.AdamW(parameters("cpu"), weight_decay=0.1)
    late.param_groups[0]["fusedopt"] = {"version": 1, "decay_mode": "independent"}
    with pytest.raises(ValueError, match="lr_initial"):
        train([0], late)
    theirs = torch.optim.AdamW(parameters("cpu"), lr=0.5, weight_decay=0.1)
    train([0], theirs)
    ours = fusedopt.AdamW(parameters("cpu"), lr=0.01, weight_decay=0.1, decay_mode="independent")
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.param_groups[0]["fusedopt"]["lr_initial"] == 0.5


def test_masked_elements_stay_when_schedule_free_weights_are_swapped() -> None:
    optimizer = fusedopt.AdamWScheduleFree(parameters("cpu", (5, 5)), lr=0.1)
    p = params_of(optimizer)[0]
    mask = torch.arange(25).reshape(5, 5) % 2 == 0
    optimizer.set_update_mask(p, mask)
    start = p.detach().clone()
    train(range(3), optimizer)
    optimizer.eval()
    assert torch.equal(p[~mask], start[~mask]) and not torch.equal(p[mask], start[mask])
    optimizer.train()
    assert torch.equal(p[~mask], start[~mask])


def test_a_mask_survives_a_trip_through_torch() -> None:
    ours = fusedopt.AdamW(parameters("cpu", (3, 3)), lr=0.1)
    ours.set_update_mask(params_of(ours)[0], torch.eye(3, dtype=torch.bool))
    train([0], ours)
    theirs = torch.optim.AdamW(parameters("cpu", (3, 3)), lr=0.1)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    again = fusedopt.AdamW([params_of(ours)[0].detach().clone().requires_grad_()], lr=0.1)
    again.load_state_dict(copy.deepcopy(theirs.state_dict()))
    train([1], ours, again)
    assert_equal(ours, again)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: fusedopt.SGD([{"params": p, "fusedopt": {"clip_grad_nrm": 1.0}}]), "unknown option 'clip_grad_nrm'"),
        (lambda p: fusedopt.SGD([{"params": p, "backend": "triton"}]), "backend belongs to the whole optimizer"),
        (lambda p: fusedopt.Slot("m", "sined"), "kind must be signed"),  # pyright: ignore[reportArgumentType] # on purpose
        (lambda p: fusedopt.Slot("step", "signed"), "choose another"),
    ],
    ids=["option", "backend", "kind", "name"],
)
def test_what_would_be_ignored_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(parameters("cpu"))


def test_a_group_that_does_not_skip_is_not_skipped_silently() -> None:
    p, q = parameters("cpu", (2,), (2,))
    with pytest.raises(ValueError, match="the same values"):
        fusedopt.SGD([{"params": [p], "skip_nonfinite": True}, {"params": [q]}])
    with pytest.raises(ValueError, match="the same values"):
        fusedopt.SGD([{"params": [p]}, {"params": [q], "skip_nonfinite": True}])
