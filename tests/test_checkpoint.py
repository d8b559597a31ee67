"""state_dict in and out: exchanged with every form of torch's classes, and continued bit for bit by our own."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import (
    ALL,
    BACKENDS,
    EACH,
    IN_TORCH,
    assert_close,
    assert_equal,
    contents,
    parameters,
    parameters_of,
    params_of,
    train,
)
from table import BASIC, FORMATS, RULES, RuleRow, private

from fusedopt.options import FORMATS as STORAGE

FORMS = {"for-loop": dict(foreach=False), "foreach": dict(foreach=True), "fused": dict(fused=True)}
PLAIN = "as it is"


def forms(row: RuleRow) -> dict[str, dict[str, bool]]:
    """The forms that torch's class has."""
    known = inspect.signature(row.torch_cls).parameters
    return {name: form for name, form in FORMS.items() if form.keys() <= known.keys()} or {PLAIN: {}}


ROWS_AND_FORMS = [(row, form) for row in IN_TORCH for form in forms(row)]
PAIRS = [
    (row, backend, form) for row in EACH for i, form in enumerate(forms(row)) for backend in BACKENDS[: 2 - (i > 0)]
]
"""Kernels with torch's first form alone."""


def copies(params: Any) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def saved(optimizer: Any) -> Any:
    """Its state dict after a trip through torch.save and the safe torch.load."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize(("row", "backend", "form"), PAIRS, ids=str)
def test_torchs_run_continues_here_and_back(row: RuleRow, backend: str, form: str, device: str) -> None:
    """Two steps in torch, two here, two in torch again, beside six uninterrupted steps in torch."""
    options = {**row.options, **forms(row)[form]}
    whole = row.torch_cls(parameters_of(row.cls, device), **options)
    train(range(2), whole)
    ours = row.cls(copies(params_of(whole)), **row.options, backend=backend)
    ours.load_state_dict(saved(whole))
    train((2, 3), whole, ours)
    assert_close(ours, whole, 4)
    back = row.torch_cls(copies(params_of(ours)), **options)
    back.load_state_dict(saved(ours))
    train((4, 5), whole, back)
    assert_close(back, whole, 6)


@pytest.mark.parametrize(("row", "form"), ROWS_AND_FORMS, ids=str)
def test_state_dict_has_torchs_form(row: RuleRow, form: str, device: str) -> None:
    """Groups, keys, and kinds of values; the order of a state's keys is not part of it."""
    options = {**row.options, **forms(row)[form]}
    ours = row.cls(parameters_of(row.cls, device), **options)
    theirs = row.torch_cls(parameters_of(row.cls, device), **options)
    if theirs.state:  # Adagrad makes state in its constructor; here that takes a call
        ours.materialize_state()
    for steps in (0, 1):
        train(range(steps), ours, theirs)
        a, b = saved(ours), saved(theirs)
        for state in b["state"].values():
            if state.get("momentum_buffer", 0) is None:
                del state["momentum_buffer"]
        assert a["param_groups"] == b["param_groups"]
        b["state"] = {key: state for key, state in b["state"].items() if state}
        assert {k: set(s) for k, s in a["state"].items()} == {k: set(s) for k, s in b["state"].items()}
        for key, state in b["state"].items():
            for name, value in state.items():
                found = a["state"][key][name]
                assert type(found) is type(value)
                if isinstance(value, torch.Tensor):
                    assert (found.dtype, found.shape, found.stride()) == (value.dtype, value.shape, value.stride())


@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("row", ALL, ids=str)
def test_a_resumed_run_is_bit_equal_on_either_backend(row: RuleRow, first: str, device: str) -> None:
    second = BACKENDS[first == "eager"]
    whole = row.cls(parameters_of(row.cls, device), **row.options)
    half = row.cls(parameters_of(row.cls, device), **row.options, backend=first)
    train((0, 1), whole, half)
    rest = row.cls(copies(params_of(half)), **row.options, backend=second)
    rest.load_state_dict(saved(half))
    assert_equal(half, rest)
    train((2,), whole, rest)
    assert_equal(whole, rest)


