"""Random streams: the same numbers under any grouping that keeps names or order, others for every seed, parameter,
purpose and step, and rounding that is right on average."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from format_cases import assert_same, each_backend, give, parameters, params_of, same, tensors_of

import fusedopt

SHAPES = ((64, 64), (5,), (70, 100), (33, 7))
NOISY: dict[str, Any] = dict(master_weights="split8", state_dtype="int8", state_rounding="stochastic")
AdamW: Any = fusedopt.AdamW


def run(optimizer: Any, steps: Any = range(3)) -> Any:
    """Steps with gradients that depend on a parameter's place among all."""
    for step in steps:
        give(step, params_of(optimizer), all_of=True)
        optimizer.step()
    return optimizer


def by_shape(optimizer: Any) -> dict[tuple[int, ...], dict[str, torch.Tensor]]:
    return {tuple(x["parameter"].shape): x for x in tensors_of(optimizer)}


def low(device: str) -> list[Any]:
    return parameters(device, torch.bfloat16, SHAPES)


@each_backend
def test_grouping_changes_no_bit(backend: str, device: str) -> None:
    whole = run(AdamW(low(device), **NOISY, backend=backend))
    p = low(device)
    assert_same(whole, run(AdamW([{"params": p[:1]}, {"params": p[1:]}], **NOISY, backend=backend)))
    p = low(device)
    later = AdamW(p[:2], **NOISY, backend=backend)
    later.add_param_group({"params": p[2:]})
    assert_same(whole, run(later))


def test_a_group_that_is_not_random_keeps_its_ordinals(device: str) -> None:
    whole = run(AdamW(low(device), **NOISY))
    p = low(device)
    groups = [{"params": p[:2], "master_weights": "float32", "state_rounding": "nearest"}, {"params": p[2:]}]
    mixed = run(AdamW(groups, **NOISY))
    for shape in SHAPES[2:]:
        x, y = by_shape(whole)[shape], by_shape(mixed)[shape]
        assert all(same(x[key], y[key]) for key in x)


def run_named(names: list[str], device: str, **options: Any) -> Any:
    """Gradients depend on the name alone."""
    known = dict(zip("abcd", low(device), strict=True))
    optimizer = AdamW([(name, known[name]) for name in names], **options)
    for step in range(2):
        for i, p in enumerate(known.values()):
            give(10 * step + i, [p], all_of=True)
        optimizer.step()
    return {name: {"parameter": known[name].detach(), **optimizer.state[known[name]]} for name in names}


def test_names_change_no_bit_in_any_order_and_company(device: str) -> None:
    whole = run_named(list("abcd"), device, **NOISY)
    for names in ("dcba", "bdac", "c", "ad"):
        found = run_named(list(names), device, **NOISY)
        for name in names:
            assert all(same(found[name][key], whole[name][key]) for key in whole[name])


def draws(device: str, names: Any = None, steps: int = 1, backend: str = "eager", **options: Any) -> list[torch.Tensor]:
    """Which elements of some equal weights the last step rounded down."""
    params = [torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device=device)) for _ in range(2)]
    optimizer = fusedopt.SGD(
        params if names is None else list(zip(names, params, strict=True)), lr=2.0**-9, master_weights="stochastic",
        backend=backend, **options,  # pyright: ignore[reportArgumentType] # one of the backends
    )  # fmt: skip
    for _ in range(steps):
        for p in params:
            p.data.fill_(1.0)
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all(optimizer.state[p] == {"step": torch.tensor(float(steps))} for p in params)
    return [p.detach() != 1.0 for p in params]


@each_backend
def test_seeds_parameters_names_and_steps_draw_numbers_of_their_own(backend: str, device: str) -> None:
    """SGD without momentum has no other state than the count that its numbers go by. 2⁻⁹ is half of the distance
    between 1 and the bf16 number below it: 4096 fair coins agree in 2048 ± 32 places with others."""
    found = [
        *draws(device, backend=backend),
        *draws(device, backend=backend, seed=1),
        *draws(device, backend=backend, seed=-1),
        *draws(device, backend=backend, seed=2**64),
        *draws(device, backend=backend, names=["a", "b"]),
        *draws(device, backend=backend, steps=2),
        *draws(device, backend=backend, steps=3),
    ]
    again = draws(device, backend=backend)
    assert torch.equal(found[0], again[0]) and torch.equal(found[1], again[1])
    for i, x in enumerate(found):
        assert abs(int(x.sum()) - 2048) < 5 * 32
        for y in found[:i]:
            assert abs(int((x == y).sum()) - 2048) < 5 * 32


def test_what_rounds_weights_and_slots_is_independent(device: str) -> None:
    """One value between two numbers of bf16 in the weight and both slots: three different patterns."""
    p = torch.nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16, device=device))
    options: Any = dict(master_weights="stochastic", state_dtype="bfloat16", state_rounding="stochastic")
    optimizer = AdamW([p], lr=2.0**-9, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0, **options)
    p.grad = torch.full_like(p, 1.0078125 / 0.99609375)
    optimizer.step()
    state = optimizer.state[p]
    patterns = [t == t.flatten().min() for t in (p.detach(), state["exp_avg"], state["exp_avg_sq"])]
    for i, x in enumerate(patterns):
        for y in patterns[:i]:
            assert not torch.equal(x, y) and not torch.equal(x, ~y)


