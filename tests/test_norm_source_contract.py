"""Norms taken in backward: accumulation, gradients that change after their hooks, and what is refused."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from at_backward import OPTION, backward, both, optimizer_of, train
from compare import BACKENDS, assert_equal, params_of
from scaled import OURS, STOCK
from torch import Tensor

import fusedopt
from fusedopt import layout


@pytest.fixture(autouse=True)
def _announce_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_announced", set())


# ---------------------------------------------------------------------------------------------------- accumulation
@pytest.mark.parametrize("backend", BACKENDS)
def test_marked_micro_steps(backend: str, device: str) -> None:
    ours, theirs = both(device, backend=backend)
    train([0], ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.zero_grad()
        with optimizer.accumulate():
            backward(1, params_of(optimizer))
            backward(2, params_of(optimizer))
        backward(3, params_of(optimizer))
        optimizer.step()
    assert_equal(ours, theirs)


def test_unmarked_accumulation_is_refused(device: str) -> None:
    ours, _ = both(device)
    train([0], ours)
    ours.zero_grad()
    backward(1, params_of(ours))
    backward(2, params_of(ours))
    with pytest.raises(RuntimeError, match=r"optimizer\.accumulate\(\)"):
        ours.step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_that_is_left_out_is_no_accumulation(set_to_none: bool, device: str) -> None:
    ours, theirs = both(device)
    train([0], ours, theirs)
    for optimizer in (ours, theirs):
        for t in (1, 2):
            optimizer.zero_grad(set_to_none)
            backward(t, params_of(optimizer))
        optimizer.step()
    assert_equal(ours, theirs)
    for p in params_of(ours):  # not by way of the optimizer
        p.grad = None
    backward(3, params_of(ours))
    for p in params_of(ours):
        p.grad = None
    backward(4, params_of(ours))
    ours.step()
    train([4], theirs)
    assert_equal(ours, theirs)


def test_a_gradient_of_an_earlier_micro_step_alone_is_summed_up_in_the_step(device: str) -> None:
    ours, theirs = both(device)
    train([0], ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.zero_grad()
        with optimizer.accumulate():
            backward(1, params_of(optimizer))
        backward(2, params_of(optimizer)[1:])
    with pytest.warns(UserWarning, match="1 of 5 gradients"):
        ours.step()
    theirs.step()
    assert_equal(ours, theirs)


# --------------------------------------------------------------------------------------------------------- refusals
def replaced(p: Tensor) -> None:
    kept = p.grad
    assert kept is not None
    p.grad = kept * 2.0


def replaced_at_its_address(p: Tensor) -> None:
    kept = p.grad
    assert kept is not None
    p.grad = kept.detach()  # same memory, same version


def moved(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.data = p.grad.clone()


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p.grad.mul_(2.0), lambda p: torch.nn.utils.clip_grad_norm_([p], 0.1), replaced,
        replaced_at_its_address, moved,
    ],
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_changed_after_its_hook_is_refused(change: Any, backend: str, device: str) -> None:
    ours, theirs = both(device, backend=backend)
    train([0], ours, theirs)
    before = copy.deepcopy(ours.state_dict())
    ours.zero_grad()
    backward(1, params_of(ours))
    change(params_of(ours)[4])
    with pytest.raises(RuntimeError, match=r"shape \(40000,\) \(param_groups\[0\]\) was replaced, moved or written to"):
        ours.step()
    torch.testing.assert_close(ours.state_dict()["state"], before["state"], rtol=0, atol=0)
    train([1], ours, theirs)
    assert_equal(ours, theirs)


@pytest.mark.parametrize("value", [1, 0, None, "yes"])
def test_values_of_the_option(value: Any, device: str) -> None:
    with pytest.raises(ValueError, match="must be True, False or 'check'"):
        optimizer_of(device, norm_at_backward=value)


def test_options_that_do_not_go_with_it(device: str) -> None:
    with pytest.raises(ValueError, match="needs something that uses the norm"):
        optimizer_of(device, norm_at_backward=True, clip_grad_norm=None)
    with pytest.raises(ValueError, match="amp_scaling=True"):
        optimizer_of(device, norm_at_backward=True, amp_scaling=True)
    with pytest.raises(ValueError, match="belongs to the whole optimizer"):
        optimizer_of(device).add_param_group({"params": [], OPTION: True})
    ours = optimizer_of(device, norm_at_backward=True)
    ours.param_groups[0]["fusedopt"] = {}
    with pytest.raises(ValueError, match="needs something that uses the norm"):
        train([0], ours)


@pytest.mark.parametrize("scaler", [STOCK, OURS])
@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
def test_scalers_that_rewrite_gradients_are_refused(scaler: Any, unscales: bool, steps: int, device: str) -> None:
    if scaler is OURS and not unscales:
        return  # the way that works
    optimizer, made = optimizer_of(device, norm_at_backward=True), scaler(device, 8.0)
    train(range(steps), optimizer)
    optimizer.zero_grad()
    backward(steps, params_of(optimizer), made.scale(torch.ones((), device=device)))
    if unscales:
        made.unscale_(optimizer)
    with pytest.raises(RuntimeError, match=r"step with fusedopt\.GradScaler and without unscale_"):
        made.step(optimizer)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_process_groups_are_refused_where_the_option_is_given(device: str) -> None:
    with pytest.raises(RuntimeError, match="DistributedDataParallel and FullyShardedDataParallel"):
        optimizer_of(device, norm_at_backward=True)


def test_process_groups_are_refused_in_the_step(device: str, request: pytest.FixtureRequest) -> None:
    model = torch.nn.Linear(4, 3)
    optimizer = fusedopt.SGD(model.parameters(), lr=0.1, clip_grad_norm=1.0, norm_at_backward=True)
    request.getfixturevalue("process_group")
    torch.nn.parallel.DistributedDataParallel(model)(torch.ones(2, 4)).sum().backward()
    with pytest.raises(RuntimeError, match="DistributedDataParallel and"):
        optimizer.step()


def test_graphs_are_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = optimizer_of(device, norm_at_backward=True, backend="triton")
    train(range(2), ours)
    backward(2, params_of(ours))
    with monkeypatch.context() as patch:
        patch.setattr("fusedopt.stepper.capturing", lambda: True)
        with pytest.raises(RuntimeError, match="does not work inside a CUDA graph"):
            ours.step()
    with monkeypatch.context() as patch:
        patch.setattr("torch.compiler.is_compiling", lambda: True)
        with pytest.raises(RuntimeError, match=r"does not work under torch\.compile"):
            ours.step()


@pytest.mark.parametrize("backend", BACKENDS)
def test_checking_finds_a_rewrite_that_torch_does_not_see(backend: str, device: str) -> None:
    ours, theirs = (
        optimizer_of(device, norm_at_backward="check", backend=backend),
        optimizer_of(device, backend=backend),
    )
    train(range(3), ours, theirs)
    assert_equal(ours, theirs)
    ours.zero_grad()
    backward(3, params_of(ours))
    grad = params_of(ours)[4].grad
    assert grad is not None
    version = grad._version
    grad.data[-1] += 0.125
    assert grad._version == version
    before = [p.clone() for p in params_of(ours)]
    with pytest.raises(RuntimeError, match=r"1 gradients were rewritten .* of shape \(40000,\)"):
        ours.step()
    assert all(map(torch.equal, params_of(ours), before))


def test_checking_sees_nan_as_nan(device: str) -> None:
    for backend in BACKENDS:
        ours = optimizer_of(device, norm_at_backward="check", backend=backend, skip_nonfinite=True)
        train([0], ours)
        ours.zero_grad()
        backward(1, params_of(ours), float("nan"))
        ours.step()
        assert ours.metrics()["skipped_steps"] == 1.0
