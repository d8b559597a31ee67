"""Stochastic rounding: the mean over every value that the 16 random bits can take, not over a sample."""

from typing import Any

import numpy as np
import pytest
import torch
from codec_cases import LOG, SCALED, Log, Scaled, from_bits, kept

from fusedopt_kernels.param.split8 import SPLIT8
from fusedopt_kernels.param.stochastic import STOCHASTIC
from fusedopt_kernels.rng import dither_eager
from fusedopt_kernels.table import SCALE_GROUP as GROUP

NOISES = 1 << 16


def over_all_noise(case: Scaled | Log, x: np.ndarray, dithered: bool = False) -> np.ndarray:
    """(NOISES, GROUP): what one group of numbers becomes. Of the 32 bits of a dither the upper 16 take all values."""
    noise = np.arange(NOISES, dtype=np.int64) << 16 if dithered else np.arange(NOISES, dtype=np.int32)
    noise = np.broadcast_to(noise[:, None], (NOISES, GROUP)).copy()
    return kept(case, np.broadcast_to(x, (NOISES, GROUP)).copy(), noise)


def a_group_of(case: Scaled | Log, largest: float) -> np.ndarray:
    """Numbers all over a group's range: random ones, and ones on the grid, between its numbers and beside both."""
    generator = np.random.default_rng(0)
    x = largest * np.exp2(-generator.uniform(0, 24, GROUP)) * (generator.choice([-1, 1], GROUP) if case.signed else 1)
    quarter = GROUP // 4
    if isinstance(case, Scaled):
        x[quarter:] = generator.choice(case.grid, GROUP - quarter) * float(np.float32(largest)) / case.most
    else:
        x[quarter:] = case.rounded(np.abs(x)[None])[0, quarter:]
    x[2 * quarter : 3 * quarter] *= 1 + 2.0**-4
    x[3 * quarter :] *= 1 - 2.0**-22
    x = np.where(np.abs(x) > largest, 0.0, x).astype(np.float32)
    x[0] = largest
    return x


@pytest.mark.parametrize("case", SCALED, ids=str)
@pytest.mark.parametrize("largest", [1.0, 0.7, 3.3e-25])
def test_scaled_state_is_unbiased(case: Scaled, largest: float) -> None:
    """Linear codes are rounded to 2⁻¹⁵ of a step first, float8 to 2⁻¹⁶: half of that, and the roundings of fp32."""
    x = a_group_of(case, largest)
    got, s = over_all_noise(case, x), float(case.scale(x[None])[0])
    y = x.astype(np.float64) * case.most / s
    floor = y if case.signed else np.maximum(y, case.grid[0])
    bits = 15 if case.most < 448 else 16
    doubt = case.step(floor) * 2.0 ** -(bits + 1) + np.abs(floor) * 6 * 2.0**-24
    assert (np.abs(got.mean(axis=0) * case.most / s - floor) <= doubt).all()
    assert (np.abs(got * case.most / s - floor) <= case.step(floor) + doubt).all()
    assert (np.abs(got) <= s * (1 + 2.0**-23)).all() and (case.signed or (got > 0).all())


@pytest.mark.parametrize("case", LOG, ids=str)
@pytest.mark.parametrize("largest", [1.0, 2.0**-80, 2.0**-126])
@pytest.mark.parametrize("dithered", [False, True], ids=["stochastic", "dithered"])
def test_log_state_is_unbiased(case: Log, largest: float, dithered: bool) -> None:
    """Exactly, but for the bits below those that vary, which are cut off: 2⁻¹⁶ of a step at most."""
    x = a_group_of(case, largest)
    got = over_all_noise(case, x, dithered)
    k = case.number(x, nearest=False)
    base = max(int(k.max()) - case.most, 0)  # the largest is a power of two, which random bits do not change
    inside = k >= base
    below, above = case.value(k), case.value(k + 1)
    cut = from_bits(x.view(np.uint32).astype(np.int64) & -(1 << (case.shift - 16))).astype(np.float64)
    mean = got.mean(axis=0)
    np.testing.assert_array_equal(mean[inside], cut[inside])
    assert (x - cut <= (above - below) * 2.0**-16).all()
    assert ((got == below) | (got == above))[:, inside].all()
    assert (got[:, ~inside] == case.value(np.array(base))).all()


def test_the_largest_of_a_log_group_is_unbiased_too() -> None:
    for case in LOG:
        for x in (1.3, 1.999, 1.97e-20):
            got = over_all_noise(case, np.full(GROUP, x, dtype=np.float32)).mean(axis=0)
            assert (np.abs(got / np.float32(x) - 1) <= 2.0**-17).all()


