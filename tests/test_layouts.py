"""Every layout in memory gives the bits of the contiguous one, and nothing beside the tensor is touched."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from compare import BACKENDS, THREE, assert_close, assert_equal, params_of, uniform
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from table import DTYPES, FORMATS, RULES, RuleRow, private

from fusedopt import layout

pytestmark = [
    pytest.mark.filterwarnings("ignore:a parameter with gaps"),
    pytest.mark.filterwarnings("ignore:a gradient with strides"),
    pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype"),
]
settings.register_profile(
    "layouts", settings.get_profile("fusedopt"), phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
FEW, MANY = (settings(settings.get_profile("layouts"), max_examples=n) for n in (10, 60))

Layout = tuple[tuple[int, ...], int, int]
"""(order of the dimensions in memory, outermost first; distance of neighbours; offset of the first element)."""


def place(values: torch.Tensor, how: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """(The values in that layout, the buffer of NaN around them)."""
    order, gap, offset = how
    strides, step = [0] * values.dim(), gap
    for dim in reversed(order):
        strides[dim] = step
        step *= max(values.shape[dim], 1)
    buffer = torch.full((step + offset + 3,), math.nan, dtype=values.dtype, device=values.device)
    placed = buffer.as_strided(values.shape, strides, offset)
    return placed.copy_(values), buffer


def outside(placed: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """Elements of the buffer that are not the tensor's."""
    inside = torch.zeros(buffer.shape, dtype=torch.bool, device=buffer.device)
    inside.as_strided(placed.shape, placed.stride(), placed.storage_offset()).fill_(True)
    return buffer[~inside]


@st.composite
def layouts(draw: Any, dims: int) -> Layout:
    return tuple(draw(st.permutations(range(dims)))), draw(st.sampled_from((1, 1, 2))), draw(st.integers(0, 3))


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    """A configuration, a shape, a layout of the parameter and one of the gradient in each of two steps."""
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=4)))
    row = draw(st.sampled_from(RULES))
    dtype = draw(st.sampled_from(DTYPES))
    switches = draw(st.sampled_from([{}, FORMATS["norm and coefficient"]]))
    if dtype == torch.bfloat16:
        switches = draw(st.sampled_from([switches, FORMATS["split16 weights"]]))
    how = draw(layouts(len(shape)))
    grads = [draw(st.sampled_from([how, draw(layouts(len(shape)))])) for _ in range(2)]
    return dict(row=row, shape=shape, dtype=dtype, switches=switches, how=how, grads=grads, conj=draw(st.booleans()))


def run(case: dict[str, Any], backend: str, device: str) -> None:
    """Compare with eager twins on contiguous tensors."""
    row, shape, dtype = case["row"], case["shape"], case["dtype"]
    values = uniform([shape], device, dtype, 1)[0]
    placed, buffer = place(values, case["how"])
    p, q = torch.nn.Parameter(placed), torch.nn.Parameter(values.contiguous().clone())
    ours, plain = row.cls([p], **row.options, backend=backend), row.cls([q], **row.options, backend="eager")
    for optimizer in (ours, plain):
        private(optimizer, **case["switches"]) if case["switches"] else None
    for step, how in enumerate(case["grads"]):
        grad = uniform([shape], device, dtype, 2 + step)[0]
        q.grad = grad.clone()
        p.grad = place(grad.conj().resolve_conj(), how)[0].conj() if case["conj"] else place(grad, how)[0]
        version = p._version, p.grad._version
        ours.step()
        plain.step()
        assert p._version > version[0] and p.grad._version == version[1]
        assert torch.equal(p.grad, q.grad) and p.data_ptr() == placed.data_ptr()
        assert_equal(ours, plain)
    assert outside(placed, buffer).isnan().all()


@given(case=cases())
@MANY
def test_any_layout_eager(case: dict[str, Any], device: str) -> None:
    run(case, "eager", device)


@given(case=cases())
@FEW
def test_any_layout_kernels(case: dict[str, Any], device: str) -> None:
    run(case, "triton", device)


IMAGE = (2, 3, 2, 2)
KINDS: dict[str, tuple[tuple[int, ...], Layout, Layout]] = {
    "channels last": (IMAGE, ((0, 2, 3, 1), 1, 0), ((0, 2, 3, 1), 1, 0)),
    "channels last, gradient not": (IMAGE, ((0, 2, 3, 1), 1, 0), ((0, 1, 2, 3), 1, 0)),
    "gradient channels last": (IMAGE, ((0, 1, 2, 3), 1, 0), ((0, 2, 3, 1), 1, 0)),
    "transposed": ((3, 4), ((1, 0), 1, 0), ((1, 0), 1, 0)),
    "gaps": ((3, 4), ((0, 1), 2, 1), ((0, 1), 1, 0)),
    "unaligned": ((9,), ((0,), 1, 1), ((0,), 1, 3)),
    "0-dim": ((), ((), 1, 1), ((), 1, 2)),
    "empty": ((0, 3), ((1, 0), 2, 1), ((0, 1), 1, 0)),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [RULES[1], RULES[7]], ids=str)
