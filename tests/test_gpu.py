"""What only a GPU can show: the compiled launch path, syncs, allocations, streams, capture, several devices."""

from typing import Any

import pytest
import torch
from table import RULES, RuleRow

import fusedopt
from fusedopt_kernels import launch

pytestmark = pytest.mark.gpu

SHAPES = ((3, 5), (), (0,), (16383,), (16384,), (50000,), (7, 11))


def parameters(device: str = "cuda") -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device)) for s in SHAPES]


def give_gradients(*sets: list[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for members in zip(*sets, strict=True):
        g = torch.randn(members[0].shape, generator=generator)
        for p in members:
            p.grad = g.to(p.device)


@pytest.mark.parametrize("row", RULES, ids=str)
def test_gpu_equals_cpu_eager_bit_for_bit(row: RuleRow) -> None:
    gpu, cpu = parameters(), parameters("cpu")
    on_gpu, on_cpu = row.cls(gpu, **row.options), row.cls(cpu, **row.options)
    for step in range(4):
        give_gradients(gpu, cpu, seed=step)
        on_gpu.step()
        on_cpu.step()
    for p, q in zip(gpu, cpu, strict=True):
        assert torch.equal(p.cpu(), q)
        assert all(torch.equal(on_gpu.state[p][k].cpu(), v) for k, v in on_cpu.state[q].items())


def test_steady_step_neither_syncs_nor_allocates_nor_compiles() -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(params)
    optimizer._launcher = launcher = launch.Launcher()
    for step in range(2):
        give_gradients(params, seed=step)
        optimizer.step()
    compiled = launcher.compiles
    grads = [[torch.randn_like(p) for p in params] for _ in range(3)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, new in enumerate(grads):
            for p, g in zip(params, new, strict=True):
                p.grad = g
            optimizer.param_groups[0]["lr"] = 1e-3 / (step + 1)
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert launcher.compiles == compiled and launcher.launches == 2 * 5


def test_captured_step_replays_with_live_tensor_lr() -> None:
    params, plain = parameters(), parameters()
    lr = torch.tensor(0.1, device="cuda")
    captured, ordinary = fusedopt.AdamW(params, lr=lr, capturable=True), fusedopt.AdamW(plain, lr=0.1)
    give_gradients(params, plain, seed=0)
    static = [p.grad for p in params]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    ordinary.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for step in range(1, 4):
        give_gradients(plain, seed=step)
        for g, q in zip(static, plain, strict=True):
            g.copy_(q.grad)
        lr.fill_(0.1 / step)
        ordinary.param_groups[0]["lr"] = lr.item()
        graph.replay()
        ordinary.step()
        assert all(torch.equal(p, q) for p, q in zip(params, plain, strict=True))


def test_warmup_leaves_nothing_to_compile() -> None:
    params = parameters()
    optimizer = fusedopt.AdamW(params)
    optimizer._launcher = launcher = launch.Launcher()
    count, seconds = optimizer.warmup()
    assert count == launcher.compiles == 2 and seconds > 0 and not optimizer.state
    give_gradients(params, seed=0)
    optimizer.step()
    assert launcher.compiles == 2


@pytest.mark.parametrize(
    "devices", [("cuda", "cpu"), pytest.param(("cuda:0", "cuda:1"), marks=pytest.mark.gpu(2))], ids="+".join
)
def test_two_devices_in_one_optimizer(devices: tuple[str, str]) -> None:
    params = [p for device in devices for p in parameters(device)]
    plain = [p for _ in devices for p in parameters("cpu")]
    optimizer, reference = fusedopt.AdamW(params), fusedopt.AdamW(plain)
    for step in range(3):
        give_gradients(params, plain, seed=step)
        optimizer.step()
        reference.step()
    assert all(torch.equal(p.cpu(), q) for p, q in zip(params, plain, strict=True))
