"""Every schedule against its formula, whatever optimizer, groups and kinds of lr it drives; and saved and loaded."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler

import fusedopt
from fusedopt import schedules
from fusedopt.schedules import NAMES, Schedule, make

STEPS, WARMUP, LR, MIN, EPOCH = 60, 7, 0.3, 0.02, 8.0
ULP = 2.0**-53


def sgd(*lrs: float | torch.Tensor) -> torch.optim.SGD:
    """An optimizer whose step does nothing, one group per lr."""
    return torch.optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(()))], "lr": lr} for lr in lrs])


def advance(schedule: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[list[float]]:
    """The learning rates of the next steps."""
    rates = []
    for _ in range(steps):
        rates.append([float(group["lr"]) for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates


def cosine(high: float, low: float, t: float, length: float) -> float:
    return low + 0.5 * (high - low) * (1.0 + math.cos(math.pi * t / length))


def restarts(t: int, period: int, multiplier: int) -> tuple[int, int]:
    """Steps since the last restart, and the length of the period."""
    while t >= period:
        t, period = t - period, period * multiplier
    return t, period


Formula = Callable[[int, int], float]
"""The lr at t steps after a warm-up, of T of them."""
FORMULAS: list[tuple[str, dict[str, Any], Formula]] = [
    ("constant", {}, lambda t, T: LR),
    ("step", {}, lambda t, T: max(MIN, LR * 0.1 ** (t // -(-T // 3)))),
    ("step", {"step_size": 5, "gamma": 0.8}, lambda t, T: max(MIN, LR * 0.8 ** (t // 5))),
    ("piecewise", {}, lambda t, T: max(MIN, LR * (1.0 if t < T // 2 else 0.1 if t < 3 * T // 4 else 0.01))),
    ("piecewise", {"boundaries": [30], "factors": (0.5, 1)}, lambda t, T: LR * (1.0 if t + STEPS - T >= 30 else 0.5)),
    ("piecewise", {"boundaries": [10, 11], "values": [0.3, 0.05, 0.1]},
     lambda t, T: LR if t + STEPS - T < 10 else 0.05 if t + STEPS - T < 11 else 0.1),
    ("exponential", {}, lambda t, T: max(MIN, LR * 0.01 ** (t / T))),
    ("exponential", {"k": 0.2}, lambda t, T: max(MIN, LR * math.exp(-0.2 * t / EPOCH))),
    ("inverse_time", {}, lambda t, T: max(MIN, LR / (1 + 9 * t / T))),
    ("inverse_time", {"k": 0.5}, lambda t, T: LR / (1 + 0.5 * t / EPOCH)),
    ("linear", {}, lambda t, T: LR - (LR - MIN) * t / T),
    ("polynomial", {}, lambda t, T: MIN + (LR - MIN) * (1 - t / T) ** 2),
    ("polynomial", {"power": 0.9}, lambda t, T: MIN + (LR - MIN) * (1 - t / T) ** 0.9),
    ("cosine", {}, lambda t, T: cosine(LR, MIN, t, T)),
    ("cosine_restarts", {}, lambda t, T: cosine(LR, MIN, *restarts(t, -(-T // 7), 2))),
    ("cosine_restarts", {"first_period": 9, "multiplier": 1}, lambda t, T: cosine(LR, MIN, *restarts(t, 9, 1))),
    ("warmup_cosine", {}, lambda t, T: cosine(LR, MIN, t, T)),
    ("wsd", {}, lambda t, T: LR - (LR - MIN) * max(0, t - T + 12) / 12),
    ("wsd", {"decay": 0.5, "shape": "cosine"}, lambda t, T: cosine(LR, MIN, max(0, t - T + 30), 30)),
    ("wsd", {"decay": 0.25, "shape": "sqrt"}, lambda t, T: LR - (LR - MIN) * math.sqrt(max(0, t - T + 15) / 15)),
    ("inverse_sqrt", {}, lambda t, T: LR * math.sqrt((STEPS - T or 6) / ((STEPS - T or 6) + t))),
    ("inverse_sqrt", {"timescale": 0.5}, lambda t, T: max(MIN, LR * math.sqrt(0.5 / (0.5 + t)))),
    ("plateau", {}, lambda t, T: LR),
]  # fmt: skip
"""Schedule, arguments, formula; `one_cycle`, whose warm-up is its own, has a test of its own."""


def warming(name: str, step: int, warmup: int) -> float:
    return MIN + (LR - MIN) * step / warmup if name == "warmup_cosine" else LR * (step + 1) / (warmup + 1)


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize(
    ("name", "arguments", "formula"), FORMULAS, ids=["-".join((name, *given)) for name, given, _ in FORMULAS]
)
def test_each_step_has_the_lr_of_the_formula(
    name: str, arguments: dict[str, Any], formula: Formula, warmup: int
) -> None:
    """torch's chainable forms round about five times per step, by at most 2⁻⁵³·lr each, and what they multiply by only
    shrinks that; the factors' own errors add as much. So after n steps lr is off by less than 8·(n + 1)·2⁻⁵³·lr.
    """
    optimizer = sgd(LR)
    schedule = make(
        name, optimizer, steps=STEPS, warmup_steps=warmup, min_lr=MIN, epoch_steps=EPOCH, arguments=arguments
    )
    rates = [rate for (rate,) in advance(schedule, optimizer, STEPS + 1)]
    for step, rate in enumerate(rates):
        expected = formula(step - warmup, STEPS - warmup) if step >= warmup else warming(name, step, warmup)
        assert abs(rate - expected) <= 8 * (step + 1) * ULP * LR, (step, rate, expected)


@pytest.mark.parametrize("warmup", [0, 1, WARMUP, STEPS - 1])
@pytest.mark.parametrize("low", [0.0, MIN])
@pytest.mark.parametrize("anneal", ["cos", "linear"])
def test_one_cycle_rises_to_the_lr_at_the_end_of_its_warm_up(anneal: str, low: float, warmup: int) -> None:
    optimizer = sgd(LR)
    given = {"div_factor": 10, "anneal": anneal}
    schedule = make("one_cycle", optimizer, steps=STEPS, warmup_steps=warmup, min_lr=low, arguments=given)
    rise = warmup or round(0.3 * STEPS)
    rates = [rate for (rate,) in advance(schedule, optimizer, STEPS + 1)]
    for step, rate in enumerate(rates):
        start, end, share = (LR / 10, LR, step / rise) if step <= rise else (LR, low, (step - rise) / (STEPS - rise))
        expected = start + (end - start) * share if anneal == "linear" else cosine(start, end, share, 1.0)
        assert abs(rate - expected) <= 8 * STEPS * ULP * LR, (step, rate, expected)


def test_every_schedule_has_its_formula_tested() -> None:
    assert {name for name, _, _ in FORMULAS} | {"one_cycle"} == set(NAMES)


def test_plateau_drops_after_patience_validations_without_improvement() -> None:
    optimizer = sgd(LR, LR / 3)
    given = {"factor": 0.5, "patience": 1, "threshold": 0.1, "cooldown": 1}
    schedule = make("plateau", optimizer, steps=100, warmup_steps=3, min_lr=0.05, arguments=given)
    schedule.validated(1.0)  # in the warm-up: does not count
    advance(schedule, optimizer, 3)
    seen = []
    for loss in [2.0, 1.9, 1.0, 0.95, 0.91, 0.9, 0.9, 0.9, math.nan, math.nan, math.nan, 0.9, 0.1]:
        advance(schedule, optimizer, 1)
        schedule.validated(loss)
        seen.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[1]["lr"] == pytest.approx(seen[-1] / 3, rel=1e-15)
    # 1.9 is bad, 1.0 good, 0.95 and 0.91 bad; then one of cooldown, and every second one
    assert seen == [0.3] * 4 + [0.15] * 3 + [0.075] * 3 + [0.05] * 3


def test_plateau_drops_the_smallest_lr_too() -> None:
    optimizer = sgd(1e-8)
    schedule = make("plateau", optimizer, steps=9, arguments={"patience": 0})
    for _ in range(2):
        schedule.validated(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.5e-8


def earlier(name: str, optimizer: torch.optim.Optimizer, warmup: int) -> lr_scheduler.LRScheduler:
    """What `fusedopt train` made of torch's classes before there were schedules by name."""
    length = STEPS - warmup
    if name == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=length, eta_min=MIN)
    elif name == "linear":
        main = lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=MIN / LR, total_iters=length)
    else:
        main = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if warmup == 0:
        return main
    rise = lr_scheduler.LinearLR(optimizer, start_factor=1.0 / (warmup + 1), total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, main], milestones=[warmup])


