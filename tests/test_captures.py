"""Captured steps: what is live in a replay, what `refresh` brings there, what a capture refuses.

A CUDA graph is imitated: launches made under a pretended capture are kept with the tensors they take, and a replay
runs them again. Tables have device memory of their own, as on a GPU; what a capture uploads, a replay uploads again.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from compare import give_gradients, parameters, params_of
from test_clip import grads_of
from test_review import ApartTable
from torch import Tensor

import fusedopt
from fusedopt import numbers, rows, upload
from fusedopt_kernels import launch

SHAPES = ((33, 7), (5,))


class Graph(launch.Launcher):
    """A launcher that can capture, and its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.captured: list[Callable[[], None]] = []
        self.capturing = False

    def run(self, spec: launch.KernelSpec, grid: int, args: tuple[Tensor, ...]) -> None:
        if self.capturing:
            self.captured.append(lambda: super(Graph, self).run(spec, grid, args))
        else:
            super().run(spec, grid, args)

    def replay(self) -> None:
        for node in self.captured:
            node()


@pytest.fixture
def graph(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[Graph]:
    if device != "cpu":
        pytest.skip("on a GPU graphs are real: test_gpu.py")  # listed there
    made = Graph()

    class Table(ApartTable):
        def upload(self) -> None:
            super().upload()
            if made.capturing:
                kept = self.tensor.clone()
                made.captured.append(lambda: upload_again(self.tensor, kept))

    for module in (rows, numbers):
        monkeypatch.setattr(module, "DeviceTable", Table)
    for name in ("stepper", "state", "upload", "numbers", "average", "parts"):
        monkeypatch.setattr(f"fusedopt.{name}.capturing", lambda: made.capturing)
    monkeypatch.setattr(upload, "reserve", lambda size: None)
    yield made


def upload_again(tensor: Tensor, kept: Tensor) -> None:
    tensor.copy_(kept)


def capture(graph: Graph, step: Callable[[], Any]) -> None:
    graph.capturing = True
    try:
        step()
    finally:
        graph.capturing = False


def pair(graph: Graph, device: str, **options: Any) -> tuple[Any, Any]:
    """An optimizer to capture and one to step as it should go, after one ordinary step of both."""
    captured = fusedopt.AdamW(parameters(device, *SHAPES), backend="triton", **options)
    plain = fusedopt.AdamW(parameters(device, *SHAPES), backend="triton", **options)
    captured._launcher = graph
    give_gradients(0, params_of(captured), params_of(plain))
    captured.step()
    plain.step()
    return captured, plain


def fill(t: int, *optimizers: Any) -> None:
    """New gradients where the old ones are."""
    for optimizer in optimizers:
        for i, p in enumerate(params_of(optimizer)):
            assert p.grad is not None
            p.grad.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * t + i)))


def same(a: Any, b: Any) -> bool:
    return all(map(torch.equal, params_of(a), params_of(b)))


