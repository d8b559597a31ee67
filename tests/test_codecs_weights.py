"""Formats of low-precision weights: every upper half of fp32 around its ties, extremes; against float64."""

import numpy as np
import pytest
import torch
from codec_cases import around_ties, from_bits

from fusedopt_kernels.param.format import WeightFormat
from fusedopt_kernels.param.kahan import KAHAN
from fusedopt_kernels.param.master import MASTER
from fusedopt_kernels.param.split8 import SPLIT8
from fusedopt_kernels.param.split16 import SPLIT16
from fusedopt_kernels.param.stochastic import STOCHASTIC

LOW = (torch.bfloat16, torch.float16)


def every_upper_half() -> np.ndarray:
    """All 65,536 with lower halves that are ties, of 16 and of 8 bits, or beside them."""
    low = [0, 1, 0x7F, 0x80, 0x81, 0xFF, 0x100, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0x8001, 0x807F, 0x8080, 0x8081, 0x80FF]
    low += [0xFF7F, 0xFF80, 0xFFFF]
    return from_bits((np.arange(65536, dtype=np.int64)[:, None] << 16 | np.array(low)).reshape(-1))


def kept(form: WeightFormat, x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(the weight, what the format holds) in float64, rounded to nearest."""
    param = torch.zeros(len(x), dtype=dtype)
    residual = torch.zeros(len(x), dtype=form.dtype_beside(param))
    form.store(torch.from_numpy(x.copy()), param, residual, None)
    value = form.load(param, residual)
    assert value.dtype == torch.float32 and residual.dtype == form.dtype_beside(param)
    return param.to(torch.float64).numpy(), value.to(torch.float64).numpy()


def rounded(x: np.ndarray, bits: int) -> np.ndarray:
    """fp32 numbers rounded to their upper ``bits``, ties up in magnitude, in float64; inf where none is near."""
    wide = x.astype(np.float64)
    finite = np.isfinite(wide)
    _, exponent = np.frexp(np.where(finite, wide, 0.0))
    step = np.exp2(np.maximum(exponent - 1, -126) - (bits - 9.0))
    y = np.copysign(np.floor(np.abs(np.where(finite, wide, 0.0)) / step + 0.5) * step, wide)
    return np.where(finite, np.where(np.abs(y) < 2.0**128, y, np.copysign(np.inf, y)), wide)


@pytest.mark.parametrize(("form", "bits"), [(SPLIT16, 32), (SPLIT8, 24)], ids=["split16", "split8"])
def test_splits_hold_their_bits_and_the_nearest_weight(form: WeightFormat, bits: int) -> None:
    """The weight is the bf16 number nearest to what is held, ties up in magnitude, and NaN wherever that is NaN."""
    x = every_upper_half()
    weight, value = kept(form, x, torch.bfloat16)
    held = rounded(x, bits)
    np.testing.assert_array_equal(value, held)
    np.testing.assert_array_equal(np.signbit(value), np.signbit(held) & ~np.isnan(held))
    np.testing.assert_array_equal(weight, rounded(held.astype(np.float32), 16))


@pytest.mark.parametrize("form", [SPLIT16, SPLIT8], ids=["split16", "split8"])
@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0xFFC00000, 0x7FFF8000])
def test_splits_keep_nan_in_sight(form: WeightFormat, bits: int) -> None:
    """CUDA's own NaN is the first: it would carry into −0."""
    weight, value = kept(form, from_bits(np.array([bits])), torch.bfloat16)
    assert np.isnan(weight).all() and np.isnan(value).all()


@pytest.mark.parametrize("form", [SPLIT16, SPLIT8, KAHAN, MASTER], ids=lambda form: form.name)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_weight_as_it_is_has_its_initial_residual(form: WeightFormat, dtype: torch.dtype) -> None:
    """Every bf16 or fp16 number, with what `initial` makes beside it, is held exactly and stored unchanged."""
    if dtype == torch.float16 and form in (SPLIT16, SPLIT8):
        with pytest.raises(ValueError, match=f"master_weights='{form.name}' needs bfloat16"):
            form.codec(dtype, False)
        return
    param = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    param = param[~param.isnan()]
    residual = form.initial(param)
    assert residual is not None and residual.dtype == form.dtype_beside(param)
    value = form.load(param, residual)
    assert torch.equal(value, param.to(torch.float32))
    again, beside = torch.empty_like(param), torch.empty_like(residual)
    form.store(value.clone(), again, beside, None)
    assert torch.equal(again, param)
    assert torch.equal(beside, residual)


@pytest.mark.parametrize(
    ("dtype", "relative", "absolute"),
    # what is left of x is at most half of an ulp of the weight, and half of that one's ulp is lost; fp32 once more
    [(torch.bfloat16, 2.0**-18, 2.0**-134), (torch.float16, 2.0**-22, 2.0**-25)], ids=["bfloat16", "float16"],
)  # fmt: skip
def test_kahan_holds_both_mantissas(dtype: torch.dtype, relative: float, absolute: float) -> None:
    x = np.concatenate((every_upper_half(), around_ties(8), around_ties(11)))
    weight, value = kept(KAHAN, x, dtype)
    nearest = torch.from_numpy(value).to(dtype).to(torch.float64).numpy()  # torch rounds to nearest even
    held = np.isfinite(weight)
    np.testing.assert_array_equal(weight[np.isfinite(nearest)], nearest[np.isfinite(nearest)])
    np.testing.assert_array_equal(value[~held], weight[~held])
    x = x[held].astype(np.float64)
    assert (np.abs(value[held] - x) <= np.abs(x) * (relative + 2.0**-24) + absolute).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_master_is_the_number_itself(dtype: torch.dtype) -> None:
    x = np.concatenate((every_upper_half(), around_ties(11)))
    weight, value = kept(MASTER, x, dtype)
    np.testing.assert_array_equal(value, x.astype(np.float64))
    np.testing.assert_array_equal(weight, torch.from_numpy(x).to(dtype).to(torch.float64).numpy())


def decayed(form: WeightFormat, dtype: torch.dtype, steps: int, rate: float, noise: torch.Tensor | None) -> np.ndarray:
    """A weight of 1 after so many steps of nothing but decay, 64 of them side by side."""
    param = torch.ones(64, dtype=dtype)
    residual = form.initial(param)
    for step in range(steps):
        x = form.load(param, residual)
        form.store(x - rate * x, param, residual, None if noise is None else noise[step])
    return form.load(param, residual).to(torch.float64).numpy()


@pytest.mark.parametrize("rate", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("form", [SPLIT16, SPLIT8, KAHAN, MASTER, STOCHASTIC], ids=lambda form: form.name)
def test_decay_alone_is_not_lost(form: WeightFormat, rate: float) -> None:
    """10⁴ steps, where bf16 alone would not move at all below a rate of 2⁻⁹.

    Nearest: half of a unit in the last place of what is held per step at most, below 1: 2⁻²⁵, 2⁻¹⁷ (split8 is meant to
    be rounded at random) or 2⁻¹⁸. At random: the variance of a step is at most a quarter of the unit squared; five
    standard deviations of the mean of 64.
    """
    steps, random = 10_000, form.random is not False
    noise = torch.randint(0, 65536, (steps, 64), dtype=torch.int32) if random else None
    got = decayed(form, torch.bfloat16, steps, rate, noise)
    want = (1.0 - rate) ** steps
    if random:
        unit = 2.0**-16 if form is SPLIT8 else 2.0**-8
        lost = 5 * unit / 2 * steps**0.5 / 64**0.5 + steps * 2.0**-24
    elif form is KAHAN:
        lost = min(steps * 2.0**-18, 1 - want)  # may stand still, never run away
    else:
        lost = steps * 2.0**-24
    assert abs(got.mean() - want) <= lost
    assert got.mean() < 1.0 or form is KAHAN
