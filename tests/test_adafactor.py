"""Adafactor: torch.optim's results, a float64 oracle, kernels that agree with twins, and what is its own."""

import copy
import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from compare import BACKENDS, assert_close, assert_equal, contents, parameters, params_of, train, uniform

from fusedopt.adafactor_eager import box_of, tasks_in
from fusedopt.adafactor_step import TILE, stack_of, tile_of
from fusedopt.blocks import BLOCK
from fusedopt.rules.adafactor import Adafactor
from fusedopt.verify.oracles.adafactor import ORACLE
from fusedopt_kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose

SHAPES: tuple[tuple[int, ...], ...] = (
    (64, 72), (130, 70), (3, 200), (200, 3), (1, 9), (5, 1), (7, 4, 3, 3), (2, 70, 66), (9,), (),
)  # fmt: skip
"""Whole and partial tiles, tall and wide matrices, stacks of small and of large ones, a vector, a scalar."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "decay": dict(lr=0.05, weight_decay=0.1, maximize=True),
    "small": dict(eps=(1e-15, 1e-3), beta2_decay=-0.5),
    "loose": dict(d=1.5, eps=(1e-3, 0.5)),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def pair(device: str, first: dict[str, Any], second: Any, shapes: Any = SHAPES, dtype: Any = torch.float32) -> Any:
    """Two optimizers over equal parameters; second: options of ours, or a class and its options."""
    cls, options = second if isinstance(second, tuple) else (Adafactor, second)
    ours = Adafactor(parameters(device, *shapes, dtype=dtype), **first)
    return ours, cls(parameters(device, *shapes, dtype=dtype), **options)


# ------------------------------------------------------------------------------------------------------- results
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "decay", "loose"])
def test_as_torch(options: str, dtype: torch.dtype, device: str) -> None:
    """Within the rounding of both; torch's own of V in 16 bits included."""
    ours, theirs = pair(device, dict(OPTIONS[options], backend="eager"), (torch.optim.Adafactor, OPTIONS[options]),
                        dtype=dtype)  # fmt: skip
    train(range(3), ours, theirs)
    assert_close(ours, theirs, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ["plain", "decay", "small"])
def test_kernels_agree_with_twins(options: str, dtype: torch.dtype, device: str) -> None:
    """Bit for bit, but for fp64 parameters, where fp64 sums in another order show."""
    eager, kernels = pair(device, dict(OPTIONS[options], backend="eager"), dict(OPTIONS[options], backend="triton"),
                          dtype=dtype)  # fmt: skip
    train(range(2), eager, kernels)
    if dtype == torch.float64:
        for (p, state), (q, other) in zip(contents(eager), contents(kernels), strict=True):
            torch.testing.assert_close((p, state), (q, other), rtol=1e-14, atol=1e-15)
    else:
        assert_equal(eager, kernels)


@pytest.mark.parametrize("backend", BACKENDS)
def test_oracle(backend: str, device: str) -> None:
    """Each step within the derived bound, from rounded state."""
    options = dict(ORACLE.defaults, lr=0.05, weight_decay=0.1, eps=(2.0**-23, 1e-3))
    shapes = ((70, 66), (3, 4, 5), (11,))
    ours = Adafactor(parameters(device, *shapes), lr=0.05, weight_decay=0.1, backend=backend)
    for t in range(1, 4):
        before = [
            (p.detach().double().cpu().numpy(), {k: v.double().cpu().numpy() for k, v in s.items() if k != "step"})
            for p, s in contents(ours)
        ]
        train([t], ours)
        for (x, state), (p, now) in zip(before, contents(ours), strict=True):
            assert p.grad is not None
            expected = ORACLE.step(options, t, x, p.grad.double().cpu().numpy(), state)
            for key, value in expected.items():
                got = (p if key == "param" else now[key]).detach().double().cpu().numpy()
                bound = ORACLE.bounds["plain"][key].ulps
                assert (np.abs(got - value.exact) <= bound * np.spacing(value.addend.astype(np.float32))).all(), key


