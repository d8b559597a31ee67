"""Every kind of hook runs exactly once, whatever class or wrapper the step is called through."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compare import EACH, assert_equal, give_gradients, parameters, parameters_of, params_of, train
from table import RuleRow
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import fusedopt

KINDS = ("pre", "post", "state_dict pre", "state_dict post", "load pre", "load post", "global pre", "global post")


@pytest.fixture
def counted() -> Iterator[Any]:
    """Registers one hook of every kind on an optimizer and counts their calls."""
    handles = []

    def register(optimizer: Any) -> Counter[str]:
        calls: Counter[str] = Counter()

        def hook(kind: str) -> Any:
            def count(hooked: Any, *_: Any) -> None:
                calls[kind] += hooked is optimizer

            return count

        registrars = (
            optimizer.register_step_pre_hook,
            optimizer.register_step_post_hook,
            optimizer.register_state_dict_pre_hook,
            optimizer.register_state_dict_post_hook,
            optimizer.register_load_state_dict_pre_hook,
            optimizer.register_load_state_dict_post_hook,
            register_optimizer_step_pre_hook,
            register_optimizer_step_post_hook,
        )
        handles.extend(r(hook(kind)) for r, kind in zip(registrars, KINDS, strict=True))
        return calls

    yield register
    for handle in handles:
        handle.remove()


class Inherits(fusedopt.AdamW):
    """A user's class without a step of its own."""


class Steps(fusedopt.AdamW):
    """A user's class whose step does something and calls ours; in torch such a class runs every hook twice."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Deeper(Steps):
    """One more level, with a step of its own again."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("first", [fusedopt.AdamW, Deeper], ids=lambda c: c.__name__)
@pytest.mark.parametrize("cls", [*(row.cls for row in EACH), Inherits, Steps, Deeper], ids=lambda c: c.__name__)
def test_every_hook_once(cls: Any, first: Any, counted: Any, device: str) -> None:
    first(parameters(device))  # torch's patch of step depends on which class is made first; ours must not
    optimizer = cls(parameters_of(cls, device))
    calls = counted(optimizer)
    train([0], optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == dict.fromkeys(KINDS, 1)
    train([1], optimizer)
    assert calls["pre"] == calls["post"] == calls["global pre"] == calls["global post"] == 2


def test_hooks_see_the_step_from_both_sides(device: str) -> None:
    """Gradients that a pre-hook changes are used; a post-hook sees the new parameters; arguments may be replaced."""
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = fusedopt.SGD([p], lr=1.0)
    p.grad = torch.zeros_like(p)
    seen = []
    closures = []

    def before(_: Any, args: Any, kwargs: Any) -> Any:
        assert p.grad is not None
        p.grad.add_(1.0)
        return args, {**kwargs, "closure": lambda: closures.append(1)}

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(lambda *_: seen.append(p.detach().tolist()))
    optimizer.step()
    assert seen == [[0.0, 0.0, 0.0]] and closures == [1]


def test_state_dict_hooks_may_change_what_is_saved_and_loaded(device: str) -> None:
    optimizer = fusedopt.AdamW(parameters(device))
    train([0], optimizer)

    def annotate(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {**state_dict, "note": 1}

    def halve(_: Any, state_dict: dict[str, Any]) -> None:
        state_dict["state"] = {
            key: {**state, "exp_avg": state["exp_avg"] / 2} for key, state in state_dict["state"].items()
        }

    optimizer.register_state_dict_post_hook(annotate)
    optimizer.register_load_state_dict_pre_hook(halve)
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    expected = [state["exp_avg"] / 2 for state in saved["state"].values()]
    optimizer.load_state_dict(saved)
    found = [optimizer.state[p]["exp_avg"] for p in params_of(optimizer)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1  # ours is gone again


def test_profiler_labels_are_torchs(device: str) -> None:
    optimizer = fusedopt.AdamW(parameters(device))
    give_gradients(0, params_of(optimizer))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = Counter(event.key for event in profile.key_averages())
    assert names["Optimizer.step#AdamW.step"] == 1 and names["Optimizer.zero_grad#AdamW.zero_grad"] == 1


@pytest.mark.parametrize("row", EACH, ids=str)
def test_hooks_stay_behind_on_a_copy_as_in_torch(row: RuleRow, device: str) -> None:
    optimizer = row.cls(parameters_of(row.cls, device), **row.options)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    twin = copy.deepcopy(optimizer)
    train(range(2), optimizer, twin)
    assert calls == [1, 1]
    assert_equal(optimizer, twin)


class Wrapper(torch.optim.Optimizer):
    """What training frameworks put around an optimizer: same attributes, and a step that calls the wrapped one."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__ = {key: value for key, value in optimizer.__dict__.items() if key != "step"}
        wrapped_class: Any = type("Wrapped" + type(optimizer).__name__, (type(self), type(optimizer)), {})
        self.__class__ = wrapped_class
        self._wrapped = optimizer

    def step(self, closure: Any = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  # torch declares overloads
        return self._wrapped.step(closure)


@pytest.mark.parametrize("row", [row for row in EACH if row.cls.rule.sparse != "only"], ids=str)
def test_dynamic_subclass_of_a_framework(row: RuleRow, counted: Any, device: str) -> None:
    inner, plain = (row.cls(parameters_of(row.cls, device), **row.options) for _ in range(2))
    calls = counted(inner)
    wrapped: Any = Wrapper(inner)
    assert isinstance(wrapped, row.cls) and type(wrapped).__name__ == f"Wrapped{row.cls.__name__}"
    for step in range(2):
        give_gradients(step, params_of(plain), params_of(wrapped))
        plain.step()
        wrapped.step()
        wrapped.zero_grad(set_to_none=False)
    wrapped.load_state_dict(wrapped.state_dict())
    assert calls["pre"] == calls["post"] == calls["global pre"] == 2
    give_gradients(2, params_of(plain), params_of(wrapped))
    plain.step()
    wrapped.step()
    assert repr(wrapped).startswith("Wrapped")
    assert all(torch.equal(p, q) for p, q in zip(params_of(plain), params_of(wrapped), strict=True))
