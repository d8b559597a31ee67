"""`opt.metrics()` against plain PyTorch: the same norms from gradients and from parameters before and after a step."""

import math
from typing import Any

import pytest
import torch
from compare import BACKENDS, contents, give_gradients, parameters, train

import fusedopt
from fusedopt.metrics import NAMES
from fusedopt.rules.muon import Muon

AdamW: Any = fusedopt.AdamW
SHAPES = ((33, 7), (5,), (), (0,), (40000,))
"""The last has chunks on both paths, and a tail."""
ORDER = 42000 * 2.0**-53
"""Relative: fp64 sums of n positive terms in any order are within n/2 roundings of 2⁻⁵³ of the exact sum, each of two;
the root halves that."""
CHANGES = ("param_norm", "update_norm", "update_ratio")


def real(t: torch.Tensor) -> torch.Tensor:
    return torch.view_as_real(t) if t.is_complex() else t


def params_of(optimizer: Any) -> list[Any]:
    """Its parameters, whose gradients the type checker takes for granted."""
    return [p for p, _ in contents(optimizer)]


def copies(optimizer: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params_of(optimizer)]


def norm_of(tensors: list[torch.Tensor]) -> float:
    return math.sqrt(math.fsum(float(real(t.detach()).double().square().sum()) for t in tensors))


def changes(before: list[torch.Tensor], after: list[torch.Tensor]) -> dict[str, float]:
    """The expected metrics of `CHANGES`; differences in the compute type, as the step takes them."""
    wide = [(real(a), real(b)) for a, b in zip(after, before, strict=True)]
    wide = [(a.float(), b.float()) if a.dtype != torch.float64 else (a, b) for a, b in wide]
    params, update = norm_of([a for a, _ in wide]), norm_of([a - b for a, b in wide])
    return {"param_norm": params, "update_norm": update, "update_ratio": update / params}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, float], rtol: float = 4 * ORDER) -> None:
    for name, value in expected.items():
        assert math.isclose(float(found[name]), value, rel_tol=rtol, abs_tol=0.0), (name, float(found[name]), value)


