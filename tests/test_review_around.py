"""Defects that reviews of what goes on around the update found; each test fails without its fix."""

from typing import Any

import pytest
import torch
from compare import BACKENDS, give_gradients, parameters, params_of
from test_captures import capture, graph

import fusedopt
from fusedopt_kernels import launch

__all__ = ["graph"]  # a fixture

SHAPES = ((33, 7), (5,))


def adamw(device: str, backend: str = "eager", **options: Any) -> Any:
    return fusedopt.AdamW(parameters(device, *SHAPES), backend=backend, **options)  # pyright: ignore[reportArgumentType] # one of the backends


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_default_device_does_not_matter(backend: str, device: str) -> None:
    optimizer = adamw(device, backend, clip_grad_norm=1.0, ema_decay=0.5, metrics=("update_norm",))
    give_gradients(0, params_of(optimizer))
    with torch.device("meta"):
        optimizer.step()
        assert optimizer.metrics()["update_norm"].item() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_change_beside_a_refused_one_is_not_lost(backend: str, device: str) -> None:
    """The lr of the first group was taken for known when the second group's options were refused."""
    params = parameters(device, *SHAPES)
    optimizer = fusedopt.SGD([{"params": [p]} for p in params], lr=0.5, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    give_gradients(0, params)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[1]["fusedopt"] = {"l1": -1.0}
    with pytest.raises(ValueError, match="l1"):
        optimizer.step()
    del optimizer.param_groups[1]["fusedopt"]
    before = params[0].detach().clone()
    optimizer.step()
    assert torch.equal(params[0], before)


def test_refresh_follows_the_latest_capture(graph: Any, device: str) -> None:
    optimizer = adamw(device, "triton")
    optimizer._launcher = graph
    give_gradients(0, params_of(optimizer))
    optimizer.step()
    capture(graph, optimizer.step)
    optimizer.param_groups[0]["maximize"] = True
    with pytest.raises(RuntimeError, match="capture the step again"):
        optimizer.refresh()
    optimizer.step()
    capture(graph, optimizer.step)
    optimizer.refresh()


@pytest.mark.parametrize("kind", [1.0, float("inf")])
def test_norm_types_of_complex_gradients_are_refused(kind: float, device: str) -> None:
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.complex64, device=device))
    p.grad = torch.ones_like(p)
    optimizer = fusedopt.SGD([p], clip_grad_norm=1.0, clip_norm_type=kind)
    with pytest.raises(ValueError, match="not defined for complex parameters"):
        optimizer.step()


