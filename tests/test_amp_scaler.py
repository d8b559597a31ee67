"""`fusedopt.GradScaler` as a scaler: order of calls, errors, scale, other optimizers, wrappers, its page."""

import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import assert_equal, parameters
from scaled import OURS, STOCK, adamw, bits, iterate, scale_gradients

import fusedopt


def unstepped(scaler: Any, optimizer: Any) -> None:
    scale_gradients(0, scaler, optimizer)


def twice(scaler: Any, optimizer: Any) -> None:
    unstepped(scaler, optimizer)
    scaler.step(optimizer)
    scaler.step(optimizer)


def unscaled_twice(scaler: Any, optimizer: Any) -> None:
    unstepped(scaler, optimizer)
    scaler.unscale_(optimizer)
    scaler.unscale_(optimizer)


def unscaled_after_step(scaler: Any, optimizer: Any) -> None:
    unstepped(scaler, optimizer)
    scaler.step(optimizer)
    scaler.unscale_(optimizer)


def before_scale(scaler: Any, optimizer: Any) -> None:
    scaler.step(optimizer)


def with_closure(scaler: Any, optimizer: Any) -> None:
    unstepped(scaler, optimizer)
    scaler.step(optimizer, closure=lambda: 1.0)


def without_gradients(scaler: Any, optimizer: Any) -> None:
    unstepped(scaler, optimizer)
    optimizer.zero_grad()
    scaler.step(optimizer)


def without_gradients_unscaled(scaler: Any, optimizer: Any) -> None:
    unstepped(scaler, optimizer)
    optimizer.zero_grad()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)


def update_alone(scaler: Any, optimizer: Any) -> None:
    unstepped(scaler, optimizer)
    scaler.update()


def pickled_between(scaler: Any, optimizer: Any) -> None:
    unstepped(scaler, optimizer)
    scaler.step(optimizer)
    pickle.dumps(scaler)


@pytest.mark.parametrize(
    "script",
    [
        twice, unscaled_twice, unscaled_after_step, before_scale, with_closure, without_gradients,
        without_gradients_unscaled, update_alone, pickled_between,
    ],
)  # fmt: skip
def test_wrong_orders_raise_what_torch_raises(script: Callable[[Any, Any], None], device: str) -> None:
    errors = []
    for scaler_class, optimizer in (
        (STOCK, torch.optim.AdamW(parameters(device, (3, 4), (5,), ()))),
        (OURS, adamw(device)),
    ):
        with pytest.raises((RuntimeError, AssertionError)) as error:
            script(scaler_class(device), optimizer)
        errors.append((error.type, str(error.value)))
    assert errors[0] == errors[1]


def test_other_optimizers_are_stepped_as_by_torch(device: str) -> None:
    """Beside one of ours under one scaler; an overflow in ours lowers the scale that both read."""
    theirs, reference = (torch.optim.AdamW(parameters(device, (3, 4), (5,), ()), fused=fused) for fused in (True, True))
    ours, scaler, stock = adamw(device), OURS(device, 8.0), STOCK(device, 8.0)
    for step in range(4):
        bad = math.inf if step == 1 else None
        scale_gradients(step, scaler, ours, theirs, bad=bad)
        scale_gradients(step, stock, reference)
        iterate(scaler, ours, theirs)
        iterate(stock, reference)
        stock.update(scaler.get_scale())
        assert_equal(theirs, reference)
        assert scaler.get_scale() == (8.0 if step < 1 else 4.0)


def test_flags_of_several_optimizers_stay_apart(device: str) -> None:
    """`update` sums flags in place: the next step of a clean optimizer must not see another's overflow."""
    clean, other = adamw(device, backend="eager"), adamw(device, backend="triton")
    for order in ((clean, other), (other, clean)):
        scaler = OURS(device, 8.0)
        for step in range(3):
            scale_gradients(step, scaler, *order, bad=math.nan if step == 1 else None)
            before = [bits(optimizer) for optimizer in order]
            iterate(scaler, *order)
            after = [bits(optimizer) for optimizer in order]
            assert [a == b for a, b in zip(after, before, strict=True)] == [step == 1, False]
        assert scaler.get_scale() == 4.0


def test_state_dicts_growth_and_new_scales_are_torchs(device: str) -> None:
    ours, theirs = OURS(device, 8.0, 4.0, 0.25, 2), STOCK(device, 8.0, 4.0, 0.25, 2)
    optimizer, reference = adamw(device), adamw(device)
    for step in range(5):
        for scaler, each in ((ours, optimizer), (theirs, reference)):
            scale_gradients(step, scaler, each, bad=math.inf if step == 3 else None)
            scaler.step(each)
            scaler.update(16.0 if step == 4 else None)
        assert ours.state_dict() == theirs.state_dict()
        ours, theirs = pickle.loads(pickle.dumps(ours)), pickle.loads(pickle.dumps(theirs))
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())
    assert_equal(optimizer, reference)


def test_a_disabled_scaler_only_steps(device: str) -> None:
    optimizer, plain, scaler = adamw(device), adamw(device), OURS(device, enabled=False)
    for step in range(2):
        scale_gradients(step, scaler, optimizer, plain)
        optimizer.step() if step else scaler.step(optimizer, closure=None)
        scaler.update()
        plain.step()
    assert_equal(optimizer, plain)
    assert scaler.state_dict() == {} and scaler.get_scale() == 1.0


@pytest.mark.parametrize("users", [None, 2.0])
@pytest.mark.parametrize("unscales", [False, True])
def test_a_step_that_raises_leaves_nothing_behind(unscales: bool, users: float | None, device: str) -> None:
    """The optimizer is as it was, and the iteration can be finished."""
    optimizer, plain, scaler = adamw(device), adamw(device), OURS(device, 8.0)
    scale_gradients(0, scaler, optimizer)
    if unscales:
        scaler.unscale_(optimizer)
    if users is not None:
        optimizer.grad_scale = users
    before = set(vars(optimizer))

    def fail(*_: Any) -> None:
        raise ValueError("hook")

    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(ValueError, match="hook"):
        scaler.step(optimizer)
    assert set(vars(optimizer)) == before and getattr(optimizer, "grad_scale", None) == users
    assert not optimizer._check_nonfinite
    handle.remove()
    scaler.step(optimizer)
    scaler.update()
    scale_gradients(0, STOCK(device, 1.0 / (users or 1.0)), plain)
    plain.step()
    assert_equal(optimizer, plain)


class Wrapper(torch.optim.Optimizer):
    """As trainers wrap: a dynamic subclass that shares the attributes and steps the optimizer inside."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = dict(optimizer.__dict__)
        wrapped_class: Any = type("Wrapped", (type(self), type(optimizer)), {})
        self.__class__ = wrapped_class
        self.inside = optimizer

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares overloads
        return self.inside.step(closure)


def test_a_wrapper_that_steps_another_object_is_refused(device: str) -> None:
    """It would not get the scale: its step would go eight times too far."""
    optimizer, scaler = adamw(device), OURS(device, 8.0)
    scale_gradients(0, scaler, optimizer)
    iterate(scaler, optimizer)
    wrapped = Wrapper(optimizer)
    scale_gradients(1, scaler, optimizer)
    with pytest.raises(RuntimeError, match="wraps another optimizer"):
        scaler.step(wrapped)
    scaler.step(optimizer)


def test_the_page_on_mixed_precision_runs() -> None:
    text = (Path(fusedopt.__file__).parent / "docs" / "mixed_precision.md").read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert names["unchanged"] and names["scaler"].get_scale() == 2.0**15
