"""Formats of quantised state: every code, every bf16 number, ties, extremes; against float64."""

import numpy as np
import pytest
import torch
from codec_cases import (
    ALL,
    LOG,
    SCALED,
    Log,
    Scaled,
    around_ties,
    as_codes,
    codes_of,
    every_bf16,
    from_codes,
    grouped,
    kept,
)  # fmt: skip

from fusedopt_kernels.state.groups import steps_eager
from fusedopt_kernels.table import SCALE_GROUP as GROUP

MANTISSAS = 1.0 + np.concatenate(([0, 1, 2**23 - 1], np.random.default_rng(0).integers(0, 2**23, 45))) * 2.0**-23
"""Of scales."""

ROUNDINGS = 6 * 2.0**-24
"""Relative error of arithmetic in fp32 on the way x → code → x̂: M/s, its product with x, the constant next to 1/M (two
units), its product with s and with the code.
"""


def finite_codes(case: Scaled) -> np.ndarray:
    return np.flatnonzero(np.isfinite(case.values) & (np.abs(case.values) <= case.most))


def in_groups(codes: np.ndarray, first: int) -> np.ndarray:
    """(groups, GROUP) with every code, after ``first``."""
    return grouped(codes.astype(np.float32), first).astype(np.int64)


def under_all_scales(codes: np.ndarray, exponent: int) -> tuple[np.ndarray, np.ndarray]:
    """Groups of codes once more for each of the mantissas, and the scales."""
    return np.tile(codes, (len(MANTISSAS), 1)), np.repeat(np.ldexp(MANTISSAS, exponent), len(codes))


@pytest.mark.parametrize("case", SCALED, ids=str)
@pytest.mark.parametrize("exponent", [-100, -40, 0, 40, 127])
def test_scaled_codes_decode_as_defined(case: Scaled, exponent: int) -> None:
    codes, s = under_all_scales(in_groups(finite_codes(case), 0), exponent)
    got = case.format.load(as_codes(case, codes), torch.from_numpy(s.astype(np.float32))).numpy()
    want = case.values[codes] * s[:, None] / case.most
    tiny = 2.0**-150  # below 2⁻¹²⁶ fp32 is spaced by 2⁻¹⁴⁹
    assert (np.abs(got - want) <= np.abs(want) * ROUNDINGS + tiny).all()
    assert (np.signbit(got) == np.signbit(want))[want != 0].all()


@pytest.mark.parametrize("case", SCALED, ids=str)
@pytest.mark.parametrize("exponent", [-99, 0, 126])
def test_scaled_values_give_their_codes_back(case: Scaled, exponent: int) -> None:
    """Beside the largest code, whatever the scale's mantissa; the scale moves by three units and soon comes to rest."""
    codes = finite_codes(case)
    if not case.signed:
        codes = codes[case.values[codes] > 0]
    largest = int(np.flatnonzero(case.values == case.most)[0])
    before, s = under_all_scales(in_groups(codes, largest), exponent)
    want = np.where(case.values[before] == 0, 0.0 if case.signed else case.grid[0], case.values[before])
    scales = torch.from_numpy(s.astype(np.float32))
    after, again = case.format.store(case.format.load(as_codes(case, before), scales), None)
    assert ((again / scales - 1).abs() <= 3 * 2.0**-24).all()
    np.testing.assert_array_equal(case.values[from_codes(case, after)], want)
    for _ in range(20):
        last = again
        after, again = case.format.store(case.format.load(after, last), None)
    assert torch.equal(again, last) and ((again / scales - 1).abs() <= 20 * 2.0**-24).all()
    np.testing.assert_array_equal(case.values[from_codes(case, after)], want)


@pytest.mark.parametrize("most", [7.0, 127.0, 448.0, 57344.0])
def test_what_values_are_multiplied_by_is_rounded_once(most: float) -> None:
    """torch takes a number over a tensor for a product with the reciprocal; a device divides."""
    scale = np.ldexp(MANTISSAS, 3).astype(np.float32)
    got = steps_eager(most, torch.from_numpy(scale))
    np.testing.assert_array_equal(got[:, 0].numpy(), (most / scale.astype(np.float64)).astype(np.float32))


@pytest.mark.parametrize("case", SCALED, ids=str)
def test_codes_are_rounded_to_nearest_even(case: Scaled) -> None:
    """With M as the group's largest nothing but the code is rounded, so that it is known exactly."""
    x = np.concatenate((every_bf16(), around_ties(4)))
    x = x[np.abs(x) <= case.most]
    x = grouped(x if case.signed else np.abs(x), case.most)
    codes, scales = case.format.store(torch.from_numpy(x), None)
    assert (scales == case.most).all()
    if case.most < 448:
        want = np.rint(x.astype(np.float64))
    else:
        want = torch.from_numpy(x).to(case.format.code).to(torch.float64).numpy()  # torch's own cast
    if not case.signed:
        want = np.maximum(want, case.grid[0])
    np.testing.assert_array_equal(case.values[from_codes(case, codes)], want)


