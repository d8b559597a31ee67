"""Steps with formats as a run has them: captured, steady, first and empty ones, and compiled ahead."""

from typing import Any

import pytest
import torch
from format_cases import (
    FEW,
    FORMATS,
    SHAPES,
    assert_same,
    each_backend,
    each_format,
    give,
    parameters,
    params_of,
    placed,
    same,
    snapshot,
    tensors_of,
    unchanged,
)
from test_captures import Graph, capture, graph  # noqa: F401 # a fixture
from test_steady import Model

import fusedopt
from fusedopt_kernels import launch

AdamW: Any = fusedopt.AdamW


@each_format
def test_captured_steps(name: str, graph: Graph, device: str) -> None:  # noqa: F811 # the fixture
    """A replay draws new numbers at each step and gives the bits of ordinary ones."""
    captured, plain = (AdamW(parameters(device, torch.bfloat16, FEW), **FORMATS[name], backend="triton") for _ in "ab")
    captured._launcher = graph
    for optimizer in (captured, plain):
        give(0, params_of(optimizer), all_of=True)
        optimizer.step()
    capture(graph, captured.step)
    for step in (1, 2):
        give(step, params_of(plain), all_of=True)
        for p, q in zip(params_of(captured), params_of(plain), strict=True):
            assert p.grad is not None and q.grad is not None
            p.grad.copy_(q.grad)
        graph.replay()
        plain.step()
        assert_same(captured, plain)
    key = next(key for key in captured.state[params_of(captured)[0]] if key != "step")
    del captured.state[params_of(captured)[0]][key]
    with pytest.raises(RuntimeError, match="step once before the capture"):
        capture(graph, captured.step)


@each_format
def test_a_steady_step_does_nothing_else(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator of torch but its label, no byte, no upload; where gradients moved, their addresses."""
    for moves in (False, True):
        model = Model(device, 3, 1, **FORMATS[name], clip_grad_norm=1.0)
        model.params[:] = parameters(device, torch.bfloat16, [(64, 64), (70, 100), (3,)])
        model.sets = [[torch.ones_like(p) for p in model.params] for _ in range(2)]
        model.optimizer.param_groups[0]["params"] = model.params
        names, allocated, launches, uploaded = model.seen(model.optimizer.step, moves, monkeypatch)
        assert set(names) == {"_record_function_enter_new", "_record_function_exit"} and allocated == 0
        assert len(launches) <= 2 + 3 and uploaded == (8 * 3 if moves else 0)


@each_backend
@each_format
def test_materialized_state_is_that_of_a_first_step(name: str, backend: str, device: str) -> None:
    ours, plain = (AdamW(parameters(device, torch.bfloat16), **FORMATS[name], backend=backend) for _ in range(2))
    params = params_of(ours)
    params[1].data = placed(params[1], "transposed").data
    params[1].data = params[1].detach().contiguous()
    before = [p.detach().clone() for p in params]
    ours.materialize_state()
    made = [set(ours.state[p]) for p in params]
    assert all(map(same, params, before))
    for optimizer in (ours, plain):
        give(0, params_of(optimizer), all_of=True)
        optimizer.step()
    assert_same(ours, plain)
    assert [set(ours.state[p]) for p in params] == made


@pytest.mark.parametrize("stepped", [False, True], ids=["new", "stepped"])
def test_warmup_compiles_every_variant(stepped: bool, device: str) -> None:
    """Quantised state needs parameters of some size: also the stand-ins that are compiled for have it."""
    for name, shapes in (("split8 int8", SHAPES), ("stochastic int4", FEW), ("masters", [(3, 3), (64, 64)])):
        optimizer = AdamW(parameters(device, torch.bfloat16, shapes), **FORMATS[name], backend="triton")
        optimizer._launcher = launch.Recorder()
        give(0, params_of(optimizer), all_of=True)
        if stepped:
            optimizer.step()
            optimizer._launcher, optimizer._plan = launch.Recorder(), None
        before = snapshot(optimizer)
        ready, _ = optimizer.warmup()
        assert unchanged(optimizer, before) and ready == optimizer._launcher.compiles
        optimizer.step()
        assert optimizer._launcher.compiles == ready and {s.name for s, _, _ in optimizer._launcher.record}


@each_backend
@each_format
def test_lr_zero_and_zero_gradients_leave_every_weight(name: str, backend: str, device: str) -> None:
    """Also the second time, on state that is there, and after real steps; residuals and masters too."""
    optimizer = AdamW(
        parameters(device, torch.bfloat16, FEW), lr=0.1, weight_decay=0.1, **FORMATS[name], backend=backend
    )
    keys = ("parameter", "param_residual", "master_param")
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 0.0
        before = snapshot(optimizer)
        for p in params_of(optimizer):
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for x, y in zip(tensors_of(optimizer), before, strict=True):
            assert all(same(x[key], y[key]) for key in keys if key in y)
            assert not any(t.isnan().any() for t in x.values())
        optimizer.param_groups[0]["lr"] = 0.1
        give(step, params_of(optimizer), all_of=True)
        optimizer.step()
