"""Device codecs run alone: the bits of their eager twins, nothing outside the tensors, and what they compile to."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from codec_cases import ALL, Log, Scaled, around_ties, every_bf16, grouped
from compiled_code import barriers, resources

from fusedopt_kernels import launch, numerics, place, table
from fusedopt_kernels.param.format import WeightFormat
from fusedopt_kernels.param.kahan import KAHAN
from fusedopt_kernels.param.master import MASTER
from fusedopt_kernels.param.split8 import SPLIT8
from fusedopt_kernels.param.split16 import SPLIT16
from fusedopt_kernels.param.stochastic import STOCHASTIC
from fusedopt_kernels.table import PARAM, RESIDUAL, ROW_WIDTH, SLOTS
from fusedopt_kernels.table import SCALE_GROUP as GROUP

BLOCK = 65536 if numerics.INTERPRETED else 1024

WEIGHTS = [(SPLIT16, torch.bfloat16, False), (SPLIT8, torch.bfloat16, False), (SPLIT8, torch.bfloat16, True)]
WEIGHTS += [(KAHAN, dtype, False) for dtype in (torch.bfloat16, torch.float16)]
WEIGHTS += [(MASTER, dtype, False) for dtype in (torch.bfloat16, torch.float16)]
WEIGHTS += [(STOCHASTIC, dtype, True) for dtype in (torch.bfloat16, torch.float16)]


@triton.jit
def _block(rows, N: tl.constexpr, ROWWISE: tl.constexpr, FULL: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * N
    if FULL:
        return start, place.straight(start, N, N)
    else:
        return start, place.tail(rows, start, place.positions(rows, ROWWISE) - start, ROWWISE, N)


@triton.jit
def _given(x, noise, start, N: tl.constexpr):
    """Numbers and random bits by position, also where there is no element."""
    i = start + tl.arange(0, N)
    return tl.load(x + i).to(tl.float32), tl.load(noise + i).to(tl.int32).to(tl.uint32, bitcast=True)


@triton.jit
def store_state(rows, x, noise, CODEC: tl.constexpr, N: tl.constexpr, ROWWISE: tl.constexpr, FULL: tl.constexpr):
    start, at = _block(rows, N, ROWWISE, FULL)
    v, bits = _given(x, noise, start, N)
    CODEC[1](tl.load(rows + SLOTS), tl.load(rows + SLOTS + 1), at, v, bits, CODEC[2], CODEC[3], FULL)


@triton.jit
def load_state(rows, out, CODEC: tl.constexpr, N: tl.constexpr, ROWWISE: tl.constexpr, FULL: tl.constexpr):
    start, at = _block(rows, N, ROWWISE, FULL)
    v = CODEC[0](tl.load(rows + SLOTS), tl.load(rows + SLOTS + 1), at, CODEC[2], tl.float32, FULL)
    tl.store(out + start + tl.arange(0, N), v, mask=at[2])


@triton.jit
def store_weight(rows, x, noise, out, CODEC: tl.constexpr, N: tl.constexpr, FULL: tl.constexpr):
    start, at = _block(rows, N, False, FULL)
    v, bits = _given(x, noise, start, N)
    held = CODEC[1](tl.load(rows + PARAM), tl.load(rows + RESIDUAL), at, v, bits, CODEC[2], CODEC[3], FULL)
    tl.store(out + start + tl.arange(0, N), held, mask=at[2])


@triton.jit
def load_weight(rows, out, CODEC: tl.constexpr, N: tl.constexpr, FULL: tl.constexpr):
    start, at = _block(rows, N, False, FULL)
    v = CODEC[0](tl.load(rows + PARAM), tl.load(rows + RESIDUAL), at, CODEC[2], tl.float32, FULL)
    tl.store(out + start + tl.arange(0, N), v, mask=at[2])


def run(kernel: Any, grid: tuple[int], *arguments: Any) -> None:
    with np.errstate(all="ignore"):  # interpreted, what overflows or is NaN would warn
        kernel[grid](*arguments, num_warps=4, **launch.OPTIONS)


def a_row(device: str, **columns: int) -> torch.Tensor:
    row = torch.zeros(ROW_WIDTH.value, dtype=torch.int64)
    for name, value in columns.items():
        row[getattr(table, name).value] = value
    return row.to(device)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit; NaN, of which there are many, equals NaN."""
    if a.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        return torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if not a.dtype.is_floating_point:
        return torch.equal(a, b)
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])