def by_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def by_torch_save(optimizer: Any) -> Any:
    file = io.BytesIO()
    torch.save(optimizer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: tuple[Callable[[Any], Any], ...] = (copy.deepcopy, by_pickle, by_torch_save)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("row", ALL, ids=str)
def test_copies_continue_bit_for_bit(row: RuleRow, way: Callable[[Any], Any], steps: int, device: str) -> None:
    """Also SGD with dampening, which tells the first step from later ones by a count that torch does not keep."""
    optimizer = row.cls(parameters_of(row.cls, device), **row.options, backend="eager")
    train(range(steps), optimizer)
    twin = way(optimizer)
    assert type(twin) is type(optimizer) and twin.backend == "eager"
    assert repr(twin) == repr(optimizer) and twin.defaults == optimizer.defaults
    assert not set(map(id, params_of(twin))) & set(map(id, params_of(optimizer)))
    assert_equal(optimizer, twin)
    train(range(steps, 3), optimizer, twin)
    assert_equal(optimizer, twin)


def test_a_copy_shares_its_parameters_with_a_copied_module(device: str) -> None:
    module = torch.nn.Linear(3, 2, device=device)
    optimizer = RULES[7].cls(module.parameters(), lr=0.1)
    train([0], optimizer)
    module_copy, twin = copy.deepcopy((module, optimizer))
    assert all(p is q for p, q in zip(module_copy.parameters(), params_of(twin), strict=True))
    before = module.weight.detach().clone()
    train([1], twin)
    assert torch.equal(module.weight, before) and not torch.equal(module_copy.weight, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BASIC)
def test_private_options_survive(name: str, backend: str, device: str) -> None:
    """They come back from a file, formats but to those who have them, and stay when a file without them is loaded."""
    row = RULES[7]
    dtype = torch.bfloat16 if "master_weights" in FORMATS[name] else torch.float32

    def make(params: Any) -> Any:
        return private(row.cls(params, **row.options, backend=backend), **FORMATS[name])

    whole, half = (make(parameters(device, (3, 4), dtype=dtype)) for _ in range(2))
    train((0,), whole, half)
    file = saved(half)
    for prepared in (True,) if FORMATS[name].keys() & set(STORAGE) else (True, False):
        rest = row.cls(copies(params_of(half)), **row.options, backend=backend)
        rest = make(params_of(rest)) if prepared else rest
        rest.load_state_dict(copy.deepcopy(file))
        assert [g["fusedopt"] for g in rest.param_groups] == [g["fusedopt"] for g in half.param_groups]
        assert_equal(half, rest)
    train((1,), whole, rest)
    assert_equal(whole, rest)

    plain = copy.deepcopy(file)
    del plain["param_groups"][0]["fusedopt"]
    rest = make(copies(params_of(half)))
    rest.load_state_dict(plain)
    assert rest.param_groups[0]["fusedopt"] == {"version": 1, **FORMATS[name]}


STATE_DTYPES = [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.float32)]


@pytest.mark.parametrize(("weight", "state"), STATE_DTYPES, ids=str)
@pytest.mark.parametrize("row", [row for row in EACH if not any(slot.shape for slot in row.cls.rule.state)], ids=str)
def test_state_keeps_its_dtype(row: RuleRow, weight: torch.dtype, state: torch.dtype, device: str) -> None:
    """torch casts state to its parameter's dtype when it loads; here a saved dtype stays, and is stepped in."""
    optimizer = row.cls(parameters_of(row.cls, device, weight), **row.options)
    names = [slot.name for slot in row.cls.rule.slots(optimizer.param_groups[0])]
    for p in params_of(optimizer):
        for name in names:
            optimizer.state[p][name] = torch.zeros_like(p, dtype=state)
    train((0, 1), optimizer)
    twin = row.cls(copies(params_of(optimizer)), **row.options)
    twin.load_state_dict(saved(optimizer))
    train((2,), optimizer, twin)
    assert_equal(optimizer, twin)
    for _, found in contents(twin):
        assert {found.pop(name).dtype for name in names} == {state}
        assert {number.dtype for number in found.values()} <= {torch.float32}


@pytest.mark.parametrize("row", EACH, ids=str)
def test_fp32_state_of_a_torch_file_is_kept_for_bf16_weights(row: RuleRow, device: str) -> None:
    theirs = row.torch_cls(parameters_of(row.cls, device), **row.options)
    train((0,), theirs)
    ours = row.cls([torch.nn.Parameter(p.detach().bfloat16()) for p in params_of(theirs)], **row.options)
    file = saved(theirs)
    ours.load_state_dict(file)
    for (_, state), other in zip(contents(ours), file["state"].values(), strict=True):
        torch.testing.assert_close(
            state, {k: torch.as_tensor(v, dtype=torch.float32) for k, v in other.items()}, rtol=0, atol=0,
            check_device=False,
        )  # fmt: skip
    train((1,), ours)
    assert all(v.dtype == torch.float32 for _, state in contents(ours) for v in state.values())