def test_tiny_and_huge_gradients(device: str) -> None:
    """R·C would leave fp32's range; V does not, so a step stays what it is for gradients of any size."""
    steps = []
    for scale in (1e-18, 1.0, 1e17):
        p = parameters(device, (8, 8))[0]
        optimizer = Adafactor([p], eps=(0.0, 1e-3), backend="eager")
        before = p.detach().clone()
        p.grad = uniform([(8, 8)], device, torch.float32, 5)[0] * scale
        optimizer.step()
        steps.append(p.detach() - before)
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(steps[2], steps[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("eps", [(None, 1e-3), (0.0, 0.0)], ids=str)
def test_zero_step(backend: str, eps: Any, device: str) -> None:
    """lr = 0 and zero gradients: state is made, no weight changes, nothing is NaN."""
    values = torch.tensor([0.0, -0.0, 1e-40, 3e38, -math.inf, 1 / 3], device=device)
    params = [torch.nn.Parameter(x) for x in (values.repeat(4, 2), values.clone(), values[0].clone())]
    before = [p.detach().clone() for p in params]
    optimizer = Adafactor(params, lr=torch.tensor(0.0), eps=eps, weight_decay=0.1, maximize=True, backend=backend)
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, was in zip(params, before, strict=True):
        assert torch.equal(p.detach().view(torch.int32), was.view(torch.int32))
        assert all(v.isfinite().all() for v in optimizer.state[p].values())


# -------------------------------------------------------------------------------------------- parameters and options
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_dtypes_missing_gradients_and_live_lr(backend: str, device: str) -> None:
    """Two groups of two dtypes; gradients come and go; a scheduler's tensor lr is read at every step."""

    def make(cls: Any, **more: Any) -> Any:
        wide, narrow = parameters(device, (6, 8), (5,)), parameters(device, (4, 10), (3,), dtype=torch.float64, seed=1)
        lr = torch.tensor(0.02, dtype=torch.float64)  # torch computes in the tensor's dtype
        groups = [dict(params=wide), dict(params=narrow, lr=lr, weight_decay=0.2)]
        return cls(groups, lr=0.1, **more)

    ours, theirs = make(Adafactor, backend=backend), make(torch.optim.Adafactor)
    for step in range(4):
        for optimizer in (ours, theirs):
            for i, p in enumerate(params_of(optimizer)):
                p.grad = None if (i + step) % 3 == 0 else uniform([tuple(p.shape)], device, p.dtype, 10 * step + i)[0]
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.param_groups[1]["lr"].fill_(0.05 / (step + 1))
            optimizer.step()
    assert_close(ours, theirs, 4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["transposed", "channels last", "gaps"])
@pytest.mark.filterwarnings("ignore:a parameter with gaps", "ignore:a gradient with strides")  # what is tested
def test_other_layouts(layout: str, backend: str, device: str) -> None:
    """Packed into rows and columns; the same results as a contiguous parameter."""

    def moved(x: torch.Tensor) -> torch.Tensor:
        if layout == "transposed":
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if layout == "channels last":
            return x.to(memory_format=torch.channels_last)
        return x.repeat_interleave(2, -1)[..., ::2]

    x, *grads = uniform([(3, 4, 5, 6)] * 3, device, torch.float32, 0)
    plain, other = torch.nn.Parameter(x), torch.nn.Parameter(moved(x))
    assert not other.is_contiguous()
    first, second = Adafactor([plain], backend=backend), Adafactor([other], backend=backend)
    for g in grads:
        plain.grad, other.grad = g, moved(g)
        first.step()
        second.step()
    assert_equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_and_cautious_decay(backend: str, device: str) -> None:
    shapes = ((9, 8), (6,))
    plain, masked = pair(device, dict(backend=backend), dict(backend=backend), shapes)
    masks = [torch.rand(shape, device=device) < 0.5 for shape in shapes]
    before = [p.detach().clone() for p in params_of(masked)]
    for p, mask in zip(params_of(masked), masks, strict=True):
        masked.set_update_mask(p, mask)
    train([0], plain, masked)
    for p, q, mask, was in zip(params_of(plain), params_of(masked), masks, before, strict=True):
        assert torch.equal(q, torch.where(mask, p, was))
    decay = dict(lr=0.1, weight_decay=1.0, backend=backend)
    plain, cautious = pair(device, decay, dict(decay, cautious_decay=True), shapes)
    free = Adafactor(parameters(device, *shapes), lr=0.1, backend=backend)
    train([0], plain, cautious, free)
    for p, q, r in zip(params_of(plain), params_of(cautious), params_of(free), strict=True):
        assert ((q == p) | (q == r)).all() and (q != p).any() and (q != r).any()


def test_refusals(device: str) -> None:
    p = parameters(device, (3, 4))
    for wrong in (dict(lr=-1), dict(beta2_decay=0.1), dict(eps=(-1, 1)), dict(eps=(1, -1)), dict(d=0.5), dict(eps=1e-3),
                  dict(weight_decay=-1), dict(cautious=True), dict(sparse="lazy")):  # fmt: skip
        with pytest.raises(ValueError):
            Adafactor(p, **wrong)
    c = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64, device=device))
    c.grad = torch.zeros_like(c)
    with pytest.raises(RuntimeError, match="does not support complex"):
        Adafactor([c], backend="eager").step()
    p[0].grad = torch.ones_like(p[0]).to_sparse()
    with pytest.raises(RuntimeError, match="does not support sparse"):
        Adafactor(p, backend="eager").step()