@pytest.mark.parametrize("case", LOG, ids=str)
def test_dithered_state_is_unbiased_over_the_steps_of_an_element(case: Log) -> None:
    """n steps of a Weyl sequence of the golden section leave the mean of a step function within 3·ln(n)/n of it."""
    n = 4096
    generator = np.random.default_rng(2)
    x = (1.0 + generator.random((1, GROUP))).astype(np.float32)
    total = np.zeros(GROUP)
    for step in range(n):
        noise = dither_eager(np.arange(GROUP, dtype=np.int64) + 10**9, step + 12345)
        total += kept(case, x, noise[None])[0]
    step_of = case.value(case.number(x, nearest=False) + 1) - case.value(case.number(x, nearest=False))
    assert (np.abs(total / n - x) <= step_of * 3 * np.log(n) / n).all()


@pytest.mark.parametrize("case", LOG, ids=str)
def test_every_bit_of_a_dither_below_the_mantissa_counts(case: Log) -> None:
    """x one unit below the next number is rounded up by all but the smallest dither, one unit above by the largest."""
    unit, most = 1 << (32 - case.shift), (1 << 32) - 1
    x = np.full((1, GROUP), 1.5, dtype=np.float32).view(np.int32)
    for offset, noise, up in ((-1, unit, 0), (-1, unit - 1, -1), (1, most, 1), (1, most - unit, 0), (0, most, 0)):
        got = kept(case, (x + offset).view(np.float32), np.full((1, GROUP), noise, dtype=np.int64))
        assert (case.number(got) == case.number(np.array(1.5)) + up).all(), (offset, noise)


def bits_around(dtype: torch.dtype) -> np.ndarray:
    """Numbers of both signs, with every exponent at which a stored format behaves in its own way."""
    generator = np.random.default_rng(1)
    exponents = np.arange(1, 254) if dtype == torch.bfloat16 else np.arange(127 - 27, 127 + 16)
    exponents = np.repeat(np.concatenate((exponents, [0] if dtype == torch.bfloat16 else [])).astype(np.int64), 3)
    low = generator.integers(0, 1 << 23, exponents.shape)
    low[::3] &= -(1 << 16)  # a number of bf16
    sign = generator.integers(0, 2, exponents.shape) << 31
    return from_bits(sign | exponents << 23 | low)


def stored(form: Any, x: np.ndarray, noise: int, dtype: torch.dtype) -> np.ndarray:
    param = torch.zeros(len(x), dtype=dtype)
    residual = None if form.key is None else torch.zeros(len(x), dtype=form.dtype)
    form.store(torch.from_numpy(x.copy()), param, residual, torch.full((len(x),), noise, dtype=torch.int32))
    return form.load(param, residual).numpy().astype(np.float64)


def test_stochastic_bf16_weights_are_unbiased_exactly() -> None:
    x = bits_around(torch.bfloat16)
    total, grid = np.zeros(len(x)), np.abs(x.view(np.uint32) & 0xFFFF) == 0
    for noise in range(NOISES):
        got = stored(STOCHASTIC, x, noise, torch.bfloat16)
        total += got * 2.0**-16
        assert noise % 4096 or (got[grid] == x[grid]).all()
    np.testing.assert_array_equal(total, x.astype(np.float64))


def test_stochastic_fp16_weights_are_unbiased() -> None:
    """13 random bits: exact among normal numbers; below, where fp16 is spaced by 2⁻²⁴, within 2⁻³⁷."""
    x = bits_around(torch.float16)
    every = [stored(STOCHASTIC, x, noise << 3, torch.float16) for noise in range(1 << 13)]
    mean, wide = np.mean(every, axis=0), x.astype(np.float64)
    normal = np.abs(x) >= 2.0**-14
    np.testing.assert_array_equal(mean[normal], wide[normal])
    assert (np.abs(mean - wide)[~normal] <= 2.0**-37).all()
    assert (np.abs(np.array(every[::64]) - wide) < np.where(normal, np.abs(wide) * 2.0**-10, 2.0**-24)).all()
    np.testing.assert_array_equal(stored(STOCHASTIC, x, 0x1237, torch.float16), every[0x1237 >> 3])


def test_split8_weights_are_unbiased_exactly() -> None:
    x = bits_around(torch.bfloat16)
    total = np.zeros(len(x))
    for noise in range(256):
        got = stored(SPLIT8, x, noise, torch.bfloat16)
        total += got / 256.0
        assert ((got.astype(np.float32).view(np.uint32) & 0xFF) == 0).all()
        np.testing.assert_array_equal(stored(SPLIT8, x, noise | 0xA500, torch.bfloat16), got)
    np.testing.assert_array_equal(total, x.astype(np.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_is_not_finite_is_not_rounded(dtype: torch.dtype) -> None:
    x = np.array([np.inf, -np.inf, np.nan, 0.0, -0.0], dtype=np.float32)
    nan = from_bits(np.array([0x7FFFFFFF, 0xFFC00000, 0x7FC00000]))  # among them what CUDA makes
    for noise in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        np.testing.assert_array_equal(stored(STOCHASTIC, x, noise, dtype), x)
        assert np.isnan(stored(STOCHASTIC, nan, noise, dtype)).all()
