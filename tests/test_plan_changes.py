"""Whatever a plan was built from may change between two steps: the next step sees it and equals torch.

A plan is built anew only where it must be; steps that change nothing but gradients' addresses keep it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import BACKENDS, THREE, assert_close, assert_equal, give_gradients, parameters, params_of, train, uniform
from table import RuleRow

pytestmark = [
    pytest.mark.filterwarnings("ignore:a parameter with gaps"),
    pytest.mark.filterwarnings("ignore:a gradient with strides"),
]
SHAPES = ((3, 3), (5,), (3, 3))

Change = Callable[[Any], None]
"""Changes an optimizer, ours and torch's alike, after gradients of the coming step have been set."""


def relay(t: torch.Tensor) -> torch.Tensor:
    """The same values in another memory layout, at another address."""
    return t.detach().t().contiguous().t() if t.dim() == 2 else t.detach().clone()


def set_data(make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(optimizer: Any) -> None:
        p = params_of(optimizer)[0]
        p.data = make(p)

    return change


def in_place_other_strides(optimizer: Any) -> None:
    """Square parameter: same address, shape and dtype, other strides (and so, the transposed values)."""
    p = params_of(optimizer)[0]
    p.data = p.data.t()


def new_gradient(make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(optimizer: Any) -> None:
        p = params_of(optimizer)[0]
        p.grad = make(p.grad)  # pyright: ignore[reportArgumentType]  # it is set above

    return change


def no_gradient(optimizer: Any) -> None:
    params_of(optimizer)[1].grad = None


def freeze(optimizer: Any) -> None:
    params_of(optimizer)[2].requires_grad_(False).grad = None


def replace_entry(optimizer: Any) -> None:
    """What a framework does when it wraps parameters after the optimizer was made: a new object in the list."""
    group = optimizer.param_groups[0]
    new = torch.nn.Parameter(group["params"][0].detach() * 2)
    new.grad = uniform([tuple(new.shape)], str(new.device), new.dtype, 77)[0]
    optimizer.state[new] = {k: v.clone() for k, v in optimizer.state.pop(group["params"][0]).items()}
    group["params"][0] = new


def replace_entry_without_state(optimizer: Any) -> None:
    group = optimizer.param_groups[0]
    group["params"][0] = torch.nn.Parameter(group["params"][0].detach() * 2)
    group["params"][0].grad = uniform([SHAPES[0]], str(group["params"][0].device), torch.float32, 78)[0]


def replace_list(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"] = optimizer.param_groups[0]["params"][::-1]


def remove_entry(optimizer: Any) -> None:
    optimizer.param_groups[0]["params"].pop()


def add_group(optimizer: Any) -> None:
    device = str(params_of(optimizer)[0].device)
    added = parameters(device, (2, 2), seed=9)
    added[0].grad = uniform([(2, 2)], device, torch.float32, 79)[0]
    optimizer.add_param_group({"params": added, "lr": 0.02})


def replace_groups(optimizer: Any) -> None:
    """One group at a time, as a sharding framework steps its own partitions."""
    optimizer.param_groups = [{**optimizer.param_groups[0], "params": optimizer.param_groups[0]["params"][1:]}]


def state_tensor(make: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def change(optimizer: Any) -> None:
        state = optimizer.state[params_of(optimizer)[0]]
        for key in state.keys() - {"step"}:
            state[key] = make(state[key])

    return change


def state_data(optimizer: Any) -> None:
    """The same state object with other memory, as offloading code leaves it."""
    for value in optimizer.state[params_of(optimizer)[0]].values():
        value.data = value.data.clone() * 2


def step_count(optimizer: Any) -> None:
    optimizer.state[params_of(optimizer)[0]]["step"] = torch.tensor(40.0)


def switch(**options: Any) -> Change:
    def change(optimizer: Any) -> None:
        optimizer.param_groups[0].update(options)

    return change


def tensor_lr(optimizer: Any) -> None:
    device = params_of(optimizer)[0].device
    optimizer.param_groups[0]["lr"] = torch.tensor(0.03125, device=device)


def nothing(optimizer: Any) -> None:
    pass


REBUILT: dict[str, Change] = {
    "parameter at another address": set_data(torch.Tensor.clone),
    "parameter of another layout": set_data(relay),
    "parameter with gaps": set_data(lambda p: p.new_zeros(3, 6)[:, ::2].copy_(p.detach())),
    "strides swapped in place": in_place_other_strides,
    "gradient of another layout": new_gradient(relay),
    "gradient expanded": new_gradient(lambda g: g[:1, :1].expand(3, 3)),
    "gradient missing": no_gradient,
    "frozen": freeze,
    "entry replaced": replace_entry,
    "entry replaced, no state": replace_entry_without_state,
    "list replaced": replace_list,
    "entry removed": remove_entry,
    "group added": add_group,
    "groups replaced": replace_groups,
    "state replaced": state_tensor(lambda s: s * 2),
    "state of another layout": state_tensor(relay),
    "memory of the state replaced": state_data,
    "maximize": switch(maximize=True),
}
REBUILT_SGD = {"nesterov": switch(nesterov=True), "momentum off": switch(momentum=0.0)}
REBUILT_ADAMW = {"step count": step_count}
KEPT: dict[str, Change] = {
    "nothing": nothing,
    "gradient at another address": new_gradient(torch.Tensor.clone),
    "numbers": switch(lr=0.02, weight_decay=0.5),
    "tensor lr": tensor_lr,
}
KEPT_SGD = {"momentum": switch(momentum=0.5, dampening=0.25)}
KEPT_ADAMW = {"averages": switch(betas=(0.5, 0.75), eps=0.5)}
SGD, ADAMW = THREE[0], THREE[2]
CHANGES = {
    "sgd": ({**KEPT, **KEPT_SGD}, {**REBUILT, **REBUILT_SGD}),
    "adamw": ({**KEPT, **KEPT_ADAMW}, {**REBUILT, **REBUILT_ADAMW}),
}
"""Rule → (changes that keep the plan, changes that need another); in this order they can follow each other."""
CASES = [(row, name) for row in (SGD, ADAMW) for cases in CHANGES[row.name] for name in cases]


def step_with(name: str, row: RuleRow, step: int, ours: Any, fresh: Any, *others: Any) -> None:
    """One step with a change, beside an optimizer whose plan is thrown away before every step."""
    kept, rebuilt = CHANGES[row.name]
    before = ours._plan
    give_gradients(step, *map(params_of, (ours, fresh, *others)))
    for optimizer in (ours, fresh, *others):
        (kept | rebuilt)[name](optimizer)
        fresh._plan = None
        optimizer.step()
    assert (ours._plan is before) == (name in kept), name
    assert_equal(ours, fresh)


@pytest.mark.parametrize(("row", "name"), CASES, ids=str)
def test_one_change_beside_torch(row: RuleRow, name: str, device: str) -> None:
    ours, fresh = (row.cls(parameters(device, *SHAPES), **row.options, backend="eager") for _ in range(2))
    theirs = row.torch_cls(parameters(device, *SHAPES), **row.options, foreach=False)
    train([0], ours, fresh, theirs)
    step_with(name, row, 1, ours, fresh, theirs)
    train([2], ours, fresh, theirs)
    assert_equal(ours, fresh)
    assert_close(ours, theirs, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [SGD, ADAMW], ids=str)
def test_all_changes_in_a_row(row: RuleRow, backend: str, device: str) -> None:
    ours, fresh = (row.cls(parameters(device, *SHAPES), **row.options, backend=b) for b in (backend, "eager"))
    train([0], ours, fresh)
    for step, name in enumerate(name for cases in CHANGES[row.name] for name in cases):
        step_with(name, row, step, ours, fresh)