@pytest.mark.filterwarnings("ignore:state 'exp_avg_sq' takes:UserWarning")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64], ids=str
)
def test_every_metric_is_what_torch_computes(dtype: torch.dtype, backend: str, device: str) -> None:
    optimizer = AdamW(
        parameters(device, *SHAPES, dtype=dtype), lr=0.01, clip_grad_norm=30.0, weight_decay=0.1, metrics=NAMES,
        backend=backend,
    )  # fmt: skip
    clipped = 0
    for t in range(4):
        give_gradients(t, params_of(optimizer))
        for p in params_of(optimizer):
            p.grad *= 2.0**-3 if t % 2 else 1.0  # norms of about 115 and 14, √2 times that if complex
        before, norm = copies(optimizer), norm_of([p.grad for p in params_of(optimizer)])
        optimizer.step()
        found = optimizer.metrics()
        assert set(found) == set(NAMES)
        assert all(x.shape == () and x.dtype == torch.float64 for x in found.values())
        narrow = 1.0 if dtype == torch.float64 else torch.finfo(torch.float32).eps / ORDER  # rounded once to fp32
        assert_near(found, {"grad_norm": norm}, ORDER * narrow)
        assert float(found["clip_coefficient"]) == min(1.0, 30.0 / (float(found["grad_norm"]) + 1e-6))
        assert_near(found, changes(before, copies(optimizer)))
        clipped += norm > 30.0
        assert float(found["clipped_share"]) == clipped / (t + 1)
        assert [float(found[name]) for name in ("nonfinite_grads", "nonfinite_steps", "skipped_steps")] == [0, 0, 0]
    assert clipped == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_and_skipped_steps(backend: str, device: str) -> None:
    """The first step is skipped too: its parameters have a norm all the same."""
    optimizer = AdamW(
        parameters(device, *SHAPES), lr=0.01, clip_grad_norm=30.0, skip_nonfinite=True, metrics=NAMES, backend=backend
    )
    bad = {0: [0], 2: [], 3: [0, 4], 5: [4]}
    for t in range(6):
        give_gradients(t, params_of(optimizer))
        for i in bad.get(t, []):
            params_of(optimizer)[i].grad.view(-1)[-1] = math.nan if i else -math.inf
        before = copies(optimizer)
        optimizer.step()
        found = optimizer.metrics()
        assert float(found["nonfinite_grads"]) == len(bad.get(t, []))
        if bad.get(t):
            assert all(map(torch.equal, before, copies(optimizer)))
            assert float(found["update_norm"]) == float(found["update_ratio"]) == 0.0
            assert_near(found, {"param_norm": norm_of(before)})
        else:
            assert_near(found, changes(before, copies(optimizer)))
    assert float(found["skipped_steps"]) == float(found["nonfinite_steps"]) == 3.0
    assert float(found["clipped_share"]) == 1.0, "of the steps that were made"


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_skipped_counts_too(backend: str, device: str) -> None:
    """A NaN makes its parameter's coefficient NaN, as torch's; another parameter's clipping is counted all the same."""
    optimizer = AdamW(
        parameters(device, (33, 7), (5,), (4,)), clip_grad_norm=0.5, clip_scope="tensor", metrics=("nonfinite_grads",),
        backend=backend,
    )  # fmt: skip
    give_gradients(0, params_of(optimizer))
    params_of(optimizer)[1].grad[2] = math.nan
    optimizer.step()
    found = optimizer.metrics()
    assert math.isnan(found["clip_coefficient"]) and math.isnan(found["grad_norm"])
    assert [float(found[name]) for name in ("clipped_share", "nonfinite_steps", "skipped_steps")] == [1.0, 1.0, 0.0]
    each = optimizer.metrics(per="tensor")
    assert math.isnan(each["clip_coefficient/0.1"]) and 0.0 < float(each["clip_coefficient/0.0"]) < 1.0
    assert [float(each[f"nonfinite_grads/0.{i}"]) for i in range(3)] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_loss_scale_is_divided_out(backend: str, device: str) -> None:
    optimizer = AdamW(parameters(device, *SHAPES), clip_grad_norm=30.0, metrics=NAMES, backend=backend)
    plain = AdamW(parameters(device, *SHAPES), clip_grad_norm=30.0, metrics=NAMES, backend=backend)
    give_gradients(0, params_of(optimizer), params_of(plain))
    for p in params_of(optimizer):
        p.grad *= 1024.0
    optimizer.grad_scale = torch.tensor(1024.0, device=device)
    for each in (optimizer, plain):
        each.step()
    for per in ("model", "tensor"):
        torch.testing.assert_close(optimizer.metrics(per), plain.metrics(per), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("named", [True, False])
def test_per_group_and_per_tensor(named: bool, backend: str, device: str) -> None:
    """Groups with a parameter that has no gradient in their midst, and one without any."""
    shapes = ((33, 7), (5,), (40000,), (6,), (3,), (2, 2))
    params = parameters(device, *shapes)
    names = ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight", "d.weight"]
    members: list[Any] = list(zip(names, params, strict=True)) if named else params
    groups = [{"params": members[:4]}, {"params": members[4:5]}, {"params": members[5:], "clip_grad_norm": 1e9}]
    optimizer = AdamW(groups, lr=0.01, clip_grad_norm=3.0, metrics=NAMES, backend=backend)
    give_gradients(0, params)
    params[1].grad = params[4].grad = None
    before = copies(optimizer)
    optimizer.step()
    after = copies(optimizer)
    labels = names if named else ["0.0", "0.1", "0.2", "0.3", "1.0", "2.0"]
    clip = float(optimizer.metrics()["clip_coefficient"])
    sets = {"group": {"0": [0, 2, 3], "2": [5]}, "tensor": {labels[i]: [i] for i in (0, 2, 3, 5)}}
    for per, expected in sets.items():
        found = optimizer.metrics(per)
        short = [*CHANGES, "clip_coefficient", "grad_norm", "nonfinite_grads"]
        assert set(found) == {f"{name}/{label}" for name in short for label in expected}
        assert all(x.shape == () and x.dtype == torch.float64 for x in found.values())
        for label, few in expected.items():
            own = {name: found[f"{name}/{label}"] for name in short}
            assert_near(own, changes([before[i] for i in few], [after[i] for i in few]))
            norm = norm_of([g for i in few if (g := params[i].grad) is not None])
            assert_near(own, {"grad_norm": norm}, 2.0**-23)  # norms of single gradients are rounded to fp32
            assert float(own["clip_coefficient"]) == (1.0 if few == [5] else clip)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (fusedopt.SGD, dict(lr=0.1, momentum=0.9)),
        (fusedopt.SGD, dict(lr=0.1, ema_decay=0.9, clip_grad_norm=1.0)),
        (fusedopt.AdamW, dict(lr=0.01, cautious=True, ema_decay=0.9, weight_decay=0.1)),
        (fusedopt.LAMB, dict(lr=0.01)),
        (fusedopt.NovoGrad, dict(lr=0.1)),
    ],
    ids=str,
)
def test_changes_under_other_rules_and_options(cls: Any, options: dict[str, Any], backend: str, device: str) -> None:
    """With a mask too; and gradients, state and weights are those of a step that measures nothing."""
    optimizer = cls(parameters(device, *SHAPES), **options, metrics=CHANGES, backend=backend)
    plain = cls(parameters(device, *SHAPES), **options, backend=backend)
    for each in (optimizer, plain):
        for p in (params_of(each)[0], params_of(each)[4]):
            each.set_update_mask(p, torch.arange(p.numel(), device=device).reshape(p.shape) % 3 > 0)
    for t in range(2):
        before = copies(optimizer)
        train([t], optimizer, plain)
        assert_near(optimizer.metrics(), changes(before, copies(optimizer)))
    assert all(map(torch.equal, params_of(optimizer), params_of(plain)))