def test_tables_of_hyper_parameters_do_not_pile_up(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon's depend on which matrices have a gradient."""
    monkeypatch.setattr("fusedopt.numbers.KEPT", 6)
    params = parameters(device, *((n, 3) for n in range(2, 7)))
    optimizer = fusedopt.Muon(params, backend="triton")
    for t in range(24):
        give_gradients(t, params)
        for i, p in enumerate(params):
            if t >> i & 1:
                p.grad = None
        optimizer.step()
    assert len(optimizer._shared._hypers) <= 6


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_lr_is_no_skip(backend: str, device: str) -> None:
    optimizer = adamw(device, backend, lr=float("inf"))
    give_gradients(0, params_of(optimizer))
    optimizer.step()
    assert not torch.isfinite(params_of(optimizer)[0]).any()


def test_a_scaler_without_gradients_changes_nothing(device: str) -> None:
    optimizer = adamw(device, ema_decay=0.5)
    scaler = fusedopt.GradScaler(device)
    scaler.scale(torch.ones((), device=device))
    give_gradients(0, params_of(optimizer))
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(optimizer)
    assert all(optimizer.state[p]["ema_step"] == 1 for p in params_of(optimizer))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_given_norm_keeps_no_graph_alive(backend: str, device: str) -> None:
    import weakref

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.held = torch.nn.Module()
            alive.append(weakref.ref(ctx.held))
            return 2.0 * x

    alive: list[Any] = []
    optimizer = adamw(device, backend, clip_grad_norm=1.0)
    give_gradients(0, params_of(optimizer))
    optimizer.step(total_norm=Twice.apply(torch.ones((), device=device, requires_grad=True)))
    assert alive[0]() is None


def test_swapping_in_an_average_of_another_shape_is_refused(device: str) -> None:
    optimizer = adamw(device, ema_decay=0.5)
    optimizer.ema_parameters()
    first = params_of(optimizer)[0]
    optimizer.state[first]["ema"] = torch.zeros(7, device=device)
    with pytest.raises(RuntimeError, match="does not fit"), optimizer.swap_ema():
        pass


def test_a_model_that_becomes_double_keeps_its_average(device: str) -> None:
    model = torch.nn.Linear(3, 2, device=device)
    optimizer = fusedopt.AdamW(model.parameters(), ema_decay=0.5)
    for dtype in (torch.float32, torch.float64):
        model.to(dtype)
        model(torch.ones(1, 3, dtype=dtype, device=device)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.state[model.weight]["ema"].dtype == torch.float64


def test_warmup_readies_the_average_of_idle_parameters(device: str) -> None:
    optimizer = adamw(device, "triton", ema_decay=0.5)
    params = params_of(optimizer)
    give_gradients(0, params)
    params[1].grad = None
    optimizer._launcher = launcher = launch.Launcher()
    count, _ = optimizer.warmup()
    optimizer.step()
    assert count == launcher.compiles > 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(clip_scope="tensor"), "does nothing without clip_grad_norm"),
        (dict(clip_norm_type=1.0), "does nothing without clip_grad_norm or skip_norm_above"),
        (dict(ema_warmup=True), "does nothing without ema_decay"),
        (dict(clip_grad_norm=1.0, clip_norm_type=torch.tensor(2.0)), "clip_norm_type must be"),
        (dict(clip_grad_norm=1.0, clip_norm_type=3.0), "clip_norm_type must be"),
    ],
    ids=str,
)
def test_options_without_an_effect_are_refused(options: dict[str, Any], message: str, device: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw(device, **options)


def test_metrics_may_come_from_a_generator(device: str) -> None:
    optimizer = adamw(device, metrics=(name for name in ("grad_norm",)))
    assert optimizer._metrics.norm
    with pytest.raises(TypeError, match="a sequence of names"):
        adamw(device, metrics=None)


def test_loading_says_which_options_it_takes_away(device: str) -> None:
    saved = adamw(device, l1=0.1).state_dict()
    optimizer = adamw(device, clip_grad_norm=1.0)
    with pytest.warns(UserWarning, match="off now are clip_grad_norm"):
        optimizer.load_state_dict(saved)


def test_tensor_thresholds_are_not_compared_by_value(device: str) -> None:
    """That would wait for the device; two tensors may differ later."""
    params = parameters(device, *SHAPES)
    limits = [torch.tensor(2.0, device=device) for _ in params]
    with pytest.raises(ValueError, match="the same object"):
        fusedopt.SGD([{"params": [p], "skip_norm_above": x} for p, x in zip(params, limits, strict=True)])
    fusedopt.SGD([{"params": [p], "skip_norm_above": limits[0]} for p in params])


def test_a_group_may_opt_out_of_what_others_refine(device: str) -> None:
    a, b = parameters(device, *SHAPES)
    options: dict[str, Any] = dict(ema_decay=0.9, ema_warmup=True, clip_grad_norm=1.0, clip_scope="tensor")
    optimizer = fusedopt.AdamW([{"params": [a]}, {"params": [b], "ema_decay": None, "clip_grad_norm": None}], **options)
    assert optimizer.param_groups[1].get("fusedopt") is None
    with pytest.raises(ValueError, match="ema_warmup=True does nothing"):  # the other is used by a group
        fusedopt.AdamW([{"params": [a], "clip_grad_norm": 1.0}], clip_scope="tensor", ema_warmup=True)
    some = [{"params": [a], "clip_grad_norm": 1.0}, {"params": [b]}]
    assert "clip_scope" in fusedopt.AdamW(some, clip_scope="tensor").param_groups[0]["fusedopt"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_check_of_norms_keeps_nothing(backend: str, device: str) -> None:
    optimizer = adamw(device, backend, clip_grad_norm=1.0, norm_at_backward="check")
    sizes = []
    for _ in range(6):
        optimizer.zero_grad()
        sum((p.square().sum() for p in params_of(optimizer)), torch.zeros(())).backward()
        optimizer.step()
        sizes.append([len(part._constants) for part in optimizer._tables])
    assert sizes[-1] == sizes[-3]


def test_an_optimizer_that_is_not_stepped_stops_no_backward(device: str) -> None:
    params = parameters(device, *SHAPES)
    old = fusedopt.SGD(params, clip_grad_norm=1.0, norm_at_backward=True)
    new = fusedopt.SGD(params)
    for optimizer in (old, new, new, new):
        optimizer.zero_grad(set_to_none=False)
        sum((p.square().sum() for p in params), torch.zeros(())).backward()
        optimizer.step()
    with pytest.raises(RuntimeError, match="accumulated into"):
        old.step()


def test_gradients_of_a_refused_step_are_let_go(device: str) -> None:
    import weakref

    optimizer = adamw(device)
    give_gradients(0, params_of(optimizer))
    optimizer.step()
    with pytest.raises(ValueError, match="total_norm"):
        optimizer.step(total_norm=1.0)
    grad = weakref.ref(params_of(optimizer)[0].grad)
    optimizer.zero_grad()
    assert grad() is None


def test_one_gradient_of_two_parameters_keeps_the_plan(device: str) -> None:
    params = parameters(device, (3,), (3,))
    optimizer = fusedopt.SGD(params)
    for p in params:
        p.grad = torch.ones(3, device=device) if p is params[0] else params[0].grad
    optimizer.step()
    plan = optimizer._plan
    optimizer.step()
    assert optimizer._plan is plan


def test_groups_share_a_threshold_after_loading(device: str) -> None:
    import copy

    params, limit = parameters(device, *SHAPES), torch.tensor(2.0, device=device)
    optimizer = fusedopt.SGD([{"params": [p], "skip_norm_above": limit} for p in params])
    saved = optimizer.state_dict()
    saved["param_groups"] = [copy.deepcopy(group) for group in saved["param_groups"]]
    optimizer.load_state_dict(saved)
    give_gradients(0, params)
    optimizer.step()
