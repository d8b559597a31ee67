"""A step with lr = 0 and zero gradients creates state and leaves every weight as it was, bit for bit.

torch.distributed.checkpoint makes such a step to create state. Every rule, option and storage format joins.
"""

import inspect
import math
from typing import Any

import pytest
import torch
from compare import BACKENDS, THREE
from format_cases import takes
from table import BASIC, RULES, RuleRow, private, shape_for

from fusedopt.encoded import keys
from fusedopt.formats import LOW, slot_storage, weight_format
from fusedopt_kernels.state.format import StateFormat

SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    **BASIC,
    "all": {k: v for f in BASIC.values() for k, v in f.items()},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "decay": dict(weight_decay=0.1),
    "maximize": dict(maximize=True),
    "decay and maximize": dict(weight_decay=0.1, maximize=True),
}


def delicate(dtype: torch.dtype, device: str, largest: float) -> torch.Tensor:
    """Values whose bits are easily lost: zeros of both signs, subnormals, the smallest, the largest, odd roundings."""
    info = torch.finfo(dtype)
    values = [0.0, -0.0, info.tiny, -info.tiny, info.tiny / 2, info.tiny * info.eps, largest, -largest]
    values += [math.inf, -math.inf] if largest == info.max else []
    values += [1.0, -1.0, 1.0 + info.eps, 1 / 3, -1 / 3, 1e-4, -1e-4]
    return torch.tensor(values, dtype=torch.float64).to(device, dtype)


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(torch.uint8)


def zero_step(optimizer: Any) -> None:
    """What torch.distributed.checkpoint does to create state."""
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if isinstance(group["lr"], torch.Tensor) else 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)


def run(row: RuleRow, dtype: torch.dtype, backend: str, device: str, switches: dict[str, Any], **options: Any) -> None:
    """Two such steps, on state that does not exist and on state that is there."""
    known = inspect.signature(row.cls).parameters
    options = {**row.options, **{k: v for k, v in options.items() if k in known}}
    largest = torch.finfo(dtype).max
    rule, group = row.cls.rule, row.cls([torch.empty(0, dtype=dtype)], **options).param_groups[0]
    if group.get("weight_decay") and not rule.decoupled(group):
        largest = min(largest**0.5, 1e18)  # decay's gradient, whose square overflows; and inf − inf is nan
    if not takes(row, switches):
        switches = {k: v for k, v in switches.items() if k != "state_dtype"}
    values = delicate(dtype, device, largest)
    shape = shape_for(switches, tuple(values.shape))
    p = torch.nn.Parameter(values.repeat(-(-math.prod(shape) // len(values)))[: math.prod(shape)].reshape(shape))
    before = bits(p).clone()
    optimizer = row.cls([p], **options, backend=backend)
    if switches:
        private(optimizer, **switches)
    form = weight_format(p, switches)
    for step in (1, 2):
        zero_step(optimizer)
        changed = (bits(p) != before).nonzero().flatten().tolist()
        assert not changed, (p.tolist(), changed)
        state = optimizer.state[p]
        expected = {slot.name for slot in rule.scalar_slots}
        for slot in rule.slots(group):
            quantised = isinstance(slot_storage(slot, p, switches), StateFormat)
            expected |= set(keys(slot.name)) if quantised else {slot.name}
        expected |= {"step"} if rule.counts_in_state or "state_rounding" in switches else set()
        if form is not None and form.key is not None:
            expected |= {form.key}
            made = form.initial(p.detach())
            assert made is not None and torch.equal(bits(state[form.key]), bits(made))
        assert state.keys() == expected and not any(value.float().isnan().any() for value in state.values())
        weights = {slot.name for slot in rule.state if slot.kind == "weight"} | {"master_param"}  # infinite where p is
        assert all(value.float().isfinite().all() for key, value in state.items() if key not in weights)
        assert not rule.counts_in_state or state["step"] == step


EVERYTHING = [(row, switches, options) for row in THREE for switches in SWITCHES for options in OPTIONS]
EVERYTHING += [
    (row, switches, "decay and maximize") for row in RULES if row not in THREE for switches in ("none", "all")
]


@pytest.mark.parametrize(("row", "switches", "options"), EVERYTHING, ids=str)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose
def test_eager(row: RuleRow, switches: str, options: str, device: str) -> None:
    split = SWITCHES[switches].get("master_weights", "")
    dtypes = LOW[:1] if split.startswith("split") else LOW if split else (torch.float32, *LOW, torch.float64)
    for dtype in dtypes:
        run(row, dtype, "eager", device, SWITCHES[switches], **OPTIONS[options])


@pytest.mark.parametrize("switches", ["none", "all"])
@pytest.mark.parametrize("row", RULES, ids=str)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose
def test_kernels(row: RuleRow, switches: str, device: str) -> None:
    """One run each; that kernels and twins agree under every option is test_engine.py's matter."""
    dtype = torch.bfloat16 if "master_weights" in SWITCHES[switches] else torch.float32
    run(row, dtype, "triton", device, SWITCHES[switches], **OPTIONS["decay and maximize"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", RULES, ids=str)
def test_tensor_lr(row: RuleRow, backend: str, device: str) -> None:
    run(row, torch.float32, backend, device, {}, lr=torch.tensor(0.1, device=device))