@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine"])
def test_the_first_three_have_the_bits_that_they_always_had(name: str, warmup: int) -> None:
    ours, theirs = sgd(LR), sgd(LR)
    schedule = make(name, ours, steps=STEPS, warmup_steps=warmup, min_lr=MIN)
    before = earlier(name, theirs, warmup)
    assert advance(schedule, ours, STEPS + 1) == advance(before, theirs, STEPS + 1)


@pytest.mark.parametrize("name", NAMES)
def test_groups_keep_their_ratios_and_lr_tensors_stay_in_place(name: str) -> None:
    tensor = torch.tensor(0.3, dtype=torch.float64)
    optimizer = sgd(0.003, tensor, 0.0, 0.1)
    schedule = make(name, optimizer, steps=20, warmup_steps=3, min_lr=MIN)
    for small, largest, zero, middle in advance(schedule, optimizer, 21):
        assert zero == 0.0
        assert small == pytest.approx(largest / 100, rel=1e-15) and middle == pytest.approx(largest / 3, rel=1e-15)
    assert optimizer.param_groups[1]["lr"] is tensor and float(optimizer.param_groups[1]["initial_lr"]) == 0.3


@pytest.mark.parametrize("name", NAMES)
def test_an_lr_of_zero_stays_zero(name: str) -> None:
    optimizer = sgd(0.0)
    schedule = make(name, optimizer, steps=12, warmup_steps=2)
    schedule.validated(1.0)
    assert {rate for (rate,) in advance(schedule, optimizer, 13)} == {0.0}


