"""The oracle of `fusedopt verify` itself: rounding, units in the last place, and the rules by independent means."""

import dataclasses
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fusedopt.rules import RULES
from fusedopt.verify import subjects
from fusedopt.verify.formats import BRAIN, DOUBLE, DTYPES, HALF, SINGLE
from fusedopt.verify.oracles import CONFIGURATIONS, ORACLES
from fusedopt.verify.problem import TIMES, build, configuration
from tests.tolerances import BOUNDS, TOLERANCES


@given(st.floats(allow_nan=False))
def test_round_to_single_and_half_is_numpy_s(x):
    with np.errstate(over="ignore", under="ignore"):
        assert SINGLE.round(np.array([x], np.float64))[0] == np.float32(x)
        assert HALF.round(np.array([x], np.float64))[0] == np.float16(x)


def test_round_to_bfloat16_is_torch_s_on_every_tie_and_neighbour():
    high = np.arange(0, 2**15, dtype=np.uint32) << 16  # all non-negative patterns, subnormals included
    below_tie, tie, above_tie = (high | np.uint32(low) for low in (0x7FFF, 0x8000, 0x8001))
    for bits in (high, below_tie, tie, above_tie):
        x = bits.view(np.float32)
        x = x[np.isfinite(x)]
        expected = torch.from_numpy(x).to(torch.bfloat16).double().numpy()
        np.testing.assert_array_equal(BRAIN.round(x.astype(np.float64)), expected)


def test_rounding_happens_once():
    just_above_tie = np.array([1 + 2.0**-8 + 2.0**-40], np.float64)  # float32 would drop the last bit and leave a tie
    assert BRAIN.round(just_above_tie)[0] == 1 + 2.0**-7
    just_above_tie = np.array([1], np.longdouble) + np.longdouble(2) ** -53 + np.longdouble(2) ** -60
    assert DOUBLE.round(just_above_tie)[0] == 1 + 2.0**-52


@given(st.floats(min_value=0, max_value=65000))
def test_ulp_is_numpy_s_spacing(x):
    for fmt, kind in ((HALF, np.float16), (SINGLE, np.float32), (DOUBLE, np.float64)):
        stored = kind(x)
        assert fmt.ulp(np.array([stored], np.float64))[0] == np.spacing(stored)


def test_every_rule_has_an_oracle_and_every_value_a_bound_with_its_derivation():
    assert set(ORACLES) == set(RULES)
    for config in CONFIGURATIONS:
        slots = build(config, "float32", 1).slots
        for slot in slots:
            assert len(BOUNDS[config.rule, config.name][slot].why) > 20, (config, slot)


@pytest.fixture
def float64_by_default():
    """Under this default dtype torch keeps scalar slots in float64 too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


IN_TORCH = [c for c in CONFIGURATIONS if subjects.torch_forms(c.rule) and c.rule != "muon"]
"""Muon's torch form iterates in bf16 whatever the parameters are: test_muon.py compares it with the oracle."""


@pytest.mark.usefixtures("float64_by_default")
@pytest.mark.parametrize("config", IN_TORCH, ids=str)
def test_oracle_agrees_with_torch_in_float64(config):
    oracle = ORACLES[config.rule]
    if oracle.scalars:  # ASGD's first step size is the learning rate in fp32, torch's here in float64
        config = dataclasses.replace(config, options={**config.options, "lr": 2.0**-9})
    rng = np.random.default_rng(5)
    shape = (oracle.shapes or ((50,),))[0]
    start = rng.standard_normal(shape)
    p = torch.from_numpy(start.copy()).requires_grad_()
    optimizer = subjects.torch_subject(config, "for-loop")([p])
    exact, state = start.astype(np.longdouble), {}
    for t in range(1, 9):
        g = rng.standard_normal(shape)
        p.grad = subjects.all_rows(torch.from_numpy(g)) if oracle.sparse else torch.from_numpy(g)
        optimizer.step()
        new = oracle.run(config, t, exact, g.astype(np.longdouble), state)
        state = {key: value.exact for key, value in new.items()}
        exact = state.pop("param")
        for got, want in [(p.detach(), exact), *((optimizer.state[p][key], state[key]) for key in state)]:
            error = np.max(np.abs(got.numpy() - want)) / np.max(np.abs(want))
            assert error <= TOLERANCES["oracle, torch in float64"].value


