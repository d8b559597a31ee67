"""`fusedopt.clip_grad_norm_` and `get_total_norm` against torch's functions: values, bits, launches, errors."""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from compare import BACKENDS, give_gradients, parameters
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_ as torch_clip
from torch.nn.utils import clip_grads_with_norm_
from torch.nn.utils import get_total_norm as torch_norm
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt import clip_tables
from fusedopt.clip import clip_grad_norm_, get_total_norm
from fusedopt.inspect import sass
from fusedopt_kernels import launch, table
from fusedopt_kernels.scale import combine_spec, scale_spec

SHAPES = ((33, 7), (5,), (), (0,), (20000,))
MIXES: tuple[tuple[torch.dtype, ...], ...] = (
    (torch.float32,), (torch.bfloat16,), (torch.float16,), (torch.float64,), (torch.complex64,),
    (torch.float32, torch.bfloat16), (torch.bfloat16, torch.float64, torch.complex128), (torch.float16, torch.float32),
)  # fmt: skip


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run twins or kernels, whatever the device."""
    monkeypatch.setattr(clip_tables, "BACKEND", request.param)
    return request.param


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> launch.Recorder:
    """What would be launched."""
    monkeypatch.setattr(clip_tables, "BACKEND", "triton")
    monkeypatch.setattr(clip_tables, "LAUNCHER", launch.Recorder())
    return clip_tables.LAUNCHER  # pyright: ignore[reportReturnType]  # set above


def with_gradients(device: str, dtypes: Sequence[torch.dtype], shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Any]:
    params = [p for dtype in dtypes for p in parameters(device, *shapes, dtype=dtype)]
    give_gradients(1, params)
    return params


def copies(params: Sequence[Any], dtype: torch.dtype | None = None) -> list[Any]:
    """The same gradients in the same layout, or in another dtype."""
    out = []
    for p in params:
        wide = torch.complex128 if p.is_complex() and dtype == torch.float64 else dtype or p.dtype
        out.append(torch.nn.Parameter(torch.empty(p.shape, dtype=wide, device=p.device)))
        out[-1].grad = p.grad.clone() if dtype is None else p.grad.to(wide, copy=True)
    return out


def assert_same(params: Sequence[Any], others: Sequence[Any]) -> None:
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0, equal_nan=True)


def test_signatures_are_torchs() -> None:
    for ours, theirs in ((clip_grad_norm_, torch_clip), (get_total_norm, torch_norm)):
        mine, other = (inspect.signature(f).parameters.values() for f in (ours, theirs))
        assert [(p.name, p.default, p.kind) for p in mine] == [(p.name, p.default, p.kind) for p in other]


@pytest.mark.filterwarnings("ignore:the 1-norm or inf-norm of a complex gradient")
@pytest.mark.parametrize("norm_type", [1, 2.0, "inf"])
@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_norm_and_gradients_are_torchs_in_float64(
    dtypes: tuple[torch.dtype, ...], norm_type: Any, backend: str, device: str
) -> None:
    """Norm within an ulp. Gradients: 1 ulp of the norm, 3 roundings of the coefficient, 1 of the product."""
    params = with_gradients(device, dtypes)
    wide = copies([p for p in params if p.numel()], torch.float64)  # torch refuses the inf-norm of an empty tensor
    norm, expected = clip_grad_norm_(params, 0.5, norm_type), torch_clip(wide, 0.5, norm_type)
    kind = torch.float64 if {torch.float64, torch.complex128} & set(dtypes) else torch.float32
    assert norm.dtype == kind and norm.shape == () and norm.device == params[0].device
    rtol = 2**-23 if kind == torch.float32 else 64 * torch.finfo(kind).eps  # what torch's own sum in fp64 leaves open
    torch.testing.assert_close(norm.double(), expected, rtol=rtol, atol=0)
    for p, q in zip([p for p in params if p.numel()], wide, strict=True):
        eps = max(torch.finfo(p.dtype).eps, torch.finfo(torch.float32).eps * (p.dtype != torch.float64))
        torch.testing.assert_close(p.grad.to(q.dtype), q.grad, rtol=max(4 * eps, rtol), atol=torch.finfo(p.dtype).tiny)


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
def test_given_the_norm_the_product_is_torchs_bit_for_bit(
    dtypes: tuple[torch.dtype, ...], backend: str, device: str
) -> None:
    """Not so with 0-dim gradients beside fp64 ones, which torch multiplies in fp64; and on a GPU torch first rounds the
    coefficient of bf16 and fp16 gradients to their dtype.
    """
    params = with_gradients(device, dtypes, [s for s in SHAPES if s or len(dtypes) == 1])
    if device == "cuda":
        params = [p for p in params if p.dtype.itemsize > 2 or p.is_complex()]
    for max_norm in (0.5, 1e9, math.inf, 0.0, -1.0, math.nan, torch.tensor(0.25)):
        others = copies(params)
        ours = copies(params)
        clip_grads_with_norm_(others, float(max_norm), clip_grad_norm_(ours, max_norm))  # pyright: ignore[reportArgumentType]  # torch takes a tensor too
        assert_same(ours, others)


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, math.inf])
def test_what_is_not_finite_spreads_as_with_torch(
    norm_type: float, dtype: torch.dtype, bad: float, backend: str, device: str
) -> None:
    params = with_gradients(device, [dtype], SHAPES[:3])
    params[0].grad[3, 3] = bad
    others = copies(params)
    norm, expected = clip_grad_norm_(params, 1.0, norm_type), torch_clip(others, 1.0, norm_type)
    torch.testing.assert_close(norm, expected.to(norm.dtype), rtol=0, atol=0, equal_nan=True)
    assert_same(params, others)
    params = with_gradients(device, [dtype])
    params[0].grad[3, 3] = bad
    before = copies(params)
    with pytest.raises(RuntimeError, match=r"The total norm of order .* is non-finite, so it cannot be clipped"):
        clip_grad_norm_(params, 1.0, norm_type, error_if_nonfinite=True)
    assert_same(params, before)


def test_large_gradients_do_not_overflow(backend: str, device: str) -> None:
    """torch's fp32 squares and fp16 norms do."""
    for dtype, value in ((torch.float32, 1e30), (torch.float16, 6e4)):
        norm = get_total_norm([torch.full((100,), value, dtype=dtype, device=device)])
        exact = 10 * torch.tensor(value, dtype=dtype).double()
        torch.testing.assert_close(norm.cpu().double(), exact, rtol=2**-23, atol=0)