@pytest.mark.parametrize("name", NAMES)
def test_a_run_of_one_step_and_steps_past_the_end(name: str) -> None:
    optimizer = sgd(LR)
    rates = [rate for (rate,) in advance(make(name, optimizer, steps=1), optimizer, 5)]
    assert all(0.0 <= rate <= LR for rate in rates) and len(set(rates[1:])) == 1


def same(first: Any, second: Any) -> bool:
    return repr(first) == repr(second)  # every bit of a float shows


@pytest.mark.parametrize("when", [0, 3, WARMUP - 1, WARMUP, WARMUP + 1, 40, STEPS])
@pytest.mark.parametrize("name", NAMES)
def test_a_saved_schedule_continues_with_the_same_bits(name: str, when: int) -> None:
    def begin() -> tuple[Schedule, torch.optim.Optimizer]:
        optimizer = sgd(LR, LR / 7)
        return make(name, optimizer, steps=STEPS, warmup_steps=WARMUP, min_lr=MIN, epoch_steps=EPOCH), optimizer

    def go_on(schedule: Schedule, optimizer: torch.optim.Optimizer, steps: int) -> list[Any]:
        rates: list[Any] = []
        for _ in range(steps):
            rates += advance(schedule, optimizer, 1)
            schedule.validated(1.0)
        return rates

    schedule, optimizer = begin()
    go_on(schedule, optimizer, when)
    file = io.BytesIO()
    torch.save(schedule.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    resumed, other = begin()
    for _ in range(2):  # loading leaves the state as it is
        resumed.load_state_dict(state)
    assert same(resumed.state_dict(), schedule.state_dict())
    assert same(go_on(resumed, other, STEPS + 2 - when), go_on(schedule, optimizer, STEPS + 2 - when))


def test_a_loaded_state_brings_its_settings_as_torchs_do() -> None:
    optimizer, other = sgd(LR, 0.1), sgd(1.0, 1.0)
    schedule = make("exponential", optimizer, steps=STEPS, warmup_steps=WARMUP, min_lr=MIN)
    resumed = make("exponential", other, steps=5)
    advance(schedule, optimizer, 9)
    resumed.load_state_dict(schedule.state_dict())
    assert advance(resumed, other, STEPS) == advance(schedule, optimizer, STEPS)


def test_another_schedules_state_is_refused() -> None:
    state = make("cosine", sgd(LR), steps=10).state_dict()
    with pytest.raises(ValueError, match="the state is that of a schedule cosine, not linear"):
        make("linear", sgd(LR), steps=10).load_state_dict(state)
    with pytest.raises(ValueError, match="the state is of 1 parameter groups, not 2"):
        make("cosine", sgd(LR, LR), steps=10).load_state_dict(state)


def test_one_cycle_leaves_betas_and_what_independent_decay_goes_by_alone() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = fusedopt.AdamW([parameter], lr=LR, betas=(0.8, 0.9), decay_mode="independent")
    group = optimizer.param_groups[0]
    schedule = make("one_cycle", optimizer, steps=10)
    before = copy.deepcopy(group["betas"])
    for _ in range(10):
        parameter.grad = torch.ones(3)
        optimizer.step()
        schedule.step()
    assert group["betas"] == before == (0.8, 0.9) and group["initial_lr"] == LR


def test_a_second_schedule_starts_from_the_first_lr_as_torchs_do() -> None:
    optimizer = sgd(LR)
    advance(make("linear", optimizer, steps=10), optimizer, 5)
    make("constant", optimizer, steps=10)
    assert optimizer.param_groups[0]["lr"] == LR
    assert schedules.default_min_lr("cosine", 1.0) == 0.1 and schedules.default_min_lr("step", 1.0) == 0.0
