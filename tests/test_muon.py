"""Muon: torch.optim's results, batched products, AdamW in the same optimizer, and what is its own."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from compare import BACKENDS, assert_equal, contents, parameters, params_of, train, uniform

from fusedopt import muon_step
from fusedopt.rules.muon import Muon
from fusedopt.verify.oracles.muon import orthogonalise
from fusedopt_kernels import launch

SHAPES: tuple[tuple[int, ...], ...] = ((8, 16), (16, 8), (8, 16), (9, 9), (1, 5), (5, 1), (33, 20), (0, 4))
"""Wide, tall, square, of equal shapes, not a multiple of 64 elements, without any."""
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": dict(lr=0.02),
    "momentum": dict(lr=0.02, nesterov=False, momentum=0.8, weight_decay=0),
    "match": dict(lr=0.02, adjust_lr_fn="match_rms_adamw", ns_steps=4, weight_decay=0.3),
    "none": dict(lr=0.02, ns_steps=0, momentum=0.0),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def optimizers(device: str, *makers: Any, shapes: Any = SHAPES, dtype: torch.dtype = torch.float32) -> list[Any]:
    """One optimizer by each (class, options), over equal parameters."""
    return [cls(parameters(device, *shapes, dtype=dtype), **options) for cls, options in makers]


# ------------------------------------------------------------------------------------------------------- results
def exact(u: torch.Tensor, steps: int = 5) -> np.ndarray:
    return orthogonalise(u.double().cpu().numpy(), (3.4445, -4.775, 2.0315), steps, 1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_as_torch(options: str, dtype: torch.dtype, device: str) -> None:
    """The momenta within rounding; the orthogonal part of one step as near the exact one as torch's.

    Products in bf16 are summed in another order when batched, so single results differ by a unit of bf16, which
    later steps amplify: both stay within what Newton–Schulz in bf16 itself loses.
    """
    given = OPTIONS[options]
    ours, theirs = optimizers(device, (Muon, dict(given, backend="eager")), (torch.optim.Muon, given), dtype=dtype)
    if dtype == torch.bfloat16 and not given.get("nesterov", True):
        theirs.param_groups[0]["nesterov"] = True  # torch 2.13 spoils such a buffer: the first step alone is comparable
        ours.param_groups[0]["nesterov"] = True
    for step in range(3):
        before = [p.detach().double() for p in params_of(ours)]
        with torch.no_grad():
            for (p, _), (q, other) in zip(contents(ours), contents(theirs), strict=True):
                q.copy_(p)
                if other:
                    other["momentum_buffer"].copy_(ours.state[p]["momentum_buffer"])
        train([step], ours, theirs)
        for was, (p, state), (q, other) in zip(before, contents(ours), contents(theirs), strict=True):
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(state["momentum_buffer"], other["momentum_buffer"], rtol=2 * eps, atol=2 * eps)
            if p.numel():
                lr, decay = given["lr"], given.get("weight_decay", 0.1)
                size = lr * muon_step.lr_ratio(given.get("adjust_lr_fn"), p.shape)
                b, mu = state["momentum_buffer"].double(), given.get("momentum", 0.95)
                assert p.grad is not None
                u = p.grad.double() + mu * (b - p.grad.double()) if ours.param_groups[0]["nesterov"] else b
                o = torch.from_numpy(exact(u, given.get("ns_steps", 5))).to(device)
                best = was - size * o - lr * decay * was
                mine, its = ((x.detach().double() - best).square().mean().sqrt() for x in (p, q))
                assert mine <= 1.25 * its + 4e-3 * size + eps, (tuple(p.shape), float(mine), float(its))


@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48)], ids=str)
def test_orthogonal(shape: tuple[int, int], device: str) -> None:
    """Singular values of the update end near 1, and it is that of the exact iteration but for bf16."""
    p = torch.nn.Parameter(torch.zeros(shape, device=device))
    optimizer = Muon([p], lr=1.0, momentum=0.0, weight_decay=0.0, backend="eager")
    p.grad = torch.randn(shape, device=device)
    optimizer.step()
    o = p.detach().double().cpu() / -muon_step.lr_ratio(None, shape)
    singular = torch.linalg.svdvals(o)
    assert 0.5 < singular[:-2].min() and singular.max() < 1.3
    error = np.sqrt(((o.numpy() - exact(p.grad)) ** 2).mean())
    assert error < 2**-9 * 3.4445**5 / math.sqrt(math.prod(shape)) / 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_kernels_agree_with_twins(options: str, dtype: torch.dtype, device: str) -> None:
    """Bit for bit: both take the same batched products."""
    given = OPTIONS[options]
    makers = [(Muon, dict(given, backend=backend)) for backend in ("eager", "triton")]
    eager, kernels = optimizers(device, *makers, dtype=dtype)
    train(range(2), eager, kernels)
    assert_equal(eager, kernels)


def test_large_batches_are_divided(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on memory, not another result."""
    given = dict(lr=0.02, backend="eager")
    whole, parts = optimizers(device, (Muon, given), (Muon, given))
    train([0], whole)
    monkeypatch.setattr(muon_step, "BATCH", 130)
    train([0], parts)
    for p, q in zip(params_of(whole), params_of(parts), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-2 * 0.02 * 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_step(backend: str, device: str) -> None:
    """lr = 0 and zero gradients: state is made and no weight changes."""
    p = torch.nn.Parameter(torch.tensor([[0.0, -0.0, 1e-40], [3e38, -math.inf, 1 / 3]], device=device))
    before = p.detach().clone()
    optimizer = Muon([p], lr=torch.tensor(0.0), backend=backend)
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        optimizer.step()
    assert torch.equal(p.detach().view(torch.int32), before.view(torch.int32))
    assert not optimizer.state[p]["momentum_buffer"].any()


# -------------------------------------------------------------------------------------------- parameters and options
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:a parameter with gaps", "ignore:a gradient with strides")  # what is tested
def test_groups_layouts_missing_gradients_and_live_options(backend: str, device: str) -> None:
    def make() -> Any:
        a, b = parameters(device, (6, 8), (6, 8)), parameters(device, (4, 10), dtype=torch.float64, seed=1)
        a[1] = torch.nn.Parameter(a[1].detach().T.contiguous().T)
        return Muon([dict(params=a), dict(params=b, lr=torch.tensor(0.02), momentum=0.5)], lr=0.1, backend=backend)

    first, second = make(), make()
    for step in range(4):
        for optimizer in (first, second):
            for i, p in enumerate(params_of(optimizer)):
                p.grad = None if (i + step) % 3 == 0 else uniform([tuple(p.shape)], device, p.dtype, 10 * step + i)[0]
            optimizer.param_groups[0]["lr"] = 0.1 / (step + 1)
            optimizer.param_groups[0]["ns_steps"] = 3 + step
            optimizer.param_groups[1]["lr"].fill_(0.05 / (step + 1))
        first.step()
        second._forget_plan()  # a plan made anew must see what a kept one was told
        second.step()
    assert_equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:a parameter with gaps")  # what is tested
def test_transposed_parameters(backend: str, device: str) -> None:
    x, g = (uniform([(6, 8)], device, torch.float32, seed)[0] for seed in (0, 1))
    plain, other = torch.nn.Parameter(x), torch.nn.Parameter(x.T.contiguous().T)
    for p in (plain, other):
        p.grad = torch.empty_like(p).copy_(g)
        Muon([p], backend=backend).step()
    assert torch.equal(plain, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_mask_and_cautious_decay(backend: str, device: str) -> None:
    given = dict(lr=0.1, weight_decay=1.0, backend=backend)
    more = (Muon, dict(given, cautious_decay=True)), (Muon, dict(given, weight_decay=0.0))
    plain, masked, cautious, free = optimizers(device, (Muon, given), (Muon, given), *more, shapes=((9, 8),))
    (p,), (q,), (r,), (s,) = map(params_of, (plain, masked, cautious, free))
    mask, before = torch.rand(9, 8, device=device) < 0.5, q.detach().clone()
    masked.set_update_mask(q, mask)
    train([0], plain, masked, cautious, free)
    assert torch.equal(q, torch.where(mask, p, before))
    assert ((r == p) | (r == s)).all() and (r != p).any() and (r != s).any()


def test_refusals(device: str) -> None:
    p = parameters(device, (3, 4))
    for wrong in (dict(lr=-1), dict(momentum=-0.1), dict(momentum=1.0), dict(weight_decay=-1), dict(cautious=True),
                  dict(adjust_lr_fn="other"), dict(lr=torch.ones(2)), dict(sparse="lazy")):  # fmt: skip
        with pytest.raises(ValueError):
            Muon(p, **wrong)
    for wrong in (dict(ns_steps=100), dict(ns_coefficients=(1.0, 2.0))):
        p[0].grad = torch.ones_like(p[0])
        with pytest.raises(ValueError, match=r"less than 100|exactly 3"):
            Muon(p, **wrong, backend="eager").step()
    c = torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.complex64, device=device))
    c.grad = torch.zeros_like(c)
    with pytest.raises(RuntimeError, match="does not support complex"):
        Muon([c], backend="eager").step()
    with pytest.raises(ValueError, match="2D parameters"):
        Muon(parameters(device, (3, 4), (3,)))