def test_norm_is_that_of_a_step(backend: str, device: str) -> None:
    params = with_gradients(device, [torch.float32, torch.bfloat16])
    optimizer = fusedopt.SGD(params, lr=0.1, clip_grad_norm=1.0, metrics=("grad_norm",), backend=backend)
    optimizer.step()
    in_step = optimizer.metrics()["grad_norm"]
    assert torch.equal(get_total_norm([p.grad for p in params]), in_step.float())


def test_bits_do_not_depend_on_dtypes_launches_and_alignment(backend: str, device: str) -> None:
    """The same numbers in other dtypes, which go in other launches, and at odd addresses."""
    grads = [p.grad for p in with_gradients(device, [torch.float32])]
    norm = get_total_norm(grads)
    assert torch.equal(
        norm, get_total_norm([g.to((torch.bfloat16, torch.float32)[i % 2]) for i, g in enumerate(grads)])
    )
    odd = [torch.cat([g.new_zeros(1), g.reshape(-1)])[1:].view(g.shape) for g in grads]
    assert torch.equal(norm, get_total_norm(odd))
    part: Any = clip_tables._store.parts[0][1]
    if backend == "triton":  # the interpreter would not notice a wide access at an odd address
        flags = part.rows.array[:, table.FLAGS.value]
        assert [f == table.ALIGNED.value for f in flags] == [g.data_ptr() % 16 == 0 for g in odd]
    assert torch.equal(norm, get_total_norm(g for g in grads))


@pytest.mark.parametrize(("dtypes", "launches"), [(MIXES[0], 3), (MIXES[5], 5), (MIXES[6], 7)], ids=str)
@pytest.mark.parametrize("n", [1, 40])
def test_launches_do_not_grow(
    n: int, dtypes: tuple[torch.dtype, ...], launches: int, recorder: launch.Recorder, device: str
) -> None:
    params = with_gradients(device, dtypes, [(3, 2)] * n)
    clip_grad_norm_(params, 1.0)
    kinds = ["norm"] * len(dtypes) + ["combine"] + ["scale"] * len(dtypes)
    assert [spec.name for spec, _, _ in recorder.record] == kinds and len(kinds) == launches
    get_total_norm([p.grad for p in params])
    assert [spec.name for spec, _, _ in recorder.record[launches:]] == ["norm"] * len(dtypes) + ["combine"]