CHANGES: dict[str, Any] = {
    "lr": lambda group: group.update(lr=0.5),
    "betas": lambda group: group.update(betas=(0.5, 0.75)),
    "weight_decay": lambda group: group.update(weight_decay=0.25),
    "clip_grad_norm": lambda group: group["fusedopt"].update(clip_grad_norm=0.125),
    "clip_grad_value": lambda group: group["fusedopt"].update(clip_grad_value=0.01),
    "skip_norm_above": lambda group: group["fusedopt"].update(skip_norm_above=1e-3),
    "ema_decay": lambda group: group["fusedopt"].update(ema_decay=0.5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_float_takes_effect_through_refresh(name: str, graph: Graph, device: str) -> None:
    options: dict[str, Any] = dict(clip_grad_norm=1.0, clip_grad_value=1.0, skip_norm_above=1e9, ema_decay=0.9)
    captured, plain = pair(graph, device, **options)
    fill(1, captured, plain)
    capture(graph, captured.step)
    plain.step()
    graph.replay()
    assert same(captured, plain)
    for optimizer in (captured, plain):
        CHANGES[name](optimizer.param_groups[0])
    fill(2, captured, plain)
    captured.refresh()
    plain.step()
    graph.replay()
    assert same(captured, plain)
    for p, q in zip(params_of(captured), params_of(plain), strict=True):
        assert all(torch.equal(captured.state[p][key], plain.state[q][key]) for key in captured.state[p])


def test_without_refresh_a_replay_keeps_what_it_had(graph: Graph, device: str) -> None:
    captured, plain = pair(graph, device)
    fill(1, captured, plain)
    capture(graph, captured.step)
    captured.param_groups[0]["lr"] = 0.5
    plain.step()
    graph.replay()
    assert same(captured, plain)


def test_tensors_and_the_loss_scale_are_live(graph: Graph, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fusedopt.captures._check", lambda *_: None)  # here the GPU's tensors are CPU tensors
    lr, limit = torch.tensor(0.1, device=device), torch.tensor(0.5, device=device)
    scale, found = torch.tensor(4.0, device=device), torch.tensor(0.0, device=device)
    captured, plain = pair(graph, device, lr=lr, clip_grad_norm=limit)
    captured.grad_scale, captured.found_inf = scale, found
    fill(1, captured, plain)
    for grad in grads_of(captured):
        grad.mul_(4.0)
    capture(graph, captured.step)
    plain.step()
    graph.replay()
    assert same(captured, plain)
    for tensor, value in ((lr, 0.5), (limit, 0.25), (scale, 8.0)):
        tensor.fill_(value)
    fill(2, captured, plain)
    for grad in grads_of(captured):
        grad.mul_(8.0)
    plain.step()
    graph.replay()
    assert same(captured, plain)
    found.fill_(1.0)
    graph.replay()
    assert same(captured, plain), "the replay was skipped"


def test_the_whole_step_recipe(graph: Graph, device: str) -> None:
    """Gradients are allocated inside the capture; steps outside it do not disturb what a replay reads."""
    captured, plain = pair(graph, device, clip_grad_norm=0.5)
    captured.zero_grad()
    static: list[Tensor] = [torch.zeros_like(p) for p in params_of(captured)]

    def whole() -> None:
        for p, grad in zip(params_of(captured), static, strict=True):
            p.grad = grad
        captured.step()

    capture(graph, whole)
    for t in range(3):
        give_gradients(t, params_of(plain), params_of(captured))
        for grad, q in zip(static, params_of(plain), strict=True):
            grad.copy_(q.grad)
        plain.step()
        graph.replay()
        assert same(captured, plain)
        if t == 1:  # an ordinary step, with gradients elsewhere
            captured.step()
            plain.step()
            assert same(captured, plain)
    assert captured.metrics()["skipped_steps"] == 0


def test_parameters_without_a_gradient_are_averaged_in_a_replay(graph: Graph, device: str) -> None:
    captured, plain = pair(graph, device, ema_decay=0.5)
    for optimizer in (captured, plain):
        params_of(optimizer)[1].grad = None
        optimizer.step()
    capture(graph, captured.step)
    for _ in range(3):
        graph.replay()
        plain.step()
    for a, b in zip(captured.ema_parameters(), plain.ema_parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_a_capture_refuses(graph: Graph, device: str) -> None:
    captured, _ = pair(graph, device, clip_grad_norm=1.0)
    with pytest.raises(RuntimeError, match="give it as a tensor on the GPU"):
        capture(graph, lambda: captured.step(total_norm=2.0))
    captured.param_groups[0]["lr"] = 0.25
    with pytest.raises(RuntimeError, match=r"call refresh\(\) on the optimizer"):
        capture(graph, captured.step)
    captured.refresh()
    capture(graph, captured.step)
    fresh = fusedopt.SGD(parameters(device, *SHAPES), backend="triton")
    fresh._launcher = graph
    give_gradients(0, params_of(fresh))
    with pytest.raises(RuntimeError, match="step once before the capture"):
        capture(graph, fresh.step)
    sparse = torch.nn.Parameter(torch.zeros(4, 2, device=device))
    sparse.grad = torch.ones(4, 2, device=device).to_sparse(1)
    rows_of = fusedopt.SGD([sparse], backend="triton")
    rows_of._launcher = graph
    rows_of.step()
    with pytest.raises(RuntimeError, match="a sparse gradient cannot be captured"):
        capture(graph, rows_of.step)


def test_refresh_refuses_what_a_replay_cannot_follow(graph: Graph, device: str) -> None:
    captured, _ = pair(graph, device)
    capture(graph, captured.step)
    captured.refresh()
    captured.param_groups[0]["maximize"] = True
    with pytest.raises(RuntimeError, match="capture the step again"):
        captured.refresh()


def test_refresh_without_a_change_uploads_nothing(graph: Graph, device: str) -> None:
    captured, _ = pair(graph, device)
    capture(graph, captured.step)
    table = captured._captures[0][1].tables[0].hypers.values
    before = table.uploads
    captured.refresh()
    assert table.uploads == before
    captured.param_groups[0]["lr"] = 0.25
    captured.refresh()
    captured.refresh()
    assert table.uploads == before + 1
