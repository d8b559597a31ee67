"""Every rule with formats of state and weights: kernels and twins give the same bits, and hold what they should."""

from typing import Any

import pytest
import torch
from format_cases import (
    MASTERS,
    SHAPES,
    STATES,
    assert_same,
    both,
    combination,
    give,
    parameters,
    params_of,
    step_both,
    takes,
)  # fmt: skip
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from table import RULES

import fusedopt
from fusedopt.encoded import decode, recognise, shapes
from fusedopt.formats import QUANTISED
from fusedopt.rule import Rule

settings.register_profile(
    "formats", settings.get_profile("fusedopt"), phases=(Phase.explicit, Phase.generate),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
SOME, MANY = (settings(settings.get_profile("formats"), max_examples=n) for n in (6, 200))


@pytest.mark.parametrize("index", range(len(RULES)), ids=lambda i: str(RULES[i]))
def test_every_rule_in_some_formats(index: int, device: str) -> None:
    """A combination each; over the rows every format, rounding and dtype comes up several times."""
    row, (dtype, options) = RULES[index], combination(index)
    if not takes(row, options):
        options["state_dtype"] = "float32"
    step_both(both(lambda p, **b: row.cls(p, **row.options, **options, **b), device, dtype, SHAPES[:3]), range(2))


@pytest.mark.parametrize("weights", MASTERS)
@pytest.mark.parametrize("state", STATES)
def test_every_state_format_beside_every_weight_format(state: str, weights: str, device: str) -> None:
    rounding = ("nearest", "stochastic")[(STATES.index(state) + MASTERS.index(weights)) % 2]
    options: Any = dict(state_dtype=state, master_weights=weights, state_rounding=rounding, weight_decay=0.1)
    step_both(both(lambda p, **b: fusedopt.AdamW(p, **options, **b), device, torch.bfloat16, SHAPES[1:2]), range(2))


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    dtype, options = combination(draw(st.integers(0, 200)))
    row = draw(st.sampled_from([r for r in RULES if takes(r, options)]))
    rule = row.cls.rule
    shape = draw(st.sampled_from([(64, 64), (65, 65), (1030, 4), (2, 2050), (3, 7, 5, 41), (64, 8, 8), (1, 4096)]))
    if draw(st.booleans()):
        options["seed"] = draw(st.integers(0, 2**64))
    if draw(st.booleans()):
        options |= draw(st.sampled_from([dict(clip_grad_value=0.1), dict(l1=0.01), dict(ema_decay=0.9)]))
    if rule.cautious and not rule.n_norms and draw(st.booleans()):
        options["cautious"] = True
    if rule.measures and draw(st.booleans()):
        options["metrics"] = ("update_norm",)
    grad = draw(st.sampled_from([None, torch.float32, torch.bfloat16]))
    return dict(row=row, dtype=dtype, options=options, shape=shape, grad=grad, masked=draw(st.booleans()))


def run(case: dict[str, Any], device: str) -> None:
    row, dtype, shape = case["row"], case["dtype"], case["shape"]
    pair = both(lambda p, **b: row.cls(p, **row.options, **case["options"], **b), device, dtype, [shape, (5,)])
    if case["masked"]:
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device) < 0.5
        for optimizer in pair:
            optimizer.set_update_mask(params_of(optimizer)[0], mask)
    step_both(pair, range(3), case["grad"])


@given(case=cases())
@SOME
def test_any_case(case: dict[str, Any], device: str) -> None:
    run(case, device)


@pytest.mark.long
@given(case=cases())
@MANY
def test_many_cases(case: dict[str, Any], device: str) -> None:
    run(case, device)


MIXED = ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16, torch.float64))


@pytest.mark.parametrize(("dtype", "grad"), MIXED, ids=str)
def test_gradients_of_another_dtype(dtype: torch.dtype, grad: torch.dtype, device: str) -> None:
    options: Any = dict(state_dtype="int8", master_weights="kahan", state_rounding="stochastic")
    step_both(both(lambda p, **b: fusedopt.AdamW(p, **options, **b), device, dtype, SHAPES[1:2]), range(2), grad)


def test_state_is_torchs_beside_parameters_that_formats_do_not_hold(device: str) -> None:
    """fp64 and complex parameters are left as they are, in one optimizer with others."""
    options: Any = dict(state_dtype="int8", master_weights="split8", state_rounding="stochastic")
    for dtype in (torch.float64, torch.complex64):
        ps, qs = ([torch.nn.Parameter(torch.ones(64, 64, dtype=dtype, device=device))] for _ in range(2))
        ours, plain = fusedopt.AdamW(ps, **options, backend="triton"), fusedopt.AdamW(qs, backend="triton")
        for optimizer in (ours, plain):
            for p in params_of(optimizer):
                p.grad = torch.full_like(p, 0.25)
            optimizer.step()
        assert_same(ours, plain)


CLOSE = {
    "int8": ((0, 2**-7), (2**-4, 2**-15)),
    "float8_e4m3": ((2**-4, 2**-17), (2**-3, 2**-17)),
    "float8_e5m2": ((2**-3, 2**-31), (2**-2, 2**-31)),
    "int4": ((0, 2**-3), (0.5, 2**-7)),
}
"""Distance to the next number, of the value and of the group's largest: signed state, nonnegative state."""


def slots(rule: Rule) -> list[Any]:
    return [slot for slot in rule.state if slot.kind in ("signed", "nonnegative")]


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("name", [n for n in STATES if n in QUANTISED["signed"]])
def test_what_is_stored(name: str, backend: str, device: str) -> None:
    """Keys, shapes and dtypes as documented; what is too small or has one dim is fp32; values near the exact ones."""
    row = RULES[6]
    ours, plain = (
        row.cls(parameters(device, torch.float32), **row.options, backend=backend, **o)
        for o in (dict(state_dtype=name), {})
    )
    for optimizer in (ours, plain):
        give(0, params_of(optimizer), all_of=True)
        optimizer.step()
    for p, q in zip(params_of(ours), params_of(plain), strict=True):
        state, other = ours.state[p], plain.state[q]
        for slot in slots(row.cls.rule):
            if p.numel() < 4096 or p.dim() < 2:
                assert state[slot.name].dtype == torch.float32 and torch.equal(state[slot.name], other[slot.name])
                continue
            form = QUANTISED[slot.kind][name]
            codes, scales = state[f"{slot.name}_q"], state[f"{slot.name}_scale"]
            assert slot.name not in state and codes.dtype == form.code and scales.dtype == form.scale
            assert (tuple(codes.shape), tuple(scales.shape)) == shapes(form, p.shape)
            assert recognise(state, slot, p.shape) is form
            value, exact = decode(codes, scales, form, p.shape), other[slot.name]
            relative, absolute = CLOSE[name][slot.kind == "nonnegative"]
            assert ((value - exact).abs() <= relative * exact.abs() + absolute * exact.abs().max()).all()
