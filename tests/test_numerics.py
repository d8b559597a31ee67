"""numerics: exact division and root, bf16 by its bits, bias correction, the random stream."""

from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fusedopt_kernels import numerics as N
from fusedopt_kernels import rng as R


@triton.jit
def _narrow_kernel(x, out, n, T: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, N.narrow(tl.load(x + i, mask=i < n), T).to(tl.int16, bitcast=True), mask=i < n)


@triton.jit
def _widen_kernel(bits, out, n, T: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, N.widen(tl.load(bits + i, mask=i < n).to(tl.uint16, bitcast=True), T, tl.float32), mask=i < n)


@triton.jit
def _arithmetic_kernel(a, b, quotient, root, largest, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x, y = tl.load(a + i), tl.load(b + i)
    tl.store(quotient + i, N.div(x, y, EXACT))
    tl.store(root + i, N.sqrt(tl.abs(x), EXACT))
    tl.store(largest + i, N.maximum(x, y))


@triton.jit
def _power_kernel(q, t, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, N.one_minus_power(tl.load(q + i), tl.load(t + i)))


@triton.jit
def _random_kernel(key, start, step, one, eight, BLOCK: tl.constexpr):
    k, s, t = tl.load(key), tl.load(start), tl.load(step)
    i = tl.arange(0, BLOCK)
    tl.store(one + i, R.random16(k, s + i, t).to(tl.int32))
    tl.store(eight + i, R.random16_by_eight(k, s - s % 8, t, BLOCK).to(tl.int32))


def _interesting_floats() -> torch.Tensor:
    """Every bf16 pattern, the ties halfway between neighbours, one bit beside the ties, and both extremes."""
    high = torch.arange(65536, dtype=torch.int64) << 16
    low = torch.tensor([0, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=torch.int64)
    return (high[:, None] | low).flatten().to(torch.int32).view(torch.float32)


def test_bf16_encode_all_patterns_and_ties(device: str) -> None:
    x = _interesting_floats().to(device)
    bits = torch.empty(x.numel(), dtype=torch.int16, device=device)
    _narrow_kernel[(triton.cdiv(x.numel(), 65536),)](x, bits, x.numel(), tl.bfloat16, 65536)
    got, want = bits.view(torch.bfloat16), x.to(torch.bfloat16)
    nan = torch.isnan(x)
    assert torch.equal(torch.isnan(got), nan)
    assert torch.equal(got[~nan].view(torch.int16), want[~nan].view(torch.int16))


def test_bf16_decode_all_patterns(device: str) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16).to(device)
    out = torch.empty(65536, device=device)
    _widen_kernel[(1,)](bits, out, 65536, tl.bfloat16, 65536)
    assert torch.equal(out.view(torch.int32), bits.to(torch.int32) << 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_division_root_and_maximum_are_exact(device: str, dtype: torch.dtype) -> None:
    n = 8192
    scale = torch.logspace(-15, 15, n, dtype=torch.float64)
    a = (torch.randn(n, dtype=torch.float64) * scale).to(dtype)
    b = (torch.randn(n, dtype=torch.float64) * scale.flip(0).sqrt()).to(dtype)
    a[:4] = torch.tensor([0.0, float("inf"), float("nan"), 1e-40])
    outs = [torch.empty(n, dtype=dtype, device=device) for _ in range(3)]
    _arithmetic_kernel[(1,)](a.to(device), b.to(device), *outs, True, n)
    with np.errstate(all="ignore"):
        want = (a.numpy() / b.numpy(), np.sqrt(np.abs(a.numpy())), np.maximum(a.numpy(), b.numpy()))
    for got, exact in zip(outs, want, strict=True):
        np.testing.assert_array_equal(got.cpu().numpy(), exact)


POWERS = [(1.0 - beta, t) for beta in (0.0, 0.9, 0.999, 0.99999) for t in (1, 2, 3, 10, 1000, 12345, 10**6)]


def test_one_minus_power_matches_decimal_arithmetic() -> None:
    getcontext().prec = 60
    for q, t in POWERS:
        exact = 1 - (1 - Decimal(q)) ** t
        assert abs(Decimal(N.one_minus_power_eager(q, t)) / exact - 1) < Decimal("5e-16"), (q, t)


def test_one_minus_power_kernel_gives_the_bits_of_its_twin(device: str) -> None:
    padded = [*POWERS, *[(1.0, 1)] * (32 - len(POWERS))]
    q = torch.tensor([q for q, _ in padded], dtype=torch.float64, device=device)
    t = torch.tensor([t for _, t in padded], device=device)
    out = torch.empty(32, dtype=torch.float64, device=device)
    _power_kernel[(1,)](q, t, out, 32)
    assert out.tolist()[: len(POWERS)] == [N.one_minus_power_eager(*power) for power in POWERS]


def test_philox_matches_published_vectors() -> None:
    # Random123's known-answer file: philox4x32 with 7 rounds, zero key and counter
    words = R.philox_words_eager(0, np.array([0]), 0)
    assert [int(w[0]) for w in words] == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


@pytest.mark.parametrize("start", [0, 5, 4096, 2**31 - 8, 2**32 - 16, 2**35 - 8, 2**40 + 64])
@pytest.mark.parametrize("key", [0, 1234, -5, 2**63 - 1, -(2**63)])
def test_random_bits_have_one_definition(device: str, start: int, key: int) -> None:
    n, step = 64, 7
    tensors = [torch.tensor([v], dtype=torch.int64, device=device) for v in (key, start, step)]
    one, eight = (torch.empty(n, dtype=torch.int32, device=device) for _ in range(2))
    _random_kernel[(1,)](*tensors, one, eight, n)
    index = np.arange(start, start + n)
    assert one.tolist() == R.random16_eager(key, index, step).tolist()
    assert eight.tolist() == R.random16_eager(key, index - start % 8, step).tolist()


def test_random_bits_depend_on_key_index_and_step() -> None:
    index = np.arange(4096)
    base = R.random16_eager(1, index, 1)
    for other in (R.random16_eager(2, index, 1), R.random16_eager(1, index, 2), R.random16_eager(1, index + 8, 1)):
        assert np.mean(base == other) < 0.01
    assert abs(float(base.mean()) / 65535 - 0.5) < 0.02  # 4 sigma of the mean of 4096 uniform numbers


def test_stream_key_is_fixed() -> None:
    assert R.stream_key(0, 1, "param") == R.stream_key(0, 1, "param")
    assert len({R.stream_key(s, i, p) for s in (0, 1) for i in (0, 1) for p in ("param", "exp_avg")}) == 8
    assert R.stream_key(0, 0, "param") == GOLDEN_KEY


GOLDEN_KEY = -7888901146919754696
"""The stream's definition does not change: a checkpoint's random numbers depend on it."""
