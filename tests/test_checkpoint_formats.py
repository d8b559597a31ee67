"""Checkpoints of low-precision state and weights: continued bit for bit, converted, exported to torch, refused."""

import copy
import pickle
import warnings
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from compare import BACKENDS, assert_equal, contents, parameters, params_of, reference, train
from table import RULES, RuleRow
from test_checkpoint import by_torch_save, copies, saved
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from fusedopt.encoded import decode, encode, values
from fusedopt.formats import QUANTISED, WEIGHTS
from fusedopt.masters import held
from fusedopt.rule import Slot

ROWS = [
    next(row for row in RULES if (row.name, row.label) == name)
    for name in (("adamw", "plain"), ("sgd", "dampening"), ("lion", "decay"), ("adagrad", "lr_decay"))
]
ADAMW = ROWS[0]
SHAPES = ((48, 90), (5,))
"""A matrix that is quantised, whose rows are no whole groups, and a vector that is not."""

RUNS: dict[str, dict[str, Any]] = {
    "int8, split8": dict(state_dtype="int8", master_weights="split8"),
    "int4, split8 to nearest": dict(state_dtype="int4", master_weights="split8", master_rounding="nearest"),
    "float8_e4m3, kahan": dict(state_dtype="float8", master_weights="kahan", state_rounding="stochastic"),
    "float8_e5m2, float32": dict(state_dtype="float8_e5m2", master_weights="float32", state_rounding="stochastic"),
    "int4, stochastic": dict(state_dtype="int4", master_weights="stochastic", state_rounding="stochastic", seed=3),
    "bfloat16, split16": dict(state_dtype="bfloat16", master_weights="split16", state_rounding="stochastic"),
    "float16": dict(state_dtype="float16", state_rounding="stochastic"),
}
STATES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3", "float8_e5m2", "int4", None)
MASTERS = (*WEIGHTS, None)

pytestmark = pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose


def made(row: RuleRow, params: Any, backend: str = "eager", **formats: Any) -> Any:
    return row.cls(params, **row.options, **formats, backend=backend)


def weights(device: str, dtype: torch.dtype = torch.bfloat16) -> list[torch.nn.Parameter]:
    return parameters(device, *SHAPES, dtype=dtype)


def slots(row: RuleRow) -> tuple[Slot, ...]:
    return row.cls.rule.slots({"amsgrad": False, **row.options})