@pytest.mark.parametrize("case", SCALED, ids=str)
@pytest.mark.parametrize("largest", [1.0, -0.7, 1.2345678e-12, 9.87654e-30, 3e38, 0.0])
def test_scaled_values_are_as_near_as_any_code(case: Scaled, largest: float) -> None:
    """Every bf16 number and every exponent of fp32 around ties, in groups whose largest is at least that given."""
    x = np.concatenate((every_bf16(), around_ties(2)))
    x = grouped(x if case.signed else np.abs(x), largest if case.signed else abs(largest))
    got, s = kept(case, x), case.scale(x)[:, None]
    stored = case.format.store(torch.from_numpy(x), None)[1].to(torch.float64).numpy()
    np.testing.assert_array_equal(stored, s[:, 0])
    assert np.isnan(got[np.isnan(s[:, 0])]).all()
    assert (got[s[:, 0] == 0] == 0).all() and (s == 0).any() == (abs(largest) < 2.0**-100)
    known = s[:, 0] > 0
    x, got, s = x[known].astype(np.float64), got[known], s[known]
    bound = case.distance(x * case.most / s) * s / case.most + np.abs(x) * ROUNDINGS + 2.0**-148
    assert (np.abs(got - x) <= bound).all()
    assert (got > 0).all() or case.signed
    assert (np.sign(got) * np.sign(x) >= 0).all()


@pytest.mark.parametrize("case", LOG, ids=str)
def test_log_codes_decode_as_defined(case: Log) -> None:
    codes = in_groups(np.arange(codes_of(case)), 0)
    for base in (0, 1, 7, 100, 300, (0x7F800000 >> case.shift) - case.most):
        got = case.format.load(as_codes(case, codes), torch.full((len(codes),), base, dtype=torch.int16)).numpy()
        np.testing.assert_array_equal(got.astype(np.float64), case.value(codes + base))


@pytest.mark.parametrize("case", LOG, ids=str)
def test_log_values_give_their_codes_back(case: Log) -> None:
    for base in range(0, (0x7F800000 >> case.shift) - case.most + 1, 3 if case.shift == 22 else 29):
        codes = in_groups(np.arange(codes_of(case)), case.most)
        bases = torch.full((len(codes),), base, dtype=torch.int16)
        after, again = case.format.store(case.format.load(as_codes(case, codes), bases), None)
        assert torch.equal(again, bases)
        np.testing.assert_array_equal(from_codes(case, after), codes)


@pytest.mark.parametrize("case", LOG, ids=str)
@pytest.mark.parametrize("largest", [1.0, 0.7, 1.2345678e-12, 9.87654e-30, 1e-42, 3.3e38, 0.0])
def test_log_values_are_rounded_as_defined(case: Log, largest: float) -> None:
    """Every bf16 number, inf and NaN too, and every exponent of fp32 around ties: exactly."""
    x = grouped(np.abs(np.concatenate((every_bf16(), around_ties(23 - case.shift), around_ties(4)))), largest)
    got = kept(case, x)
    np.testing.assert_array_equal(got, case.rounded(x))
    assert np.isnan(got[np.isnan(x)]).all()
    assert (got[x.max(axis=1) > 2.0**-100] > 0).all()  # a largest of NaN is not


BOUND = {"int8": 1 / 254, "int4": 1 / 14, "e4m3": 16 / 448, "e5m2": 4096 / 57344, "uint8": 1 / 33, "uint4": 1 / 5}
"""Largest error in units of the group's largest number: half of the largest step; of log formats half a step in units
of where it lies, 2ᵏ(1 + ½·2⁻ᵐ).
"""


@pytest.mark.parametrize("case", ALL, ids=str)
def test_no_magnitude_is_too_small_or_too_large(case: Scaled | Log) -> None:
    """The same numbers times 10ᵏ: errors as large a part of the group's largest, and nonnegative ones never zero."""
    x = np.random.default_rng(0).standard_normal((200, GROUP)) * np.exp2(
        np.random.default_rng(1).uniform(-9, 0, (200, GROUP))
    )
    x = x if case.signed else np.square(x)
    x[:, 0] = np.abs(x).max(axis=1)
    for power in (-30, *range(-12, 5), 30):
        y = (x / np.abs(x).max() * 10.0**power).astype(np.float32)
        y[:, 0] = np.maximum(y[:, 0], np.float32(2.0**-99))
        got, top = kept(case, y), np.abs(y).max(axis=1, keepdims=True).astype(np.float64)
        bound = BOUND[case.name.removesuffix(" nonnegative")] + ROUNDINGS
        assert (np.abs(got - y) <= bound * top).all()
        assert case.signed or (got > 0).all()


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_visible(case: Scaled | Log, bad: float) -> None:
    x = np.full((3, GROUP), 0.5, dtype=np.float32)
    x[1, 17] = bad if case.signed else abs(bad)
    got = kept(case, x)
    assert np.isfinite(got[[0, 2]]).all()
    if isinstance(case, Scaled) or np.isnan(bad):
        assert np.isnan(got[1]).all()
    else:
        assert got[1, 17] == np.inf


@pytest.mark.parametrize("case", ALL, ids=str)
def test_groups_of_zeros_and_of_subnormal_numbers(case: Scaled | Log) -> None:
    x = np.zeros((4, GROUP), dtype=np.float32)
    x[1, 3] = -0.0
    x[2, :] = 1e-42
    x[3, 5] = 1.0
    got = kept(case, x)
    assert (got[:2] == 0).all()
    assert (got[2] == 0).all() if isinstance(case, Scaled) else (got[2] == case.rounded(x[2:3])[0]).all()
    assert got[3, 5] == 1.0 or abs(got[3, 5] - 1.0) < ROUNDINGS
    assert (np.delete(got[3], 5) == 0).all() if case.signed else (got[3] > 0).all()