def test_adam_with_constant_gradient_and_no_eps_moves_by_lr():
    config = configuration("adam", "plain")
    oracle = ORACLES["adam"]
    p, g, state = np.zeros(3), np.array([1e-8, -1.0, 1e4]), {}
    for t in range(1, 6):
        new = oracle.step({**oracle.defaults, "eps": 0.0}, t, p, g, state)
        p, state = new["param"].exact, {key: new[key].exact for key in ("exp_avg", "exp_avg_sq")}
        np.testing.assert_allclose(p, -config.options.get("lr", 1e-3) * t * np.sign(g), rtol=1e-13)


def test_sgd_momentum_is_the_geometric_sum_and_adamw_decays_geometrically():
    sgd, state, p = configuration("sgd", "momentum"), {}, np.zeros(1)
    for t in range(1, 8):
        new = ORACLES["sgd"].run(sgd, t, p, np.ones(1), state)
        p, state = new["param"].exact, {"momentum_buffer": new["momentum_buffer"].exact}
        np.testing.assert_allclose(state["momentum_buffer"], (1 - 0.9**t) / (1 - 0.9), rtol=1e-14)
    adamw, p = configuration("adamw", "plain"), np.full(1, 2.0)
    for t in range(1, 8):
        p = ORACLES["adamw"].run(adamw, t, p, np.zeros(1), {})["param"].exact
        np.testing.assert_allclose(p, 2.0 * (1 - 1e-3 * 0.01) ** t, rtol=1e-15)


@pytest.mark.parametrize("t", [1, 2, 1000])
def test_adam_in_longdouble_agrees_with_40_digits(t):
    config = configuration("adam", "weight decay")
    p, g, m, v = 0.25, -0.75, 0.125, 0.0625
    with localcontext() as context:
        context.prec = 40
        beta1, beta2, lr, eps, decay = map(Decimal, (0.9, 0.999, 1e-3, 1e-8, 0.01))
        gradient = Decimal(g) + decay * Decimal(p)
        new_m = beta1 * Decimal(m) + (1 - beta1) * gradient
        new_v = beta2 * Decimal(v) + (1 - beta2) * gradient**2
        denominator = (new_v / (1 - beta2**t)).sqrt() + eps
        expected = Decimal(p) - lr * (new_m / (1 - beta1**t)) / denominator
        given_state = {"exp_avg": np.array([m], np.longdouble), "exp_avg_sq": np.array([v], np.longdouble)}
        new = ORACLES["adam"].run(config, t, np.array([p], np.longdouble), np.array([g], np.longdouble), given_state)
        for key, want in (("param", expected), ("exp_avg", new_m), ("exp_avg_sq", new_v)):
            high = float(new[key].exact[0])
            got = Decimal(high) + Decimal(float(new[key].exact[0] - np.longdouble(high)))
            assert abs(got / want - 1) <= Decimal(TOLERANCES["oracle, 40 digits"].value)


def test_addend_is_what_cancels_not_what_is_left():
    config = configuration("sgd", "plain")
    new = ORACLES["sgd"].run(config, 1, np.array([1.0]), np.array([10.0]), {})
    assert new["param"].exact == pytest.approx(0, abs=1e-16)
    assert new["param"].addend == 1
    config = configuration("adam", "weight decay")  # L2 term and gradient cancel inside both moments
    new = ORACLES["adam"].run(config, 1, np.array([100.0]), np.array([-1.0]), {})
    np.testing.assert_allclose(new["exp_avg"].addend, 0.1)
    np.testing.assert_allclose(new["exp_avg_sq"].addend, 0.001)


@pytest.mark.parametrize("dtype", DTYPES)
def test_data_is_representable_finite_and_the_same_every_time(dtype):
    config = configuration("adam", "amsgrad")
    first, second = build(config, dtype, 3), build(config, dtype, 3)
    store = DTYPES[dtype].store
    assert [case.t for case in first.steps] == list(TIMES)
    for case, again in zip(first.steps, second.steps, strict=True):
        for index, (p, g) in enumerate(zip(case.params, case.grads, strict=True)):
            for x in (p, g, *case.states[index].values()):
                assert np.all(np.isfinite(x))
                np.testing.assert_array_equal(store.round(x), x)
            np.testing.assert_array_equal(g, again.grads[index])
    sizes = np.abs(np.concatenate([g.ravel() for case in first.steps for g in case.grads]))
    low, high = DTYPES[dtype].gradients
    assert sizes.max() > 10 ** (high - 0.5) and sizes[sizes > 0].min() < 10 ** (low + 0.5) and np.any(sizes == 0)
    assert first.steps[0].params[-1].size != build(configuration("adam", "plain"), dtype, 3).steps[0].params[-1].size
