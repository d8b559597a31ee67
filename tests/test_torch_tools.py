"""What torch puts around an optimizer: lr schedulers, GradScaler, distributed checkpoints' state dicts."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from compare import (
    BACKENDS,
    EACH,
    SHAPES_OF,
    THREE,
    assert_close,
    assert_equal,
    give_gradients,
    parameters,
    params_of,
    reference,
    train,
)  # fmt: skip
from table import RuleRow
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler as schedule

ANY_SHAPE = tuple(row for row in EACH if row.cls.__name__ not in SHAPES_OF)

SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: schedule.StepLR(o, 2, 0.5),
    "lambda": lambda o: schedule.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "warm-up and cosine": lambda o: schedule.SequentialLR(
        o, [schedule.LinearLR(o, 0.25, total_iters=2), schedule.CosineAnnealingLR(o, 3)], [2]
    ),
    "plateau": lambda o: schedule.ReduceLROnPlateau(o, patience=1),
    "one cycle": lambda o: schedule.OneCycleLR(o, 0.25, total_steps=7, base_momentum=0.5, max_momentum=0.875),
    "cyclic": lambda o: schedule.CyclicLR(o, 0.0625, 0.25, 2, base_momentum=0.5, max_momentum=0.875),
}


def cycled(group: dict[str, Any]) -> Any:
    """The numbers that schedulers write, as floats."""
    return float(group["lr"]), float(group["momentum"] if "momentum" in group else group["betas"][0])


def step_both(ours: Any, theirs: Any, ours_scheduler: Any, theirs_scheduler: Any, steps: int) -> None:
    for step in range(steps):
        train([step], ours, theirs)
        for scheduler in (ours_scheduler, theirs_scheduler):
            metrics = (1.0,) if isinstance(scheduler, schedule.ReduceLROnPlateau) else ()
            scheduler.step(*metrics)
        assert [cycled(g) for g in ours.param_groups] == [cycled(g) for g in theirs.param_groups]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("row", THREE, ids=str)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")  # SequentialLR's own first step
def test_schedulers(row: RuleRow, name: str, device: str) -> None:
    ours = row.cls(parameters(device), **row.options)
    theirs = row.torch_cls(parameters(device), **row.options, foreach=False)
    step_both(ours, theirs, SCHEDULERS[name](ours), SCHEDULERS[name](theirs), 5)
    assert_close(ours, theirs, 5)
    assert ours.param_groups[0].keys() == theirs.param_groups[0].keys()


@pytest.mark.parametrize("row", THREE, ids=str)
def test_cycled_momentum_reaches_the_kernels(row: RuleRow, device: str) -> None:
    kernels, eager = (row.cls(parameters(device), **row.options, backend=b) for b in ("triton", "eager"))
    step_both(kernels, eager, SCHEDULERS["one cycle"](kernels), SCHEDULERS["one cycle"](eager), 3)
    assert_equal(kernels, eager)
    assert kernels._tables[0].hypers.values.uploads >= 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_schedulers_fill_a_tensor_lr_in_place(backend: str, device: str) -> None:
    row = THREE[2]
    lr = torch.tensor(0.5, dtype=torch.float64, device=device)
    a = row.cls(parameters(device), lr=lr, backend=backend)
    b = row.cls(parameters(device), lr=0.5)
    schedulers = [schedule.StepLR(o, 1, 0.5) for o in (a, b)]
    for step in range(3):
        train([step], a, b)
        for scheduler in schedulers:
            scheduler.step()
        assert a.param_groups[0]["lr"] is lr
    assert_equal(a, b)


def test_schedule_resumes_with_the_optimizer(device: str) -> None:
    row = THREE[0]
    whole, first = (row.cls(parameters(device), **row.options) for _ in range(2))
    whole_schedule, first_schedule = (SCHEDULERS["one cycle"](o) for o in (whole, first))
    step_both(whole, first, whole_schedule, first_schedule, 2)
    second = row.cls([torch.nn.Parameter(p.detach().clone()) for p in params_of(first)], **row.options)
    second_schedule = SCHEDULERS["one cycle"](second)
    second.load_state_dict(first.state_dict())
    second_schedule.load_state_dict(first_schedule.state_dict())
    step_both(whole, second, whole_schedule, second_schedule, 3)
    assert_equal(whole, second)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("row", ANY_SHAPE, ids=str)
def test_grad_scaler(row: RuleRow, unscale: bool, device: str) -> None:
    """The default path: the scaler unscales, and calls no step when a gradient is inf or nan."""
    ours = row.cls(parameters(device), **row.options)
    theirs = reference(row.torch_cls, parameters(device), **row.options)
    scalers = [torch.amp.GradScaler(device, init_scale=4.0, growth_interval=2) for _ in range(2)]
    assert not getattr(ours, "_step_supports_amp_scaling", False)
    for step in range(4):
        give_gradients(step, params_of(ours), params_of(theirs))
        for optimizer, scaler in zip((ours, theirs), scalers, strict=True):
            for p in params_of(optimizer):
                assert p.grad is not None
                p.grad.mul_(scaler.get_scale() if scaler.is_enabled() else 1.0)
                if step == 1 and p.dim() == 1 and p.numel():
                    p.grad[1] = torch.inf
            scaler.scale(torch.ones((), device=device))  # makes the scale tensor, as the loss would
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert not {"grad_scale", "found_inf"} & set(vars(ours))
    assert_close(ours, theirs, 3)
    if row.cls.rule.counts_in_state:
        assert all(ours.state[p]["step"] == 3 for p in params_of(ours))


def model(device: str) -> torch.nn.Module:
    made = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).to(device)
    with torch.no_grad():
        for i, p in enumerate(made.parameters()):
            p.copy_(parameters(device, tuple(p.shape), seed=i)[0])
    return made


@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "after two steps"])
@pytest.mark.parametrize("row", ANY_SHAPE, ids=str)
def test_distributed_state_dict(row: RuleRow, steps: int, device: str) -> None:
    """torch creates missing state by a step with lr 0 and zero gradients; loading such a dict works as well."""
    coupled = "weight_decay" in row.options  # it would fill moments, in torch as well
    options = {**row.options, **({"weight_decay": 0.0} if coupled else {}), "foreach": False}
    source, target = model(device), model(device)
    ours = row.cls(source.parameters(), **options)
    theirs_model = model(device)
    theirs = row.torch_cls(theirs_model.parameters(), **options)
    if theirs.state:  # Adagrad makes state in its constructor; here that takes a call
        ours.materialize_state()
    train(range(steps), ours, theirs)
    before = [p.detach().clone() for p in params_of(ours)]
    found: Any = get_optimizer_state_dict(source, ours)
    expected: Any = get_optimizer_state_dict(theirs_model, theirs)
    assert all(torch.equal(p, q) for p, q in zip(params_of(ours), before, strict=True))
    assert found["state"].keys() == expected["state"].keys()
    for name, state in expected["state"].items():
        assert found["state"][name].keys() == state.keys()
    assert found["param_groups"] == expected["param_groups"]
    assert_close(ours, theirs, max(steps, 1))

    loaded = row.cls(target.parameters(), **options)
    with torch.no_grad():
        for p, q in zip(target.parameters(), source.parameters(), strict=True):
            p.copy_(q)
    set_optimizer_state_dict(target, loaded, deepcopy(found))  # torch and we take tensors over as they are
    assert_equal(ours, loaded)
    train([steps], ours, loaded, theirs)
    assert_equal(ours, loaded)
    assert_close(ours, theirs, steps + 1)


@pytest.mark.parametrize("row", ANY_SHAPE, ids=str)
def test_distributed_state_dict_of_torch_loads_here_and_back(row: RuleRow, device: str) -> None:
    ours_model, theirs_model = model(device), model(device)
    ours = row.cls(ours_model.parameters(), **row.options)
    theirs = reference(row.torch_cls, theirs_model.parameters(), **row.options)
    train(range(2), theirs)
    ours_model.load_state_dict(theirs_model.state_dict())
    set_optimizer_state_dict(ours_model, ours, deepcopy(get_optimizer_state_dict(theirs_model, theirs)))
    train([2], ours, theirs)
    assert_close(ours, theirs, 1)
    set_optimizer_state_dict(theirs_model, theirs, deepcopy(get_optimizer_state_dict(ours_model, ours)))
    theirs_model.load_state_dict(ours_model.state_dict())
    train([3], ours, theirs)
    assert_close(ours, theirs, 1)