@each_backend
def test_groups_that_come_and_go(backend: str, device: str) -> None:
    """Streams stay with their parameters; a new parameter gets one that nobody has."""
    p = low(device)
    optimizer = AdamW([{"params": [q]} for q in p], **NOISY, backend=backend)
    run(optimizer, range(1))
    before = [group["fusedopt"]["streams"] for group in optimizer.param_groups]
    assert before == [[0], [1], [2], [3]]
    del optimizer.state[p[1]], optimizer.param_groups[1]
    optimizer.add_param_group({"params": [torch.nn.Parameter(p[1].detach().clone())]})
    run(optimizer, range(1))
    assert [group["fusedopt"]["streams"] for group in optimizer.param_groups] == [[0], [2], [3], [4]]


@each_backend
@pytest.mark.parametrize("how", ["file", "copy"])
def test_a_resumed_run_goes_on_with_the_same_numbers(how: str, backend: str, device: str) -> None:
    """Also in an optimizer of another seed, whose own streams are replaced by those of the file."""
    first = run(AdamW(low(device), **NOISY, seed=5, backend=backend), range(2))
    if how == "copy":
        again = copy.deepcopy(first)
    else:
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        file.seek(0)
        again = AdamW([torch.nn.Parameter(p.detach().clone()) for p in params_of(first)], **NOISY, backend=backend)
        again.load_state_dict(torch.load(file))
    assert_same(run(first, range(2, 4)), run(again, range(2, 4)))


@each_backend
@pytest.mark.parametrize("state", ["bfloat16", "int8", "float8_e4m3", "int4"])
def test_state_is_right_on_average(state: str, backend: str, device: str) -> None:
    """The mean over 4096 elements, 64 groups whose first element fixes the scale, within five of its deviations."""
    p = torch.nn.Parameter(torch.zeros(64, 64, device=device))
    optimizer = AdamW([p], lr=0.0, betas=(0.5, 0.5), state_dtype=state, state_rounding="stochastic", backend=backend)
    g = torch.full((64, 64), 0.4321, device=device)
    g[:, 0] = 1.0
    p.grad = g
    optimizer.step()
    from fusedopt.encoded import values

    for slot, exact in zip(optimizer.rule.state[:2], (0.5 * 0.4321, 0.5 * 0.4321**2), strict=True):
        kept = values(optimizer.state[p], slot, p.shape)
        assert kept is not None
        rest = kept.float()[:, 1:]
        low_, high = float(rest.min()), float(rest.max())
        assert low_ < exact < high, "not rounded at random"
        share = (exact - low_) / (high - low_)
        deviation = (high - low_) * math.sqrt(share * (1 - share) / rest.numel())
        # 16 random bits and fp32 move the mean by 2⁻¹⁵ of a step and by 2⁻²² of the value
        assert abs(float(rest.double().mean()) - exact) < 5 * deviation + 2**-15 * (high - low_) + 2**-22


DECAY, STEPS = 1e-4, 150


@pytest.mark.parametrize("weights", ["split8", "stochastic", "kahan", "split16", "float32"])
def test_decay_alone_moves_weights_as_in_fp32(weights: str, device: str) -> None:
    """Each step is 1/50 of the distance between two bf16 numbers, and lost in plain bf16.

    Error of the mean of 4096: stochastic rounding to a spacing u moves an element by u·√(f(1 − f)) a step, f ≤ d/u the
    share of u that a step d takes, so by √(u·d·n/4096) in n steps, five times that; kahan's residual, below 2⁻⁸, is
    rounded to nearest 2⁻¹⁶, by half of it; all of them to fp32.
    """
    p = torch.nn.Parameter(torch.full((64, 64), 1.5, dtype=torch.bfloat16, device=device))
    optimizer = AdamW([p], lr=0.1, weight_decay=DECAY / 0.1, master_weights=weights, backend="eager")
    p.grad = torch.zeros_like(p)
    for _ in range(STEPS):
        optimizer.step()
    from fusedopt.state import held_format

    form = held_format(p, optimizer.state[p])
    x = p.detach().float() if form is None else form.load(p.detach(), optimizer.state[p][form.key or ""])
    fp32 = STEPS * 2.0**-24 * 1.5
    allowed = {
        "split8": 5 * math.sqrt(2.0**-15 * DECAY * 1.5 * STEPS / 4096),
        "stochastic": 5 * math.sqrt(2.0**-7 * DECAY * 1.5 * STEPS / 4096),
        "kahan": STEPS * 2.0**-17,
    }.get(weights, 0.0)
    moved, expected = 1.5 - float(x.double().mean()), 1.5 - 1.5 * (1 - DECAY) ** STEPS
    assert abs(moved - expected) < allowed + fp32 < 0.1 * expected


def test_plain_bf16_loses_it(device: str) -> None:
    p = torch.nn.Parameter(torch.full((4,), 1.5, dtype=torch.bfloat16, device=device))
    optimizer = AdamW([p], lr=0.1, weight_decay=DECAY / 0.1, state_dtype="float32")
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (p == 1.5).all()