# --------------------------------------------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpoints_of_torch(dtype: torch.dtype, device: str) -> None:
    """State dicts go both ways, and through pickle and deepcopy."""
    ours, theirs = pair(device, dict(backend="eager"), (torch.optim.Adafactor, {}), dtype=dtype)
    assert list(ours.param_groups[0]) == list(theirs.param_groups[0])
    train(range(2), ours, theirs)
    again, back = pair(device, dict(backend="eager"), (torch.optim.Adafactor, {}), dtype=dtype)
    again.load_state_dict(theirs.state_dict())
    back.load_state_dict(ours.state_dict())
    for (_, a), (_, b) in zip(contents(again), contents(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    for (_, a), (_, b) in zip(contents(back), contents(ours), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(ours)))
    train(range(2, 4), ours, twin)
    assert_equal(ours, twin)


def test_materialised_state(device: str) -> None:
    """State exists before the first step, and changes nothing about it."""
    ours, other = pair(device, dict(backend="eager"), dict(backend="eager"))
    other.materialize_state()
    assert all(state for _, state in contents(other))
    train(range(2), ours, other)
    assert_equal(ours, other)


# ------------------------------------------------------------------------------------------------------------ launches
def recorded(count: int, shapes: Any = ((130, 70), (9,))) -> launch.Recorder:
    optimizer = Adafactor(parameters("cpu", *(shapes * count)), backend="triton")
    optimizer._launcher = recorder = launch.Recorder()
    train([0], optimizer)
    return recorder


def test_launches_do_not_grow_with_tensors() -> None:
    names = [spec.name for spec, _, _ in recorded(1).record]
    assert names == [spec.name for spec, _, _ in recorded(7).record]
    matrices = ["scalars", "sums", "moments", "means", "measure", "numbers", "apply"]
    vectors = ["adafactor_vectors_scalars", "adafactor_vectors_measure", "adafactor_vectors"]
    assert names == [f"adafactor_{name}" for name in matrices] + vectors


def test_warmup_leaves_nothing_to_compile() -> None:
    """Stand-ins have the tiles of the real parameters; before and after state exists."""
    optimizer = Adafactor(parameters("cpu", *SHAPES), backend="triton")
    optimizer._launcher = recorder = launch.Recorder()
    ready = optimizer.warmup()[0]
    assert ready > 20
    train([0], optimizer)
    assert optimizer.warmup()[0] == 0 and recorder.compiles == ready


@pytest.mark.parametrize("shape", [*(s for s in SHAPES if len(s) > 1), (1, 1 << 20), (1 << 20, 1), (5000, 3, 3)])
def test_tiles_and_tasks(shape: tuple[int, ...]) -> None:
    """Powers of two that fill at most a tile; whole matrices if several; tasks cover every element once."""
    stack = stack_of(shape)
    tile = tile_of(*stack)
    assert math.prod(tile) <= TILE and all(n & (n - 1) == 0 for n in tile)
    assert tile[0] == 1 or (tile[1] >= stack[1] and tile[2] >= stack[2])
    tasks = tasks_in(0, stack)
    assert [t.low for t in tasks[1:]] == [t.high for t in tasks[:-1]] and tasks[-1].high == math.prod(shape)
    index = np.arange(math.prod(shape)).reshape(stack)
    for _, low, high in tasks:
        box, size = box_of(low, high, stack)
        assert high - low <= BLOCK and index[box].shape == size
        assert (index[box].ravel() == np.arange(low, high)).all()


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_compiled_without_spills_and_with_wide_loads(dtype: torch.dtype) -> None:
    from triton.backends.compiler import GPUTarget

    from fusedopt.inspect import sass

    p = torch.nn.Parameter(torch.zeros(256, 256, dtype=dtype))
    p.grad = torch.zeros_like(p)
    optimizer = Adafactor([p], weight_decay=0.1, backend="triton")
    optimizer._launcher = recorder = launch.Recorder()
    optimizer.step()
    for spec, _, _ in recorder.record:
        code = sass.disassemble(launch.compile_for(spec, GPUTarget("cuda", 90, 32)).asm["cubin"])
        assert code.stack == 0 and code.count("LDL", "STL") == 0, spec.name
        if spec.name in ("adafactor_sums", "adafactor_measure", "adafactor_apply"):
            assert code.registers <= 192, (spec.name, code.registers)  # 65,536 ÷ 256 threads: one program at least
            assert any(i.opcode == "LDG" and "128" in i.modifiers for i in code.instructions), spec.name
