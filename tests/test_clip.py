"""Clipping, skipping, L1 and independent decay in the step, against torch's functions around a torch.optim step."""

import math
from typing import Any

import pytest
import torch
from compare import BACKENDS, assert_close, assert_equal, contents, give_gradients, parameters, params_of, train
from table import RULES, RuleRow
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import fusedopt
from fusedopt_kernels import launch

SHAPES = ((33, 7), (5,), (), (0,), (40000,))
ONE_PASS = [row for row in RULES if row.label == "plain" and not row.cls.rule.n_norms]


def grads_of(optimizer: Any) -> list[torch.Tensor]:
    return [p.grad for p in params_of(optimizer) if p.grad is not None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("threshold", [0.3, 1e6], ids=["clips", "does not"])
def test_norm_clipping_is_clip_grad_norm_and_a_step(threshold: float, backend: str, device: str) -> None:
    ours = fusedopt.SGD(parameters(device, *SHAPES), lr=0.1, momentum=0.9, clip_grad_norm=threshold, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    theirs = torch.optim.SGD(parameters(device, *SHAPES), lr=0.1, momentum=0.9)
    for t in range(4):
        give_gradients(t, params_of(ours), params_of(theirs))
        before = [g.clone() for g in grads_of(ours)]
        clip_grad_norm_(params_of(theirs), threshold)
        ours.step()
        theirs.step()
        assert all(map(torch.equal, grads_of(ours), before)), "gradients are never rewritten"
    assert_close(ours, theirs, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_tensor_by_its_own_norm(backend: str, device: str) -> None:
    options: dict[str, Any] = dict(clip_grad_norm=0.3, clip_scope="tensor")
    ours = fusedopt.SGD(parameters(device, *SHAPES), lr=0.1, **options, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    theirs = torch.optim.SGD(parameters(device, *SHAPES), lr=0.1)
    for t in range(3):
        give_gradients(t, params_of(ours), params_of(theirs))
        for p in params_of(theirs):
            clip_grad_norm_([p], 0.3)
        ours.step()
        theirs.step()
    assert_close(ours, theirs, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_clipped_after_the_norm(backend: str, device: str) -> None:
    ours = fusedopt.SGD(
        parameters(device, *SHAPES), lr=0.1, clip_grad_norm=30.0, clip_grad_value=0.1, backend=backend  # pyright: ignore[reportArgumentType] # one of BACKENDS
    )  # fmt: skip
    theirs = torch.optim.SGD(parameters(device, *SHAPES), lr=0.1)
    for t in range(3):
        give_gradients(t, params_of(ours), params_of(theirs))
        clip_grad_norm_(params_of(theirs), 30.0)
        clip_grad_value_(params_of(theirs), 0.1)
        ours.step()
        theirs.step()
    assert_close(ours, theirs, 3)


@pytest.mark.parametrize(
    "options",
    [
        dict(clip_grad_norm=0.5), dict(clip_grad_norm=0.5, clip_scope="tensor"), dict(clip_grad_value=0.25),
        dict(l1=0.125), dict(clip_grad_norm=0.5, clip_grad_value=0.01, l1=0.5), dict(skip_norm_above=1e9),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("row", ONE_PASS, ids=str)
def test_kernels_equal_twins_with_every_rule(row: RuleRow, options: dict[str, Any], device: str) -> None:
    """Small tensors, so that the norm is one block's sum in both; the last shape has three partials."""
    shapes = SHAPES if row.name in ("adamw", "sgd") else SHAPES[:-1]
    both = [row.cls(parameters(device, *shapes), **row.options, **options, backend=b) for b in BACKENDS]
    train(range(3), *both)
    assert_equal(*both)


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_may_differ_by_group_and_be_tensors(backend: str, device: str) -> None:
    """One norm over all groups; each group its own share of it. Changing a tensor or a float needs no new plan."""
    limit = torch.tensor(0.5, device=device)
    shapes = ((33, 7), (5, 5))
    params, copies = parameters(device, *shapes), parameters(device, *shapes)
    groups = [{"params": [params[0]], "clip_grad_norm": limit}, {"params": [params[1]], "clip_grad_norm": 0.125}]
    ours = fusedopt.SGD(groups, lr=0.1, backend=backend)  # pyright: ignore[reportArgumentType]  # one of BACKENDS
    for t, (first, second) in enumerate(((0.5, 0.125), (0.25, 0.125), (0.25, 1.0))):
        limit.fill_(first)
        ours.param_groups[1]["fusedopt"]["clip_grad_norm"] = second
        give_gradients(t, params, copies)
        plan = ours._plan
        ours.step()
        assert plan is None or plan is ours._plan
        norm = math.sqrt(sum(float(q.grad.double().square().sum()) for q in copies if q.grad is not None))
        for q, threshold in zip(copies, (first, second), strict=True):
            assert q.grad is not None
            q.data -= 0.1 * (q.grad * min(1.0, threshold / (norm + 1e-6)))
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # a norm and a product rounded differently per step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("options", "bad", "skips"),
    [
        (dict(skip_nonfinite=True), math.inf, True),
        (dict(skip_nonfinite=True), math.nan, True),
        (dict(skip_nonfinite=True), 1e30, False),
        (dict(skip_norm_above=300.0), 1e3, True),
        (dict(skip_norm_above=300.0), math.nan, True),
        (dict(skip_norm_above=300.0), 10.0, False),
    ],
    ids=str,
)
def test_a_skipped_step_changes_nothing(
    options: dict[str, Any], bad: float, skips: bool, backend: str, device: str
) -> None:
    ours = fusedopt.NAdam(parameters(device, *SHAPES), **options, clip_grad_value=1e20, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    train([0], ours)
    before = [(p.detach().clone(), {k: v.clone() for k, v in state.items()}) for p, state in contents(ours)]
    give_gradients(1, params_of(ours))
    grad = params_of(ours)[0].grad
    assert grad is not None
    grad[0, 0] = bad
    ours.step()
    for (p, state), (q, other) in zip(contents(ours), before, strict=True):
        same = torch.equal(p, q) and all(torch.equal(state[key], other[key]) for key in state)
        assert same == skips or (same and not p.numel())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_norm_is_used_instead(backend: str, device: str) -> None:
    """Two optimizers, one norm; and no norm pass."""
    params, copies = parameters(device, *SHAPES), parameters(device, *SHAPES)
    pair = [fusedopt.SGD(few, lr=0.1, clip_grad_norm=0.5, backend=backend) for few in (params[:2], params[2:])]  # pyright: ignore[reportArgumentType] # one of BACKENDS
    whole = fusedopt.SGD(copies, lr=0.1, clip_grad_norm=0.5, backend=backend)  # pyright: ignore[reportArgumentType]  # as above
    for t in range(3):
        give_gradients(t, params, copies)
        norm = torch.nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
        for optimizer in pair:
            optimizer.step(total_norm=norm if t % 2 else float(norm))
        whole.step()
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)  # torch's norm is within some ulps of ours
    with pytest.raises(ValueError, match="needs clip_grad_norm"):
        fusedopt.SGD(params, lr=0.1).step(total_norm=1.0)


def test_launches(device: str) -> None:
    def names(**options: Any) -> list[str]:
        optimizer = fusedopt.AdamW(parameters(device, *SHAPES), **options, backend="triton")
        optimizer._launcher = recorder = launch.Recorder()
        train([0], optimizer)
        return [spec.name for spec, _, _ in recorder.record]

    assert names(clip_grad_norm=1.0) == ["norm", "adamw_scalars", "adamw"]
    assert names(clip_grad_norm=1.0, clip_scope="tensor") == ["norm", "adamw_scalars", "adamw"]
    assert names(skip_norm_above=1.0) == ["norm", "adamw_scalars", "adamw"]
    assert names(clip_grad_value=1.0, l1=0.1, decay_mode="independent") == ["adamw_scalars", "adamw"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_l1_is_the_penaltys_gradient(backend: str, device: str) -> None:
    ours = fusedopt.SGD(parameters(device, *SHAPES), lr=0.1, l1=0.25, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    theirs = torch.optim.SGD(parameters(device, *SHAPES), lr=0.1)
    for t in range(1):  # later a sign may hang on a rounding
        give_gradients(t, params_of(ours), params_of(theirs))
        for p in params_of(theirs):
            assert p.grad is not None
            p.grad += 0.25 * p.detach().sign()
        ours.step()
        theirs.step()
    assert_close(ours, theirs, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_independent_decay_follows_the_schedule_only(backend: str, device: str) -> None:
    """Zero gradients leave decay alone: p ← p·(1 − weight_decay·lr/lr_initial)."""
    optimizers = [
        fusedopt.AdamW(parameters(device), lr=lr, weight_decay=0.125, decay_mode="independent", backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
        for lr in (1e-3, 0.5)
    ]
    for optimizer in optimizers:
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: (1.0, 0.5, 0.0)[min(t, 2)])
        for _ in range(3):
            for p in params_of(optimizer):
                p.grad = torch.zeros_like(p)
            optimizer.step()
            schedule.step()
    for p, q, start in zip(*map(params_of, optimizers), parameters(device), strict=True):
        expected = start.detach().double() * (1 - 0.125) * (1 - 0.0625)
        for x in (p, q):
            torch.testing.assert_close(x.detach().double(), expected, rtol=2e-7, atol=0)  # two roundings of 6e-8


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(clip_grad_norm=0.0), ValueError, "clip_grad_norm must be above 0"),
        (dict(clip_grad_norm="1"), TypeError, "clip_grad_norm must be a number"),
        (dict(clip_grad_value=-1.0), ValueError, "clip_grad_value must be above 0"),
        (dict(skip_norm_above=math.nan), ValueError, "skip_norm_above must be above 0"),
        (dict(l1=-0.1), ValueError, "l1 must be at least 0"),
        (dict(clip_grad_norm=torch.ones(2)), ValueError, "one-element tensor"),
        (dict(clip_scope="layer"), ValueError, "clip_scope must be 'global' or 'tensor'"),
        (dict(decay_mode="none"), ValueError, "decay_mode must be 'lr' or 'independent'"),
        (dict(decay_mode="independent", lr=0.0), ValueError, "initial lr, which is 0"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedopt.AdamW(parameters("cpu"), **options)


def test_groups_must_agree_on_skipping() -> None:
    params = parameters("cpu", (2,), (2,))
    with pytest.raises(ValueError, match="the same values"):
        fusedopt.SGD([{"params": [params[0]], "skip_nonfinite": True}, {"params": [params[1]], "clip_grad_norm": 1.0}])
    optimizer = fusedopt.SGD([{"params": [params[0]], "clip_grad_norm": 1.0}])
    with pytest.raises(ValueError, match="give every param_group the same"):
        optimizer.add_param_group({"params": [params[1]], "clip_grad_norm": 1.0, "clip_norm_type": 1.0})
    assert len(optimizer.param_groups) == 1
