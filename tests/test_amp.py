"""Mixed precision: stock and own GradScaler in every mode against eager PyTorch, and exact skips under every rule."""

import math
from typing import Any

import pytest
import torch
from compare import ALL, BACKENDS, THREE, assert_close, assert_equal, parameters, parameters_of, params_of, train
from scaled import OURS, SCALERS, STOCK, bits, iterate, scale_gradients
from table import DTYPES, MATRIX_RULES, RULES, SPARSE_RULES, RuleRow

import fusedopt

SHAPES = ((33, 7), (5,), (), (0,), (3, 3))
OVERFLOWS: dict[str, dict[int, float]] = {"overflows": {0: math.inf, 2: math.nan, 3: -math.inf}, "none": {}}
LIMIT = 0.5


def both(device: str, backend: str, **options: Any) -> tuple[Any, Any]:
    """AdamW and SGD of ours."""
    adamw = fusedopt.AdamW(parameters(device, *SHAPES), lr=0.01, weight_decay=0.1, **options, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    sgd = fusedopt.SGD(parameters(device, *SHAPES, seed=1), lr=0.1, momentum=0.9, **options, backend=backend)  # pyright: ignore[reportArgumentType] # as above
    return adamw, sgd


def torchs(device: str) -> tuple[Any, Any]:
    """AdamW and SGD of torch."""
    adamw = torch.optim.AdamW(parameters(device, *SHAPES), lr=0.01, weight_decay=0.1, foreach=False)
    sgd = torch.optim.SGD(parameters(device, *SHAPES, seed=1), lr=0.1, momentum=0.9, foreach=False)
    return adamw, sgd


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("overflows", OVERFLOWS)
@pytest.mark.parametrize("amp_scaling", [False, True], ids=["default", "amp_scaling"])
@pytest.mark.parametrize("clips", [False, True], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("unscales", [False, True], ids=["scaled", "unscale_"])
@pytest.mark.parametrize("scaler_class", SCALERS, ids=["stock", "fusedopt"])
def test_every_mode_is_torchs(
    scaler_class: Any, unscales: bool, clips: bool, amp_scaling: bool, overflows: str, backend: str, device: str
) -> None:
    """Two optimizers under one scaler; only the first overflows, so only it is skipped, but the scale falls for both.

    The scale is a power of two, so unscaling is exact, and it grows every second clean iteration.
    """
    ours = both(device, backend, amp_scaling=amp_scaling, **dict(clip_grad_norm=LIMIT) if clips else {})
    theirs = torchs(device)
    scalers = scaler_class(device, 2.0**10, growth_interval=2), STOCK(device, 2.0**10, growth_interval=2)
    steps = 6 if overflows == "overflows" else 4
    for step in range(steps):
        bad = OVERFLOWS[overflows].get(step)
        for scaler, optimizers in zip(scalers, (ours, theirs), strict=True):
            scale_gradients(step, scaler, *optimizers, bad=bad)
        iterate(scalers[0], *ours, unscales=unscales)
        iterate(scalers[1], *theirs, unscales=True, clip=LIMIT if clips else None)
        assert scalers[0].state_dict() == scalers[1].state_dict()
    for optimizer, reference in zip(ours, theirs, strict=True):
        assert_close(optimizer, reference, steps)
        assert not {"grad_scale", "found_inf", "_check_nonfinite"} & vars(optimizer).keys()
    assert {float(s["step"]) for s in ours[0].state.values()} == {float(steps - len(OVERFLOWS[overflows]))}
    assert scalers[0].get_scale() == (2.0**8 if overflows == "overflows" else 2.0**12)


def check_skip(row: RuleRow, backend: str, device: str, scaler: Any, **options: Any) -> None:
    """An overflow leaves every bit, and the run goes on as if that iteration had not been."""
    ours = row.cls(parameters_of(row.cls, device), **row.options, **options, backend=backend)
    undisturbed = row.cls(parameters_of(row.cls, device), **row.options, **options, backend=backend)
    for step, bad in ((0, None), (1, math.inf), (2, None)):
        scale_gradients(step, scaler, ours, bad=bad)
        before = bits(ours)
        iterate(scaler, ours)
        assert (bits(ours) == before) == (bad is not None)
    assert scaler.get_scale() == 4.0
    train((0, 2), undisturbed)
    assert_equal(ours, undisturbed)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", ALL, ids=str)
def test_an_overflow_changes_nothing_under_any_rule(row: RuleRow, backend: str, device: str) -> None:
    check_skip(row, backend, device, OURS(device, 8.0))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [*THREE, RULES[-1], MATRIX_RULES[0], MATRIX_RULES[2], SPARSE_RULES[0]], ids=str)
def test_the_skip_that_stock_asks_for_changes_nothing(row: RuleRow, backend: str, device: str) -> None:
    check_skip(row, backend, device, STOCK(device, 8.0), amp_scaling=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overflow_in_one_part_skips_all(backend: str, device: str) -> None:
    """Two rules, fp32 and fp64, dense and sparse gradients: one decision."""
    matrix, vector = parameters(device, (4, 3), (5,))
    wide = parameters(device, (6, 2), dtype=torch.float64)
    muon = fusedopt.Muon([matrix, vector, *wide], adamw=dict(lr=0.1), backend=backend)  # pyright: ignore[reportArgumentType]  # one of BACKENDS
    rows = parameters(device, (6, 3), (6, 3))
    sgd = fusedopt.SGD([*parameters(device, (4,)), rows[0]], lr=0.1, backend=backend)  # pyright: ignore[reportArgumentType] # as above
    lazy = fusedopt.AdamW([*parameters(device, (4,)), rows[1]], sparse="lazy", backend=backend)  # pyright: ignore[reportArgumentType] # as above
    for optimizer, last in ((muon, wide[0]), (sgd, rows[0]), (lazy, rows[1])):
        scaler = OURS(device, 8.0)
        for step, bad in ((0, None), (1, math.inf), (2, None)):
            scale_gradients(step, scaler, optimizer)
            assert last.grad is not None
            if bad is not None:
                last.grad[2, 0] = bad
            if last is not wide[0]:
                last.grad = last.grad.to_sparse(1)
            before = bits(optimizer)
            iterate(scaler, optimizer)
            assert (bits(optimizer) == before) == (bad is not None)
        assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scaler_class", SCALERS, ids=["stock", "fusedopt"])
def test_an_overflow_leaves_averages(scaler_class: Any, backend: str, device: str) -> None:
    """Also that of a parameter without a gradient, which other steps average."""
    options: dict[str, Any] = dict(lr=0.1, ema_decay=0.5, ema_warmup=True, amp_scaling=True, backend=backend)
    ours, undisturbed = (fusedopt.SGD(parameters(device, *SHAPES), **options) for _ in "12")
    scaler = scaler_class(device, 8.0)
    for step, bad in ((0, None), (1, math.inf), (2, None)):
        scale_gradients(step, scaler, ours, bad=bad)
        params_of(ours)[1].grad = None
        before = bits(ours)
        iterate(scaler, ours)
        assert (bits(ours) == before) == (bad is not None)
        if bad is None:
            scale_gradients(step, STOCK("cpu", enabled=False), undisturbed)
            params_of(undisturbed)[1].grad = None
            undisturbed.step()
    assert_equal(ours, undisturbed)
    assert {float(state["ema_step"]) for state in ours.state.values()} == {2.0}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [{}, dict(clip_grad_norm=LIMIT)], ids=["unclipped", "clipped"])
@pytest.mark.parametrize(
    ("scaler_class", "dtype"),
    [*((STOCK, dtype) for dtype in (torch.float32, torch.float16)), *((OURS, dtype) for dtype in DTYPES)],
    ids=lambda x: x.__module__ if isinstance(x, type) else str(x),
)
def test_a_scale_that_is_a_power_of_two_costs_no_bit(
    scaler_class: Any, dtype: torch.dtype, clip: dict[str, Any], backend: str, device: str
) -> None:
    """In every dtype (torch's scaler refuses complex gradients); a parameter has no gradient on one step."""
    options: dict[str, Any] = dict(lr=0.1, momentum=0.9, amp_scaling=True, **clip, backend=backend)
    scaled, plain = (fusedopt.SGD(parameters(device, *SHAPES, dtype=dtype), **options) for _ in "12")
    scaler = scaler_class(device, 2.0**6)
    for step in range(3):
        scale_gradients(step, scaler, scaled)
        before = bits(scaled)
        for p, q in zip(params_of(scaled), params_of(plain), strict=True):
            assert p.grad is not None
            p.grad, q.grad = (None, None) if step == 1 and p.dim() == 2 else (p.grad, p.grad / 2.0**6)
        grads = [None if p.grad is None else p.grad.clone() for p in params_of(scaled)]
        iterate(scaler, scaled)
        plain.step()
        assert bits(scaled) != before
        assert all(g is None or torch.equal(g, p.grad) for g, p in zip(grads, params_of(scaled), strict=True))  # pyright: ignore[reportArgumentType] # p.grad is there when g is
    assert_equal(scaled, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_fp16_could_not_hold_unscaled_is_not_lost(backend: str, device: str) -> None:
    """A scaled gradient of 2⁻¹⁰ is 2⁻²⁶ unscaled, below fp16's least number 2⁻²⁴; `unscale_` refuses fp16 gradients."""
    p = torch.nn.Parameter(torch.zeros(5, dtype=torch.float16, device=device))
    optimizer = fusedopt.SGD([p], lr=2.0**25, backend=backend)  # pyright: ignore[reportArgumentType]  # one of BACKENDS
    scaler = OURS(device)
    scaler.scale(torch.zeros((), device=device))
    p.grad = torch.full_like(p, 2.0**-10)
    iterate(scaler, optimizer)
    assert p.tolist() == [-0.5] * 5
    with pytest.raises(ValueError, match="Attempting to unscale FP16 gradients"):
        scaler.unscale_(optimizer)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("number", ["float", "0-dim", "one element", "fp64"])
def test_a_grad_scale_set_by_hand(number: str, backend: str, device: str) -> None:
    """Without a scaler: gradients are multiplied by 1/grad_scale, rounded to fp32 once; found_inf skips. Both stay."""
    given: dict[str, Any] = {
        "float": 3.0, "0-dim": torch.tensor(3.0, device=device), "one element": torch.tensor([3.0], device=device),
        "fp64": torch.tensor(3.0, dtype=torch.float64, device=device),
    }  # fmt: skip
    ours, plain = (fusedopt.AdamW(parameters(device, *SHAPES), lr=0.01, backend=backend) for _ in "12")  # pyright: ignore[reportArgumentType] # one of BACKENDS
    ours_: Any = ours
    inverse = torch.tensor(1.0 / 3.0, dtype=torch.float32)
    train([0], ours, plain)
    ours_.grad_scale = given[number]
    for step in (1, 2):
        train([step], ours)
        scale_gradients(step, STOCK("cpu", enabled=False), plain)
        for q in params_of(plain):
            q.grad = None if q.grad is None else q.grad * inverse.to(device)
        plain.step()
    assert_equal(ours, plain)
    assert ours_.grad_scale is given[number]
    ours_.found_inf = given[number] * 0 + 1
    scale_gradients(3, STOCK("cpu", enabled=False), ours)
    before = bits(ours)
    ours.step()
    assert bits(ours) == before
    ours_.found_inf = given[number] * 0
    ours.step()
    assert bits(ours) != before
    del ours_.grad_scale, ours_.found_inf
    train([4], ours)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("unscales", [False, True], ids=["scaled", "unscale_"])
@pytest.mark.parametrize("scaler_class", SCALERS, ids=["stock", "fusedopt"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["float", "tensor"])
def test_a_grad_scale_set_by_hand_multiplies_the_scalers(
    as_tensor: bool, scaler_class: Any, unscales: bool, backend: str, device: str
) -> None:
    """For one step, as torch has it: the attribute is gone afterwards."""
    ours, plain = (fusedopt.SGD(parameters(device, *SHAPES), lr=0.1, amp_scaling=True, backend=backend) for _ in "12")  # pyright: ignore[reportArgumentType] # one of BACKENDS
    ours_: Any = ours
    scaler = scaler_class(device, 8.0)
    for step in range(3):
        scale_gradients(step, scaler, ours)
        if step == 1:
            ours_.grad_scale = torch.tensor([4.0], device=device) if as_tensor else 4.0
        iterate(scaler, ours, unscales=unscales)
        assert not hasattr(ours, "grad_scale")
        scale_gradients(step, STOCK(device, 1.0 if step != 1 else 0.25), plain)
        plain.step()
    assert_equal(ours, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [None, math.inf], ids=["spike", "overflow"])
def test_only_what_is_not_finite_lowers_the_scale(bad: float | None, backend: str, device: str) -> None:
    """A step above ``skip_norm_above``, which is compared with the norm after unscaling, changes nothing either."""
    optimizer = fusedopt.AdamW(parameters(device, *SHAPES), skip_norm_above=30.0, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    scaler = OURS(device, 8.0)
    scale_gradients(0, scaler, optimizer)  # their norm is about 10, scaled about 80
    before = bits(optimizer)
    iterate(scaler, optimizer)
    assert bits(optimizer) != before
    scale_gradients(1, scaler, optimizer, bad=bad)
    if bad is None:
        params_of(optimizer)[0].grad.mul_(100.0)  # pyright: ignore[reportOptionalMemberAccess]  # just set
    before = bits(optimizer)
    iterate(scaler, optimizer)
    assert bits(optimizer) == before
    assert scaler.get_scale() == (8.0 if bad is None else 4.0)
    assert scaler._get_growth_tracker() == (2 if bad is None else 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [None, math.nan], ids=["clean", "overflow"])
@pytest.mark.parametrize("scaler_class", SCALERS, ids=["stock", "fusedopt"])
def test_a_norm_from_elsewhere_with_a_scale(scaler_class: Any, bad: float | None, backend: str, device: str) -> None:
    """``total_norm`` is that of the unscaled gradients; inf or NaN in it stands for an overflow."""
    options: dict[str, Any] = dict(lr=0.1, clip_grad_norm=LIMIT, amp_scaling=True, backend=backend)
    ours, plain = (fusedopt.SGD(parameters(device, *SHAPES), **options) for _ in "12")
    scaler = scaler_class(device, 8.0)
    scale_gradients(0, scaler, ours, bad=bad)
    scale_gradients(0, STOCK("cpu", enabled=False), plain, bad=bad)
    norm = torch.nn.utils.get_total_norm([p.grad for p in params_of(plain) if p.grad is not None])
    before = bits(ours)
    scaler.step(ours, total_norm=norm)
    scaler.update()
    if bad is None:
        plain.step(total_norm=norm)
        assert_equal(ours, plain)
    else:
        assert bits(ours) == before
    assert scaler.get_scale() == (8.0 if bad is None else 4.0)