def bit_equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    bits = [x.detach().reshape(-1).contiguous().view(torch.uint8) for x in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


# --------------------------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("first", BACKENDS)
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_a_resumed_run_is_bit_equal_on_either_backend(row: RuleRow, name: str, first: str, device: str) -> None:
    """Rounded stochastically: the streams go on, whatever seed the new optimizer was given."""
    whole, half = (made(row, weights(device), backend, **RUNS[name]) for backend in ("eager", first))
    train((0, 1), whole, half)
    rest = made(row, copies(params_of(half)), BACKENDS[first == "eager"], **{**RUNS[name], "seed": 11})
    rest.load_state_dict(saved(half))
    assert_equal(half, rest)
    train((2,), whole, rest)
    assert_equal(whole, rest)
    if "streams" in whole.param_groups[0]["fusedopt"]:
        assert rest.param_groups == [{**group, "params": params_of(rest)} for group in whole.param_groups]


def by_state_dict(optimizer: Any) -> Any:
    twin = type(optimizer)(copies(params_of(optimizer)), **optimizer._options, backend="eager")
    twin.load_state_dict(saved(optimizer))
    return twin


def by_pickle(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def moved(optimizer: Any) -> Any:
    return copy.deepcopy(optimizer).to("cpu")


WAYS: tuple[Callable[[Any], Any], ...] = (by_state_dict, copy.deepcopy, by_pickle, by_torch_save, moved)


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("way", WAYS, ids=lambda w: w.__name__)
@pytest.mark.parametrize("name", ["int8, split8", "int4, stochastic"])
def test_copies_continue_bit_for_bit(name: str, way: Callable[[Any], Any], steps: int, device: str) -> None:
    """Also from before the first step, when no stream has a number yet."""
    optimizer = made(ADAMW, weights(device), **RUNS[name])
    train(range(steps), optimizer)
    twin = way(optimizer)
    train(range(steps, 2), optimizer, twin)
    assert_equal(optimizer, twin)


def test_a_file_without_streams_keeps_those_here(device: str) -> None:
    source = made(ADAMW, weights(device), seed=5, state_dtype="int8")
    train((0,), source)
    target = made(ADAMW, copies(params_of(source)), seed=7, master_weights="stochastic")
    target.load_state_dict(saved(source))
    assert target.param_groups[0]["fusedopt"] == {"version": 1, "seed": 7, "master_weights": "stochastic"}


# ------------------------------------------------------------------------------------------------------- converting
def named_formats(row: RuleRow, name: str | None) -> dict[str, Any]:
    return {} if name is None else {"state_dtype": name}


@pytest.mark.parametrize("source", STATES)
@pytest.mark.parametrize("row", ROWS[:2], ids=str)
def test_state_is_converted_to_the_format_here(row: RuleRow, source: str | None, device: str) -> None:
    """Its values are the file's, rounded once to nearest; codes of the same format stay as they are; nothing warns."""
    half = made(row, weights(device), **named_formats(row, source))
    train((0, 1), half)
    file = saved(half)
    for target in STATES:
        rest = made(row, copies(params_of(half)), **named_formats(row, target))
        with warnings.catch_warnings(action="error"):
            rest.load_state_dict(copy.deepcopy(file))
        assert rest._options == named_formats(row, target)
        assert rest.param_groups[0].get("fusedopt", {}).get("state_dtype") == target
        rest.materialize_state()
        for (p, old), (_, new) in zip(contents(half), contents(rest), strict=True):
            for slot in slots(row):
                had, has = values(old, slot, p.shape), values(new, slot, p.shape)
                assert had is not None and has is not None
                if source == target:
                    assert old.keys() == new.keys() and all(bit_equal(old[key], new[key]) for key in old)
                elif target in QUANTISED[slot.kind] and p.dim() == 2:
                    form = QUANTISED[slot.kind][target]
                    assert slot.name not in new and bit_equal(has, decode(*encode(had.float(), form), form, p.shape))
                else:
                    plain = torch.float32 if target in QUANTISED[slot.kind] else getattr(torch, target or "", had.dtype)
                    assert f"{slot.name}_q" not in new and bit_equal(has, had.to(plain))
        train((2,), rest)


@pytest.mark.parametrize(
    ("dtype", "source"),
    [(torch.bfloat16, m) for m in MASTERS] + [(torch.float16, m) for m in MASTERS if m not in ("split16", "split8")],
    ids=str,
)
def test_masters_are_converted_to_the_format_here(source: str | None, dtype: torch.dtype, device: str) -> None:
    """To the nearest that the new format holds; the parameter is rounded anew where ties differ."""
    half = made(ADAMW, weights(device, dtype), master_weights=source)
    train((0, 1), half)
    file = saved(half)
    for target in MASTERS:
        if dtype == torch.float16 and target in ("split16", "split8"):
            continue
        rest = made(ADAMW, copies(params_of(half)), master_weights=target)
        rest.load_state_dict(copy.deepcopy(file))
        rest.materialize_state()
        for (p, old), (q, new) in zip(contents(half), contents(rest), strict=True):
            x, y = held(p, old), held(q, new)
            form = WEIGHTS.get(target or "")
            if source == target or target in ("float32", "split16"):
                assert bit_equal(x, y)
            elif form is not None and form.key is not None and source in WEIGHTS and WEIGHTS[source].key is not None:
                weight, beside = torch.empty_like(q.detach()), form.initial(q)
                form.store(x, weight, beside, None)
                assert bit_equal(y, form.load(weight, beside)) and torch.equal(q, weight)
            else:
                assert bit_equal(y, p.detach().float())
            assert {"param_residual", "master_param"} & new.keys() == ({form.key} - {None} if form else set())
        train((2,), rest)


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("master", [m for m in WEIGHTS if WEIGHTS[m].key is not None])
def test_a_wider_model_gets_the_bits_beside_its_weights(master: str, wide: torch.dtype, device: str) -> None:
    """A bf16 run goes on in fp32: nothing that it held is lost, and what was written to since stays."""
    half = made(ADAMW, weights(device), master_weights=master)
    train((0, 1), half)
    rest = made(ADAMW, [torch.nn.Parameter(p.detach().to(wide)) for p in params_of(half)])
    rest.load_state_dict(saved(half))
    with torch.no_grad():
        params_of(rest)[1][0] = 0.1
    rest.materialize_state()
    for (p, old), (q, new) in zip(contents(half), contents(rest), strict=True):
        assert not {"param_residual", "master_param"} & new.keys()
        start = 1 if q.dim() == 1 else 0
        assert bit_equal(held(p, old).to(wide)[start:], q.detach()[start:])
    assert params_of(rest)[1][0] == torch.tensor(0.1, dtype=wide)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [row for row in ROWS if row.in_torch], ids=str)
def test_a_file_of_torch_loads_into_any_format(row: RuleRow, backend: str, device: str) -> None:
    theirs = reference(row.torch_cls, weights(device), **row.options)
    train((0, 1), theirs)
    for name in RUNS if backend == "eager" else ["int8, split8"]:
        ours = made(row, copies(params_of(theirs)), backend, **RUNS[name])
        ours.load_state_dict(saved(theirs))
        # the momentum of SGD, which keeps no step count in torch, must count as begun
        twin = made(row, copies(params_of(theirs)), master_weights=RUNS[name].get("master_weights"))
        twin.load_state_dict(saved(theirs))
        train((2,), ours, twin)
        for (p, a), (q, b) in zip(contents(ours), contents(twin), strict=True):
            for slot in slots(row):
                x, y = values(a, slot, p.shape), values(b, slot, p.shape)
                assert x is not None and y is not None
                # a code of int4 is within a seventh of the group's largest number, before and after the step, the log
                # codes of nonnegative state within a quarter of each number; the weight moves by lr at most and rounds
                assert (x.float() - y.float()).abs().max() <= 0.5 * y.float().abs().max()
            assert (p.float() - q.float()).abs().max() <= 0.5


def test_wider_masters_make_wider_state_of_what_was_bf16(device: str) -> None:
    """Under master_weights state is fp32 unless named; slots that a dict does not name are never cast down."""
    low, high = (made(ADAMW, weights(device), state_dtype=name) for name in ("bfloat16", "float32"))
    train((0,), low, high)
    ours = made(ADAMW, weights(device), master_weights="kahan")
    ours.load_state_dict(saved(low))
    named = made(ADAMW, weights(device), state_dtype={"exp_avg": "int8"})
    named.load_state_dict(saved(high))
    for optimizer in (ours, named):
        optimizer.materialize_state()
        assert all(state["exp_avg_sq"].dtype == torch.float32 for _, state in contents(optimizer))
    assert named.state[params_of(named)[0]]["exp_avg_q"].dtype == torch.int8


# ------------------------------------------------------------------------------------ torch.distributed.checkpoint
def net(device: str) -> torch.nn.Module:
    module = torch.nn.Sequential(torch.nn.Linear(90, 48), torch.nn.Linear(48, 3)).to(device, torch.bfloat16)
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(parameters(device, tuple(p.shape), seed=i)[0])
    return module


@pytest.mark.parametrize(("name", "steps"), list(product(["int8, split8", "int4, stochastic"], (0, 2))))
def test_distributed_state_dict(name: str, steps: int, device: str) -> None:
    """State is a flat dict of tensors for it; before the first step it makes one with lr 0, which changes nothing."""
    source, target = net(device), net(device)
    ours = made(ADAMW, source.parameters(), **RUNS[name])
    train(range(steps), ours)
    before = ours.master_state_dict()
    found: Any = get_optimizer_state_dict(source, ours)
    assert all(bit_equal(x, before[key]) for key, x in ours.master_state_dict().items())
    target.load_state_dict(source.state_dict())
    loaded = made(ADAMW, target.parameters(), **RUNS[name])
    set_optimizer_state_dict(target, loaded, copy.deepcopy(found))
    assert_equal(ours, loaded)
    train([steps], ours, loaded)
    assert_equal(ours, loaded)