@pytest.mark.filterwarnings("ignore:state 'exp_avg_sq' takes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("numel", [1, 511, 16384, 16385, 3 * 16384 + 700])
def test_kernels_agree_with_twins(numel: int, offset: int, dtype: torch.dtype, poison: Any) -> None:
    """Chunks, tails and unaligned tensors; what lies around the tensors is not counted."""
    found = []
    for backend in BACKENDS:
        p = torch.nn.Parameter(poison(numel, dtype, offset).copy_(torch.linspace(-1.0, 1.0, numel)))
        p.grad = poison(numel, dtype, offset).copy_(torch.linspace(-2.0, 3.0, numel))
        optimizer = AdamW([p], lr=0.01, weight_decay=0.1, metrics=NAMES, backend=backend)
        optimizer.step()
        found.append({name: float(x) for name, x in optimizer.metrics().items()})
    eager, kernels = found
    assert all(math.isclose(eager[name], kernels[name], rel_tol=4 * ORDER) for name in CHANGES), found
    assert math.isclose(eager["grad_norm"], kernels["grad_norm"], rel_tol=2.0**-23)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_parts(backend: str, device: str) -> None:
    """Muon and AdamW in one optimizer; a step is skipped for all."""
    shapes = ((8, 16), (16, 8), (5,), ())
    cls: Any = Muon
    options: dict[str, Any] = dict(lr=0.02, adamw={}, clip_grad_norm=1.0, skip_nonfinite=True, metrics=NAMES)
    optimizer = cls(parameters(device, *shapes), **options, backend=backend)
    for t in range(4):
        give_gradients(t, params_of(optimizer))
        if t in (0, 2):
            params_of(optimizer)[3].grad.fill_(math.inf)
        before = copies(optimizer)
        optimizer.step()
        found, norm = optimizer.metrics(), norm_of([p.grad for p in params_of(optimizer)])
        assert_near(found, {"grad_norm": norm}, 2.0**-23)
        assert float(found["nonfinite_grads"]) == (t in (0, 2))
        assert_near(found, changes(before, copies(optimizer)))
        each, after = optimizer.metrics(per="tensor"), copies(optimizer)
        assert len(each) == 6 * len(shapes)
        for i, label in enumerate(("0.0", "0.1", "1.0", "1.1")):
            assert_near(each, {f"grad_norm/{label}": norm_of([params_of(optimizer)[i].grad])}, 2.0**-23)
            assert_near(each, {f"{k}/{label}": x for k, x in changes(before[i : i + 1], after[i : i + 1]).items()})
    assert [float(found[name]) for name in ("skipped_steps", "clipped_share", "nonfinite_steps")] == [2.0, 1.0, 2.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_sparse_gradients_beside_dense_ones(backend: str, device: str) -> None:
    """They have norms; changes of their rows are not measured, and asking for them is refused before anything moves."""
    cls: Any = fusedopt.Adagrad
    for metrics in (("grad_norm", "nonfinite_grads"), ("param_norm",)):
        optimizer = cls(parameters(device, (6, 3), (5,)), lr=0.1, metrics=metrics, backend=backend)
        give_gradients(0, params_of(optimizer))
        norm = norm_of([p.grad for p in params_of(optimizer)])
        params_of(optimizer)[0].grad = params_of(optimizer)[0].grad.to_sparse(1)
        before = copies(optimizer)
        if metrics == ("param_norm",):
            with pytest.raises(ValueError, match=r"metrics param_norm: .* not measured with sparse gradients"):
                optimizer.step()
            assert all(map(torch.equal, before, copies(optimizer)))
        else:
            optimizer.step()
            assert_near(optimizer.metrics(), {"grad_norm": norm, "nonfinite_grads": 0.0}, 2.0**-23)
            assert set(optimizer.metrics("group")) == {
                f"{k}/0" for k in ("grad_norm", "nonfinite_grads", "clip_coefficient")
            }


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_asked_for_is_there(backend: str, device: str) -> None:
    """Without clipping too; what a rule needs anyway is there unasked."""
    optimizer = AdamW(parameters(device), metrics=("clip_coefficient", "clipped_share"), backend=backend)
    train([0], optimizer)
    assert {k: float(x) for k, x in optimizer.metrics().items()} == {
        "clip_coefficient": 1.0, "clipped_share": 0.0, "skipped_steps": 0.0,
    }  # fmt: skip
    assert set(optimizer.metrics("tensor")) == {f"clip_coefficient/0.{i}" for i in range(4)}
    cls: Any = fusedopt.NovoGrad
    normed = cls(parameters(device), backend=backend)
    train([0], normed)
    norm = norm_of([p.grad for p in params_of(normed)])
    assert set(normed.metrics()) == {"grad_norm", "nonfinite_grads", "skipped_steps"}
    assert_near(normed.metrics(), {"grad_norm": norm}, 2.0**-23)