def bits_for(case: Scaled | Log, random: bool, shape: tuple[int, int]) -> torch.Tensor | None:
    """Noise for an eager `store`."""
    if random:
        return torch.randint(0, 1 << 16, shape, dtype=torch.int32)
    return torch.randint(0, 1 << 32, shape) if case.format.dithered else None


def encode(
    case: Scaled | Log, x: torch.Tensor, length: int, noise: torch.Tensor | None, tensors: list[torch.Tensor]
) -> torch.Tensor:
    """Run the device codec on (rows, whole groups) positions of rows of ``length`` into (codes, scales); what it then
    reads back.
    """
    rowwise, device = length % GROUP != 0, x.device.type
    random = noise is not None and noise.dtype == torch.int32
    rows = a_row(device, NUMEL=len(x) * length, ROW_LENGTH=length)
    rows[SLOTS.value], rows[SLOTS.value + 1] = (t.data_ptr() for t in tensors)
    block = min(BLOCK, max(1024, triton.next_power_of_2(x.numel())))
    full = not rowwise and x.numel() % block == 0
    room = -(-x.numel() // block) * block
    given = torch.full((room,), torch.nan, device=device)
    given[: x.numel()] = x.reshape(-1)
    bits = torch.zeros(room, dtype=torch.int32, device=device)
    if noise is not None:
        bits[: x.numel()] = noise.reshape(-1)
    out = torch.zeros(room, device=device)
    codec, grid = case.format.codec(random), (room // block,)
    run(store_state, grid, rows, given, bits, codec, block, rowwise, full)
    run(load_state, grid, rows, out, codec, block, rowwise, full)
    return out[: x.numel()].view(x.shape)


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("random", [False, True], ids=["nearest", "stochastic"])
def test_state_on_the_device_has_the_bits_of_its_twin(
    device: str, poison: Callable[..., torch.Tensor], case: Scaled | Log, random: bool
) -> None:
    both = grouped(every_bf16(), 3e-20), grouped(np.random.default_rng(0).standard_normal(GROUP * 1100), 0.7)
    x = torch.from_numpy(np.concatenate(both))[: 65536 * 2 // GROUP]
    x[7, 3], x[8, 4] = torch.inf, -torch.inf  # every bf16 has them beside NaN only
    x = x if case.signed else x.abs()
    for n in (len(x), len(x) - 1):  # full blocks alone, and a tail
        noise = bits_for(case, random, (n, GROUP))
        codes, scales = case.format.store(x[:n], noise)
        got = [poison(t.numel(), t.dtype if t.itemsize > 1 else torch.uint8).view(t.dtype) for t in (codes, scales)]
        read = encode(case, x[:n].to(device), GROUP, None if noise is None else noise.to(device), got)
        finite = case.format.load(codes, scales).isfinite().all(dim=1)  # codes of NaN mean nothing
        assert same(got[1].cpu(), scales)
        assert same(got[0].view(codes.shape).cpu()[finite], codes[finite])
        assert same(read.cpu(), case.format.load(codes, scales))


@pytest.mark.parametrize("case", ALL, ids=str)
@pytest.mark.parametrize("random", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize(("n", "length"), [(1, 1), (3, 31), (5, 65), (700, 50), (64, 127)])
def test_partial_groups_see_their_own_elements_only(
    device: str, poison: Callable[..., torch.Tensor], case: Scaled | Log, random: bool, n: int, length: int
) -> None:
    """Beyond a row's end are large numbers and NaN, which must not enter a maximum; packed rows end in zeros."""
    wide = -(-length // GROUP) * GROUP
    x, beyond = torch.randn(n, wide) * torch.logspace(-8, 8, n)[:, None], torch.arange(wide) >= length
    x = x if case.signed else x.abs()
    noise = bits_for(case, random, (n, wide))
    alone = x.masked_fill(beyond, 0.0).view(-1, GROUP)
    codes, scales = case.format.store(alone, None if noise is None else noise.masked_fill(beyond, 0).view(-1, GROUP))
    kept = wide // 8 if case.format.packed == 8 else length
    codes = codes.view(n, -1)
    want = codes if case.format.packed == 8 else codes[:, :kept]
    got = [poison(t.numel(), t.dtype if t.itemsize > 1 else torch.uint8).view(t.dtype) for t in (want, scales)]
    given = torch.where(beyond, torch.where(torch.arange(wide) % 2 == 0, torch.nan, 100 * x), x).to(device)
    read = encode(case, given, length, None if noise is None else noise.to(device), got).cpu()
    assert same(got[0].view(want.shape).cpu(), want.contiguous())
    assert same(got[1].cpu(), scales)
    decoded = case.format.load(codes.view(-1, codes.numel() // scales.numel()), scales).view(n, wide)
    assert same(read[:, :length].contiguous(), decoded[:, :length].contiguous())


@pytest.mark.parametrize(("form", "dtype", "random"), WEIGHTS, ids=lambda value: getattr(value, "name", str(value)))
def test_weights_on_the_device_have_the_bits_of_their_twins(
    device: str, poison: Callable[..., torch.Tensor], form: WeightFormat, dtype: torch.dtype, random: bool
) -> None:
    x = torch.from_numpy(np.concatenate((every_bf16(), around_ties(11)[::97])))
    x = torch.cat((x, torch.zeros(-len(x) % BLOCK)))
    for n in (len(x), len(x) - 1):
        noise = torch.randint(0, 65536, (n,), dtype=torch.int32)
        param = torch.zeros(n, dtype=dtype)
        residual = torch.zeros(n, dtype=form.dtype_beside(param))
        form.store(x[:n].clone(), param, residual, noise if random else None)
        got = [poison(n, t.dtype) for t in (param, residual)]
        rows = a_row(device, NUMEL=n, PARAM=got[0].data_ptr(), RESIDUAL=got[1].data_ptr())
        bits = torch.zeros(len(x), dtype=torch.int32)
        bits[:n] = noise
        held, read = (torch.zeros(len(x), device=device) for _ in range(2))
        codec, grid = form.codec(dtype, random), (len(x) // BLOCK,)
        full = n % BLOCK == 0
        run(store_weight, grid, rows, x.to(device), bits.to(device), held, codec, BLOCK, full)
        run(load_weight, grid, rows, read, codec, BLOCK, full)
        assert same(got[0].cpu(), param)
        assert form.key is None or same(got[1].cpu(), residual)
        assert same(held.cpu()[:n], form.load(param, residual))
        assert same(read.cpu()[:n], form.load(param, residual))


@triton.jit
def renew(
    rows, x, noise,
    CODEC: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    N: tl.constexpr, ROWWISE: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """What an update does with a format: load, compute, store."""
    start, at = _block(rows, N, ROWWISE, FULL)
    v, bits = _given(x, noise, start, N)
    first, second = tl.load(rows + FIRST), tl.load(rows + SECOND)
    v = v + CODEC[0](first, second, at, CODEC[2], tl.float32, FULL)
    CODEC[1](first, second, at, v, bits, CODEC[2], CODEC[3], FULL)


ARCHITECTURES = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32)}
ARCHITECTURES["gfx942"] = ("hip", "gfx942", 64)


def compiled(architecture: str, codec: tuple[Any, ...], first: Any, full: bool) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    second = SLOTS.value + 1 if first is SLOTS else RESIDUAL.value
    constants = {"CODEC": codec, "FIRST": first.value, "SECOND": second, "N": 1024, "ROWWISE": not full, "FULL": full}
    signature = {"rows": "*i64", "x": "*bf16", "noise": "*i16"} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    source = ASTSource(fn=renew, signature=signature, constexprs=constants, attrs=aligned)
    # 8 elements per thread; 4 where a weight and its copy differ in size: as in `tuning.SHAPES`
    options = {"num_warps": 8 if codec[0] is MASTER.codec(torch.bfloat16, False)[0] else 4, **launch.OPTIONS}
    return triton.compile(source, target=GPUTarget(*ARCHITECTURES[architecture]), options=options)


@pytest.mark.compiled
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_codecs_compile_without_spills_and_exchange_nothing(architecture: str) -> None:
    """Full blocks, on sm_90 those that may be cut short too."""
    random = [(str(case), case.format.codec(True), SLOTS) for case in ALL]
    nearest = [(str(case), case.format.codec(False), SLOTS) for case in ALL]
    weights = [(f"{form.name} {dtype}", form.codec(dtype, at_random), PARAM) for form, dtype, at_random in WEIGHTS]
    jobs = [(*job, True) for job in (*random, *weights)]
    if architecture == "sm_90":
        jobs += [(*job, True) for job in nearest] + [(*job, False) for job in random]
    for name, codec, first, full in jobs:
        kernel = compiled(architecture, codec, first, full)
        if architecture == "gfx942":
            assert kernel.asm["hsaco"], name
            continue
        registers, stack = resources(kernel.asm["cubin"])
        assert stack == 0 and registers <= (64 if full else 112), (name, full, registers)
        assert not full or (barriers(kernel.asm) == 0 and kernel.metadata.shared == 0), name
