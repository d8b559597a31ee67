"""What only a GPU can show of everything around the update: whole-step capture, GradScaler without syncs, averages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_gpu import give_gradients, parameters
from torch import Tensor

import fusedopt
from fusedopt_kernels import launch

pytestmark = pytest.mark.gpu

AROUND: list[dict[str, Any]] = [
    dict(clip_grad_norm=0.5),
    dict(clip_grad_norm=0.5, clip_norm_type=float("inf")),
    dict(clip_grad_norm=0.5, clip_norm_type=1.0, clip_scope="tensor"),
    dict(ema_decay=0.9, ema_warmup=True, skip_norm_above=1e9, l1=0.01),
    dict(metrics=("grad_norm", "update_ratio", "nonfinite_grads")),
]


def states(optimizer: Any) -> list[Tensor]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return [*params, *(v for p in params for v in optimizer.state[p].values())]


def warm(step: Callable[[], Any]) -> None:
    """Run on a side stream, as a capture needs it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("options", AROUND, ids=str)
def test_gpu_equals_cpu_eager(options: dict[str, Any]) -> None:
    """The norms may differ in their last bit; the rest given a norm does not, so thresholds are powers of two."""
    gpu, cpu = parameters(), parameters("cpu")
    on_gpu, on_cpu = fusedopt.AdamW(gpu, **options), fusedopt.AdamW(cpu, **options)
    for step in range(3):
        give_gradients(gpu, cpu, seed=step)
        on_gpu.step()
        on_cpu.step()
    for a, b in zip(states(on_gpu), states(on_cpu), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=4e-7, atol=1e-7)
    a, b = on_gpu.metrics(), on_cpu.metrics()
    assert a.keys() == b.keys()
    assert all(float(a[name]) == pytest.approx(float(b[name]), rel=1e-6) for name in a)


def test_steady_step_with_everything_neither_syncs_nor_allocates() -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(
        params, clip_grad_norm=1.0, skip_nonfinite=True, ema_decay=0.99, metrics=("grad_norm", "update_ratio")
    )
    optimizer._launcher = launcher = launch.Launcher()
    scaler = fusedopt.GradScaler("cuda", init_scale=4.0)
    scaler.scale(torch.ones((), device="cuda"))
    for step in range(2):
        give_gradients(params, seed=step)
        scaler.step(optimizer)
        scaler.update()
    new = [torch.randn_like(p) for p in params]
    torch.cuda.synchronize()
    compiled, launches = launcher.compiles, launcher.launches
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for p, g in zip(params, new, strict=True):
        p.grad = g
    torch.cuda.set_sync_debug_mode("error")
    try:
        scaler.step(optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert (launcher.compiles, launcher.launches - launches) == (compiled, 3)


def test_whole_step_capture_with_a_schedule() -> None:
    """PyTorch's recipe: gradients are allocated by the backward pass inside the capture."""
    torch.manual_seed(0)
    models = [
        torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.GELU(), torch.nn.Linear(65, 7)).cuda() for _ in "ab"
    ]
    models[1].load_state_dict(models[0].state_dict())
    captured, plain = (fusedopt.AdamW(m.parameters(), lr=0.01, clip_grad_norm=0.5, ema_decay=0.9) for m in models)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (captured, plain)]
    data = torch.randn(16, 33, device="cuda")

    def step(model: Any, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(data).square().mean().backward()
        optimizer.step()

    for _ in range(3):
        warm(lambda: step(models[0], captured))
        step(models[1], plain)
    captured.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(models[0], captured)
    for t in range(4):
        data.copy_(torch.randn(16, 33))
        for schedule in schedules:
            schedule.step()
        captured.refresh()
        graph.replay()
        step(models[1], plain)
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            assert torch.equal(p, q) and torch.equal(captured.state[p]["ema"], plain.state[q]["ema"]), t
    assert captured.metrics()["clipped_share"] == plain.metrics()["clipped_share"]


def test_a_captured_step_under_a_grad_scaler_reads_its_scale() -> None:
    params, plain = parameters(), parameters()
    captured, ordinary = (fusedopt.AdamW(members, lr=0.1, clip_grad_norm=1.0) for members in (params, plain))
    scaler = fusedopt.GradScaler("cuda", init_scale=4.0, growth_interval=1)
    scaler.scale(torch.ones((), device="cuda"))
    give_gradients(params, plain, seed=0)
    static = [p.grad for p in params]

    def scaled() -> None:
        scaler.step(captured)
        scaler.update()

    for g in static:
        g.mul_(4.0)
    warm(scaled)
    ordinary.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scaled()
    scale = 8.0
    for t in range(1, 4):
        give_gradients(plain, seed=t)
        for g, q in zip(static, plain, strict=True):
            g.copy_(q.grad).mul_(scale)
        graph.replay()
        scale *= 2.0
        ordinary.step()
        assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))
    static[0].fill_(torch.inf)
    before = [t.clone() for t in states(captured)]
    graph.replay()
    assert all(map(torch.equal, states(captured), before)) and scaler.get_scale() == scale / 2


def test_drop_in_clipping_equals_torchs() -> None:
    ours, theirs = parameters(), parameters()
    give_gradients(ours, theirs, seed=0)
    norm = fusedopt.clip_grad_norm_(ours, 0.5)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.5)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0.0)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=0.0)