def test_the_usual_layouts_together_equal_torch(row: RuleRow, backend: str, device: str) -> None:
    """All of them in one optimizer; state lies as its parameter does, wherever that is dense."""
    values = [uniform([shape], device, torch.float32, i)[0] for i, (shape, _, _) in enumerate(KINDS.values())]
    ps = [torch.nn.Parameter(place(v, how)[0]) for v, (_, how, _) in zip(values, KINDS.values(), strict=True)]
    qs = [torch.nn.Parameter(v.clone()) for v in values]
    ours = row.cls(ps, **row.options, backend=backend)
    theirs = row.torch_cls(qs, **row.options, foreach=False)
    for step in range(2):
        for i, (p, q, (shape, _, how)) in enumerate(zip(ps, qs, KINDS.values(), strict=True)):
            q.grad = uniform([shape], device, torch.float32, 100 * step + i)[0]
            p.grad = place(q.grad, how)[0]
        ours.step()
        theirs.step()
    assert_close(ours, theirs, 2)
    for p in ps:
        state = [ours.state[p][slot.name] for slot in row.cls.rule.slots(ours.param_groups[0])]
        assert all(s.stride() == p.stride() or not layout.is_dense(p) for s in state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", THREE, ids=str)
def test_expanded_and_one_element_gradients(row: RuleRow, backend: str, device: str) -> None:
    """A gradient whose elements share memory, one whose size-1 dimensions have odd strides, one lazily negated."""
    ps, qs = (
        [torch.nn.Parameter(v) for v in uniform([(3, 4), (1, 3), ()], device, torch.float32, 0)] for _ in range(2)
    )
    ours = row.cls(ps, **row.options, backend=backend)
    plain = row.cls(qs, **row.options, backend="eager")
    for scale in (1.0, -2.0):
        one = torch.tensor([0.5, 0.25, 0.125], device=device) * scale
        complex_one = torch.complex(one[0], one[0])
        given_grads = one[:1].expand(3, 4), one.as_strided((1, 3), (17, 1)), complex_one.conj().imag
        assert given_grads[2].is_neg()
        for p, q, g in zip(ps, qs, given_grads, strict=True):
            p.grad, q.grad = g, g.resolve_neg().clone(memory_format=torch.contiguous_format)
        ours.step()
        plain.step()
        assert_equal(ours, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_dtype_in_one_optimizer(backend: str, device: str) -> None:
    """Beside one optimizer per dtype, bit for bit."""
    row = RULES[7]
    ps, qs = ([torch.nn.Parameter(uniform([(2, 3)], device, d, 0)[0]) for d in DTYPES] for _ in range(2))
    together, apart = row.cls(ps, **row.options, backend=backend), [row.cls([q], **row.options) for q in qs]
    for step in range(2):
        for p, q in zip(ps, qs, strict=True):
            p.grad, q.grad = (uniform([(2, 3)], device, p.dtype, step)[0] for _ in range(2))
        together.step()
        for p, q, one in zip(ps, qs, apart, strict=True):
            one.step()
            torch.testing.assert_close(together.state[p], one.state[q], rtol=0, atol=0)
            assert torch.equal(p, q)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", THREE, ids=str)
def test_gradients_of_another_dtype(row: RuleRow, backend: str, device: str) -> None:
    """torch's own optimizers refuse them. Gradients give what their values in the dtype of the arithmetic give."""
    real = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    pairs = [(a, b) for a in real for b in real if a != b]
    ps, qs = ([torch.nn.Parameter(uniform([(2, 3)], device, a, 0)[0]) for a, _ in pairs] for _ in range(2))
    for p, (_, dtype) in zip(ps, pairs, strict=True):
        p.grad_dtype = dtype  # pyright: ignore[reportAttributeAccessIssue] # newer than the stubs
    for q, (dtype, _) in zip(qs, pairs, strict=True):
        # torch has no annotation for it
        q.grad_dtype = torch.float64 if dtype == torch.float64 else torch.float32  # pyright: ignore[reportAttributeAccessIssue]
    ours, plain = row.cls(ps, **row.options, backend=backend), row.cls(qs, **row.options, backend="eager")
    for step in range(2):
        for p, q, (_, dtype) in zip(ps, qs, pairs, strict=True):
            p.grad = uniform([(2, 3)], device, dtype, step)[0]
            q.grad = p.grad.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
        ours.step()
        plain.step()
        assert_equal(ours, plain)


def refused(params: Sequence[torch.Tensor], row: RuleRow = RULES[0], **options: Any) -> str:
    """Text of the error that a step raises."""
    optimizer = row.cls(params, lr=0.1, **options)
    for p in params_of(optimizer):
        p.grad = torch.ones(p.shape, dtype=p.dtype, device=p.device) if p.grad is None else p.grad
    with pytest.raises((RuntimeError, TypeError, ValueError)) as caught:
        optimizer.step()
    return str(caught.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_updated_is_refused_by_name(backend: str, device: str) -> None:
    x = torch.ones(3, device=device)
    assert "expanded tensor" in refused([x[:1].expand(3)], backend=backend)
    assert "two parameters share memory" in refused([x, x.detach()], backend=backend)
    with pytest.warns(UserWarning, match="duplicate parameters"):  # torch's; it would step twice
        assert "a parameter is listed twice" in refused([x, x], backend=backend)
    assert "lazily conjugated" in refused([torch.ones(3, dtype=torch.complex64, device=device).conj()], backend=backend)
    assert "got torch.int32" in refused([x.int()], backend=backend)
    assert "got torch.float8_e4m3fn" in refused([x.to(torch.float8_e4m3fn)], backend=backend)
    sparse = x.clone()
    sparse.grad = torch.ones(3, device=device).to_sparse()
    assert "Adam does not support sparse gradients" in refused([sparse], RULES[4], backend=backend)


def test_copies_are_announced_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_announced", set())
    p = torch.nn.Parameter(torch.zeros(4, 4, device=device)[:, :2])
    q = torch.nn.Parameter(torch.zeros(4, 2, device=device))
    optimizer = RULES[0].cls([p, q], lr=0.1)
    p.grad, q.grad = torch.zeros(4, 2, device=device), torch.zeros(2, 4, device=device).t()
    with pytest.warns(UserWarning, match="a parameter with gaps.* packed"), pytest.warns(match="copied at every step"):
        optimizer.step()
    optimizer._plan = None
    optimizer.step()  # a second warning would be an error here