# ------------------------------------------------------------------------------------------------------------ launches
def recorded(count: int) -> launch.Recorder:
    shapes = ((8, 16), (16, 8), (5,))
    optimizer = Muon(parameters("cpu", *(shapes * count)), adamw={}, backend="triton")
    optimizer._launcher = recorder = launch.Recorder()
    train([0], optimizer)
    return recorder


def test_launches_and_products_do_not_grow_with_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("bmm", "baddbmm"):
        original = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, f=original, **k: (calls.append("product"), f(*a, **k)))
    names = [spec.name for spec, _, _ in recorded(1).record]
    few = len(calls)
    assert names == [spec.name for spec, _, _ in recorded(6).record] and len(calls) == 2 * few == 2 * 2 * 15
    assert sorted(names) == sorted(
        ["muon_momentum_scalars", "muon_momentum", "muon_apply_scalars", "muon_apply", "adamw_scalars", "adamw"]
    )


def test_warmup_leaves_nothing_to_compile() -> None:
    optimizer = Muon(parameters("cpu", (8, 16), (5,)), adamw={}, backend="triton")
    optimizer._launcher = recorder = launch.Recorder()
    assert optimizer.warmup()[0] == 6
    train([0], optimizer)
    assert optimizer.warmup()[0] == 0 and recorder.compiles == 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_allocated_in_a_steady_step(backend: str, device: str) -> None:
    """Directions and workspace keep their addresses; a direction takes 2 bytes an element."""
    optimizer = optimizers(device, (Muon, dict(backend=backend)))[0]
    train([0], optimizer)
    part = (optimizer._tables or optimizer._eager)[0]
    before = [(b.x.data_ptr(), b.spare.data_ptr(), b.gram.data_ptr()) for b in part.work.batches]
    assert len(before) == 6 and all(view.dtype == torch.bfloat16 for view in part.work.views)
    train([1], optimizer)
    part = (optimizer._tables or optimizer._eager)[0]
    assert before == [(b.x.data_ptr(), b.spare.data_ptr(), b.gram.data_ptr()) for b in part.work.batches]


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_compiled_without_spills(dtype: torch.dtype) -> None:
    """And the parameter is not read before its update: the first pass loads gradient and momentum alone."""
    from triton.backends.compiler import GPUTarget

    from fusedopt.inspect import sass

    p = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    p.grad = torch.zeros_like(p)
    optimizer = Muon([p], backend="triton")
    optimizer._launcher = recorder = launch.Recorder()
    optimizer.step()
    for spec, _, _ in recorder.record:
        code = sass.disassemble(launch.compile_for(spec, GPUTarget("cuda", 90, 32)).asm["cubin"])
        assert code.stack == 0 and code.count("LDL", "STL") == 0 and code.registers <= 64, spec.name
