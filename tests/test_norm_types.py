"""``clip_norm_type``: 1-, 2- and inf-norms in the step, against torch's functions and exact sums."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from compare import BACKENDS, assert_close, contents, give_gradients, parameters, params_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_

import fusedopt
from fusedopt.rules.muon import Muon

SGD: Any = fusedopt.SGD
KINDS = (1.0, 2.0, math.inf)
SHAPES = ((33, 7), (5,), (), (0,), (40000,))


def exact(grads: list[torch.Tensor], kind: float) -> float:
    """The norm of exactly added magnitudes or squares. Squares of fp64 numbers are rounded before that."""
    numbers = [x for g in grads for x in g.double().abs().flatten().tolist()]
    if kind == math.inf:
        return max(numbers, default=0.0)
    return math.fsum(numbers) if kind == 1.0 else math.sqrt(math.fsum(x * x for x in numbers))


def gradients_of(optimizer: Any) -> list[torch.Tensor]:
    return [p.grad for p, _ in contents(optimizer) if p.grad is not None]


def found_norm(params: list[Any], kind: float, backend: str, **options: Any) -> torch.Tensor:
    """The norm that a step over parameters or groups finds. lr 0: the parameters stay."""
    optimizer = SGD(params, lr=0.0, clip_norm_type=kind, clip_grad_norm=1.0, backend=backend, **options)
    optimizer.step()
    return optimizer.metrics()["grad_norm"]


def with_gradient(g: torch.Tensor) -> torch.nn.Parameter:
    p = torch.nn.Parameter(torch.zeros_like(g))
    p.grad = g
    return p


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("threshold", [0.3, 1e6], ids=["clips", "does not"])
def test_a_step_is_clip_grad_norm_and_a_step(threshold: float, kind: float, backend: str, device: str) -> None:
    """torch has no inf-norm of an empty tensor. Its 1- and 2-norms are added up in fp32, each wrong by some ulps; under
    a threshold of 0.3 they are above 100, so that a wrong coefficient moves a parameter by 3e-4 of that."""
    options: dict[str, Any] = dict(lr=0.1, momentum=0.9)
    ours = SGD(parameters(device, *SHAPES), clip_grad_norm=threshold, clip_norm_type=kind, **options, backend=backend)
    theirs = torch.optim.SGD(parameters(device, *SHAPES), **options)
    for t in range(3):
        give_gradients(t, params_of(ours), params_of(theirs))
        before = [g.clone() for g in gradients_of(ours)]
        clip_grad_norm_([p for p in params_of(theirs) if p.numel()], threshold, norm_type=kind)
        ours.step()
        theirs.step()
        assert all(map(torch.equal, gradients_of(ours), before)), "gradients are never rewritten"
    clips = float(ours.metrics()["clip_coefficient"])
    assert (clips < 1.0) == (threshold == 0.3), clips
    assert_close(ours, theirs, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_tensor_by_its_own_norm(kind: float, backend: str, device: str) -> None:
    ours = SGD(
        parameters(device, *SHAPES), lr=0.1, clip_grad_norm=0.3, clip_norm_type=kind, clip_scope="tensor",
        backend=backend,
    )  # fmt: skip
    theirs = torch.optim.SGD(parameters(device, *SHAPES), lr=0.1)
    for t in range(2):
        give_gradients(t, params_of(ours), params_of(theirs))
        for p in params_of(theirs):
            if p.numel():  # torch has no inf-norm of nothing
                clip_grad_norm_([p], 0.3, norm_type=kind)
        ours.step()
        theirs.step()
    assert_close(ours, theirs, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_norms_are_exact_to_an_ulp(dtype: torch.dtype, kind: float, backend: str, device: str) -> None:
    """1 ulp of fp32, or 4 ulp of fp64 for fp64 gradients (DESIGN, section 4); a largest magnitude is exact."""
    for scale in (1.0, 1e-7 if dtype == torch.float16 else 1e-30):
        grads = [(torch.randn(s, dtype=torch.float64) * scale).to(device, dtype) for s in ((3, 3), (16384,), (40001,))]
        norm = float(found_norm([with_gradient(g) for g in grads], kind, backend))
        wide = dtype == torch.float64
        ulp = math.ulp(exact(grads, kind)) if wide else float(np.spacing(np.float32(exact(grads, kind))))
        assert abs(norm - exact(grads, kind)) <= (0.0 if kind == math.inf else (4 if wide else 1) * ulp)
        assert wide or float(np.float32(norm)) == norm


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(
    "places", [{0: math.inf}, {0: -math.inf}, {1: math.nan}, {0: math.nan, 2: math.inf}, {2: math.nan}], ids=str
)
def test_what_is_not_finite_comes_through(
    places: dict[int, float], wide: bool, kind: float, backend: str, device: str
) -> None:
    """As with torch: NaN if there is one, also beside larger numbers, else inf; on full chunks and in tails."""
    for numel in (1000, 16384, 40000):
        g = torch.linspace(-1.0, 1.0, numel, device=device, dtype=torch.float64 if wide else torch.float32)
        for place, value in places.items():
            g[(0, numel // 2, -1)[place]] = value
        expected = torch.nn.utils.get_total_norm([g], kind)
        norm = found_norm([with_gradient(g), with_gradient(torch.ones(3, device=device))], kind, backend)
        assert torch.equal(norm.isnan(), expected.isnan()) and torch.equal(norm.isinf(), expected.isinf())


@pytest.mark.parametrize("kind", KINDS)
def test_large_numbers_do_not_overflow(kind: float, device: str) -> None:
    """fp32 gradients whose squares, or whose sum, are beyond fp32; fp64 ones whose norm is beyond fp64 are finite."""
    for backend in BACKENDS:
        g = torch.full((16384,), 3e38, device=device)
        assert math.isclose(float(found_norm([with_gradient(g)], kind, backend)), exact([g], kind), rel_tol=1e-6)
        optimizer = SGD(
            [with_gradient(torch.full((5,), 1e308, device=device, dtype=torch.float64))], lr=0.0,
            clip_grad_norm=1.0, clip_norm_type=kind, skip_nonfinite=True, backend=backend,
        )  # fmt: skip
        optimizer.step()
        assert [float(optimizer.metrics()[name]) for name in ("skipped_steps", "nonfinite_steps")] == [0.0, 0.0]


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12)
@given(data=st.data())
def test_bits_do_not_depend_on_order_and_grouping(data: st.DataObject, backend: str, device: str) -> None:
    """Of gradients of any narrow dtypes: their sum is one of fp64, which is rounded once."""
    kind = data.draw(st.sampled_from(KINDS))
    sizes = data.draw(st.lists(st.sampled_from((0, 1, 5, 300, 16384, 17000)), min_size=1, max_size=6))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=len(sizes), max_size=len(sizes)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    drawn = [torch.randn(n, generator=generator).to(device, dtype) for n, dtype in zip(sizes, dtypes, strict=True)]
    norm = found_norm([with_gradient(g) for g in drawn], kind, backend)
    order = data.draw(st.permutations(range(len(drawn))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(drawn)), max_size=3)) | {0, len(drawn)})
    groups: list[Any] = [{"params": [with_gradient(drawn[i]) for i in order[a:b]]} for a, b in pairwise(cuts)]
    assert torch.equal(found_norm(groups, kind, backend), norm)
    assert torch.equal(found_norm(groups, kind, backend), norm), "and in every run"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_of_several_parts(kind: float, backend: str, device: str) -> None:
    """Muon and AdamW in one optimizer: each part's sum or largest number becomes that of all."""
    cls: Any = Muon
    params = parameters(device, (8, 16), (16, 8), (5,), ())
    optimizer = cls(params, lr=0.02, adamw={}, clip_grad_norm=0.3, clip_norm_type=kind, backend=backend)
    for largest in (0, 3):  # in the one part and in the other
        give_gradients(largest, params)
        for p in params:
            assert p.grad is not None
            p.grad.view(-1)[0] = 3.0 if p is params[largest] else 0.5
        optimizer.step()
        expected = exact(gradients_of(optimizer), kind)
        norm = float(optimizer.metrics()["grad_norm"])
        assert abs(norm - expected) <= float(np.spacing(np.float32(expected)))
        assert float(optimizer.metrics()["clip_coefficient"]) == 0.3 / (norm + 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_scale_divides_every_norm(kind: float, backend: str, device: str) -> None:
    g = torch.linspace(-1.0, 1.0, 1000, device=device)
    norm = found_norm([with_gradient(g)], kind, backend)
    optimizer = SGD([with_gradient(g * 64.0)], lr=0.0, clip_norm_type=kind, clip_grad_norm=1.0, backend=backend)
    optimizer.grad_scale = torch.tensor(64.0, device=device)
    optimizer.step()
    assert torch.equal(optimizer.metrics()["grad_norm"], norm)


def test_bad_input_is_refused(device: str) -> None:
    first, second = parameters(device, (2,), (3,))
    for kind in (3.0, 0.0, "2", None):
        with pytest.raises((ValueError, TypeError), match=r"clip_norm_type must be 1\.0 or 2\.0 or inf"):
            SGD([first], clip_grad_norm=1.0, clip_norm_type=kind)
    message = "clip_norm_type is that of the norm over all gradients: give every"
    groups: list[Any] = [{"params": [first], "clip_norm_type": 1.0}, {"params": [second], "clip_norm_type": math.inf}]
    with pytest.raises(ValueError, match=message):
        SGD(groups, clip_grad_norm=1.0)
    optimizer = SGD([{"params": [first]}, {"params": [second]}], clip_grad_norm=1.0, clip_norm_type=1.0)
    optimizer.param_groups[1]["fusedopt"]["clip_norm_type"] = math.inf  # in mid-run: found by the next step
    before = [p.detach().clone() for p in (first, second)]
    for p in (first, second):
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert torch.equal(first, before[0]) and torch.equal(second, before[1])
    with pytest.raises(ValueError, match=r"novograd takes the 2-norm of gradients: leave clip_norm_type at 2\.0"):
        fusedopt.NovoGrad([first], clip_grad_norm=1.0, clip_norm_type=1.0)
    fusedopt.NovoGrad([first], clip_grad_norm=1.0, clip_norm_type=2.0)


@given(st.floats(1e-3, 1e6), st.floats(1e-3, 1e6))
@settings(max_examples=200)
def test_given_the_norm_clipped_gradients_are_within_three_ulps_of_torchs(norm: float, limit: float) -> None:
    """torch adds and divides in fp32, ours does both in fp64 and rounds once: 1 ulp and ½ (relative errors of 2u and u
    for u = ½ ulp), and each product rounds once more. An ulp of a quotient may be half of that of a neighbour."""
    g = torch.linspace(0.5, 2.0, 64)
    norm = float(torch.tensor(norm))
    ours, theirs = (torch.nn.Parameter(torch.zeros(64)) for _ in range(2))
    ours.grad, theirs.grad = g.clone(), g.clone()
    SGD([ours], lr=1.0, clip_grad_norm=limit).step(total_norm=norm)
    torch.nn.utils.clip_grads_with_norm_([theirs], limit, torch.tensor(norm))
    expected = -theirs.grad
    ulp = torch.nextafter(expected.abs(), torch.tensor(torch.inf)) - expected.abs()
    assert ((ours.detach() - expected).abs() <= 3 * ulp).all()
