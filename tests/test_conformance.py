"""Every rule of torch under hyper-parameters drawn at random, and groups added in mid-run, beside torch.optim.

torch's own configurations of each class are in `test_torch_database.py`.
"""

import copy
import inspect
from typing import Any

import pytest
import torch
from compare import (
    ALL,
    BACKENDS,
    EACH,
    SHAPES_OF,
    assert_close,
    assert_equal,
    contents,
    doubt,
    make_sparse,
    parameters,
    parameters_of,
    params_of,
    reference,
    train,
    uniform,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from table import RuleRow
from tolerances import TOLERANCES

from fusedopt_kernels import launch

NAMES = tuple(row.name for row in EACH)
STEPS = 5
BOOLS = st.booleans()
RANGES: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.floats(1e-4, 0.1), "weight_decay": st.one_of(st.just(0.0), st.floats(1e-3, 0.05)),
    "betas": st.tuples(st.floats(0.0, 0.99), st.floats(0.5, 0.999)), "eps": st.floats(1e-10, 1e-2),
    "momentum": st.one_of(st.just(0.0), st.floats(0.1, 0.99)), "dampening": st.floats(0.0, 0.9), "nesterov": BOOLS,
    "amsgrad": BOOLS, "maximize": BOOLS, "centered": BOOLS, "decoupled_weight_decay": BOOLS,
    "rho": st.floats(0.5, 0.999), "alpha": st.floats(0.5, 0.99), "lr_decay": st.floats(0.0, 1.0),
    "initial_accumulator_value": st.floats(0.0, 1.0), "momentum_decay": st.floats(0.0, 0.1),
    "lambd": st.floats(0.0, 0.5), "t0": st.floats(0.0, 5.0),
    "etas": st.tuples(st.floats(0.1, 0.9), st.floats(1.05, 2.0)),
    "step_sizes": st.tuples(st.floats(1e-6, 1e-3), st.floats(1e-2, 50.0)),
    "beta2_decay": st.floats(-1.0, -0.1), "d": st.floats(1.0, 3.0), "ns_steps": st.integers(1, 6),
}  # fmt: skip
"""Legal values of an argument by its name, for every class that has it; others keep their defaults."""


@st.composite
def cases(draw: Any, row: RuleRow) -> dict[str, Any]:
    """Options; shapes; by step and parameter, whether there is a gradient; the seed of all numbers."""
    known = inspect.signature(row.torch_cls).parameters
    options = {k: draw(values) for k, values in RANGES.items() if k in known}
    if row.name == "adafactor":
        options["eps"] = draw(st.tuples(st.floats(1e-30, 1e-3), st.floats(1e-4, 1e-2)))
    if options.get("nesterov") and "dampening" in options:
        options.update(dampening=0.0, momentum=options["momentum"] or 0.5)
    dims = {"Muon": (2, 2), "SparseAdam": (1, 3)}.get(row.cls.__name__, (0, 3))
    least = {"sparse_adam": 4, "adafactor": 1, "muon": 1}.get(row.name, 0)  # sparse rows; torch divides by sizes
    sizes = st.integers(least, 5)
    shape = st.lists(sizes, min_size=dims[0], max_size=dims[1]).map(tuple)
    shapes = draw(st.lists(shape, min_size=1, max_size=3))
    there = [[draw(st.integers(0, 4)) > 0 for _ in shapes] for _ in range(STEPS)]
    return dict(options=options, shapes=shapes, there=there, seed=draw(st.integers(0, 10**6)))


def give(case: dict[str, Any], step: int, *optimizers: Any) -> None:
    """The same gradients, 0.5 to 1 in size: what decay adds to them never cancels them."""
    for i, there in enumerate(case["there"][step]):
        value = uniform([case["shapes"][i]], "cpu", torch.float64, case["seed"] + 10 * step + i + 1)[0]
        value = torch.where(value < 0, value / 2 - 0.5, value / 2 + 0.5)
        for optimizer in optimizers:
            p = params_of(optimizer)[i]
            p.grad = value.to(p.device, p.dtype) if there else None
            if there and type(optimizer).__name__ == "SparseAdam":
                make_sparse(step, [p])