class Operations(TorchDispatchMode):
    """Names of what torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_steady_call_allocates_the_norm_alone(recorder: launch.Recorder, device: str) -> None:
    for n in (2, 40):
        params = with_gradients(device, [torch.float32], [(40, 50)] * n)
        clip_grad_norm_(params, 1.0)
        with Operations() as seen:
            clip_grad_norm_(params, 1.0)  # a mode changes how tensors are dispatched: tables of its own
            seen.names.clear()
            norm = clip_grad_norm_(params, 1.0)
        assert seen.names == ["aten.empty.memory_format"] and norm.shape == ()
        assert recorder.compiles == 3


def test_moved_gradients_are_found_and_few_tables_are_kept(backend: str, device: str) -> None:
    params = with_gradients(device, [torch.float32])
    for step in range(3):
        give_gradients(step, params)
        others = copies(params)
        for limit in (0.5, 0.25):  # the second finds everything where it was
            clip_grads_with_norm_(others, limit, clip_grad_norm_(params, limit))
            assert_same(params, others)
    for n in range(20):
        get_total_norm([torch.ones(n + 1, device=device)])
    assert len(clip_tables._store.parts) <= clip_tables.KEPT


@given(
    shapes=st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]), min_size=6, max_size=6),
    max_norm=st.floats(1e-3, 1e3),
)
def test_any_shapes_and_dtypes(shapes: list[tuple[int, ...]], dtypes: list[torch.dtype], max_norm: float) -> None:
    """Kernels, twins and torch on the same norm; on the CPU, where torch keeps a coefficient in fp32."""
    made = [parameters("cpu", shape, dtype=dtype)[0] for shape, dtype in zip(shapes, dtypes, strict=False)]
    give_gradients(2, made)
    results = []
    for name in BACKENDS if clip_tables.LAUNCHER.accepts_cpu else ("eager",):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(clip_tables, "BACKEND", name)
            params, others = copies(made), copies(made)
            norm = clip_grad_norm_(params, max_norm)
        clip_grads_with_norm_(others, max_norm, norm)
        assert_same(params, others)
        results.append(norm)
    exact = torch_norm([p.grad.double() for p in made if p.grad is not None])
    for norm in results:
        torch.testing.assert_close(norm.double(), exact, rtol=2**-23, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler uses its own old API
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("norm_type", [2.0, math.inf])
def test_compiled_functions_break_no_graph(norm_type: float, compiler: str, backend: str, device: str) -> None:
    torch._dynamo.reset()
    params = with_gradients(device, [torch.float32, torch.bfloat16])
    others = copies(params)

    def both(params: list[Any]) -> Any:
        return clip_grad_norm_(params, 0.5, norm_type), get_total_norm([p.grad for p in params], norm_type)

    norms = torch.compile(both, fullgraph=True, backend=compiler)(params)
    assert all(map(torch.equal, norms, both(others)))
    assert_same(params, others)


SPECS = [combine_spec(kind, root, wide) for kind, root, wide in ((2, True, False), (3, True, True), (1, False, False))]
SPECS += [scale_spec(dtype, dtype == torch.float64) for dtype in (torch.float32, torch.bfloat16, torch.float64)]


@pytest.mark.compiled
@pytest.mark.parametrize(
    "target", [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)], ids=str
)
def test_kernels_compile(target: tuple[Any, ...]) -> None:
    """For sm_90: no spills beyond two registers, and the product moves 128 bits at a time."""
    from triton.backends.compiler import GPUTarget

    for spec in SPECS:
        binary = launch.compile_for(spec, GPUTarget(*target)).asm
        if target[1] != 90:
            assert binary["hsaco" if target[0] == "hip" else "cubin"]
            continue
        code = sass.disassemble(binary["cubin"])
        assert code.stack <= 8 and code.registers <= 112, (spec.name, code.stack, code.registers)
        if spec.name == "scale":
            wide = [i.opcode for i in code.instructions if i.opcode in ("LDG", "STG") and "128" in i.modifiers]
            assert wide.count("LDG") == wide.count("STG") >= 8 and code.stack == 0