def pair(row: RuleRow, case: dict[str, Any], device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Our optimizer and torch's, with the same state before the first step."""
    a, b = (parameters(device, *case["shapes"], dtype=dtype, seed=case["seed"]) for _ in range(2))
    ours, theirs = row.cls(a, **case["options"], backend="eager"), reference(row.torch_cls, b, **case["options"])
    if theirs.state:  # Adagrad makes state in its constructor; here that takes a call
        ours.materialize_state()
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_five_steps_under_random_options(name: str, dtype: torch.dtype, data: Any, device: str) -> None:
    row = RuleRow(name)
    case = data.draw(cases(row))
    ours, theirs = pair(row, case, device, dtype)
    for step in range(STEPS):
        give(case, step, ours, theirs)
        ours.step()
        theirs.step()
    assert_close(ours, theirs, STEPS)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=15, deadline=None)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose
def test_bf16_rounds_once_under_random_options(name: str, data: Any, device: str) -> None:
    """Each of five steps from where ours stands, beside torch's in float64: parameters and state are rounded once."""
    row = RuleRow(name)
    case = data.draw(cases(row))
    ours, _ = pair(row, case, device, torch.bfloat16)
    if row.cls.rule.counts_in_state:  # else its absence tells the first step
        ours.materialize_state()
    for step in range(STEPS):
        exact = [torch.nn.Parameter(p.detach().double()) for p in params_of(ours)]
        theirs = reference(row.torch_cls, exact, **case["options"])
        if ours.state:
            theirs.load_state_dict(copy.deepcopy(ours.state_dict()))  # which makes it float64
        give(case, step, ours, theirs)
        for p, q in zip(params_of(ours), exact, strict=True):
            q.grad = None if p.grad is None else p.grad.double()
        ours.step()
        theirs.step()
        assert_rounded_once(ours, theirs, case["options"]["lr"])


def assert_rounded_once(ours: Any, theirs: Any, lr: float) -> None:
    """Values in bf16 are those in float64, rounded."""
    more = TOLERANCES["Adafactor, bf16"].value * lr if type(theirs).__name__ == "Adafactor" else 0.0
    for (p, state), (q, other) in zip(contents(ours), contents(theirs), strict=True):
        for key, x, y in [("parameter", p, q), *((key, state[key], other[key]) for key in state)]:
            y = torch.as_tensor(y, dtype=torch.float64)
            largest = max(1.0, float(y.detach().abs().max()) if y.numel() else 0.0)
            torch.testing.assert_close(
                x.double(), y, rtol=torch.finfo(x.dtype).eps / 2,
                atol=TOLERANCES["bf16, one step"].value * largest + doubt(theirs, key, y) + more,
                msg=lambda text, key=key: f"{key}: {text}",
            )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=4, deadline=None)
def test_kernels_equal_twins_under_random_options(name: str, data: Any, device: str) -> None:
    row = RuleRow(name)
    case = data.draw(cases(row))
    both = [
        row.cls(parameters(device, *case["shapes"], seed=case["seed"]), **case["options"], backend=backend)
        for backend in BACKENDS
    ]
    for step in range(2):
        give(case, step, *both)
        for optimizer in both:
            optimizer.step()
    assert_equal(*both)


@pytest.mark.parametrize("row", EACH, ids=str)
def test_a_group_added_in_mid_run(row: RuleRow, device: str) -> None:
    """With options of its own; a parameter that is there already is refused in torch's words."""
    ours = row.cls(parameters_of(row.cls, device), **row.options)
    theirs = reference(row.torch_cls, parameters_of(row.cls, device), **row.options)
    train([0], ours, theirs)
    shape = SHAPES_OF.get(row.cls.__name__, [(2,)])[0]
    texts = []
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": parameters(device, shape, seed=5)[0], "lr": 0.02})
        with pytest.raises(ValueError, match="more than one parameter group") as caught:
            optimizer.add_param_group({"params": params_of(optimizer)[:1]})
        texts.append(str(caught.value))
    assert texts[0] == texts[1] and ours.param_groups[1].keys() == theirs.param_groups[1].keys()
    train([1, 2], ours, theirs)
    assert_close(ours, theirs, 3)


@pytest.mark.parametrize("row", ALL, ids=str)
def test_launches_do_not_depend_on_the_number_of_tensors(row: RuleRow) -> None:
    """Of every rule here, also those that torch lacks; nothing runs."""
    found = []
    for count in (1, 2, 40):
        optimizer = row.cls(parameters("cpu", *[(4, 3)] * count), **row.options, backend="triton")
        optimizer._launcher = recorder = launch.Recorder()
        train([0], optimizer)
        found.append([spec.name for spec, _, _ in recorder.record])
    assert found[0] == found[1] == found[2] and len(found[0]) >= 2
