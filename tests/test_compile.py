"""torch.compile(opt.step, fullgraph=True): one graph per state of affairs, none per learning rate."""

import warnings
from typing import Any

import pytest
import torch
from table import RULES, RuleRow
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch._inductor import config as inductor

import fusedopt
from fusedopt import layout

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Profiler record function"),  # torch's own hook around step
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # torch's compiler uses its own old API
]


def pair(row: RuleRow, device: str, **options: Any) -> tuple[Any, Any, list[Any], list[Any]]:
    """A compiled and an ordinary optimizer over equal parameters."""
    ps = [torch.nn.Parameter(torch.randn(5, 3, device=device)) for _ in range(3)]
    qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
    return row.cls(ps, **row.options, **options), row.cls(qs, **row.options, **options), ps, qs


@pytest.mark.filterwarnings("ignore:the compiler gave")  # aot_eager always hands over copies
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@pytest.mark.parametrize("row", [RULES[0], RULES[1], RULES[6], RULES[7]], ids=str)
def test_compiled_step_equals_the_ordinary_one_and_lr_recompiles_nothing(
    row: RuleRow, compiler: str, device: str
) -> None:
    torch._dynamo.reset()
    counters.clear()
    optimizer, plain, ps, qs = pair(row, device)
    step = torch.compile(optimizer.step, fullgraph=True, backend=compiler)
    graphs = []
    for i in range(12):
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.param_groups[0]["lr"] = plain.param_groups[0]["lr"] = 0.1 / (i + 1)
        step()
        plain.step()
        graphs.append(counters["stats"]["unique_graphs"])
        for p, q in zip(ps, qs, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(optimizer.state[p][k], v) for k, v in plain.state[q].items())
    assert graphs[1] <= 2 and len(set(graphs[1:])) == 1


def test_inductor_hands_over_the_tensors_themselves(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies would cost a pass over the model; warnings are errors here, so one copy fails the test."""
    monkeypatch.setattr(layout, "_announced", set())
    torch._dynamo.reset()
    optimizer, _, ps, _ = pair(RULES[7], device)
    step = torch.compile(optimizer.step, fullgraph=True)
    # caches on disk do not tell views from whole tensors: a graph of another test's flattened ones was taken
    cold = functorch.patch(enable_autograd_cache=False), inductor.patch(fx_graph_cache=False)
    with cold[0], cold[1], warnings.catch_warnings():
        warnings.filterwarnings("error", message="the compiler gave")
        for _ in range(3):
            for p in ps:
                p.grad = torch.randn_like(p)
            step()
    assert optimizer.state[ps[0]]["step"] == 3


@pytest.mark.filterwarnings("ignore:the compiler gave")
def test_gradients_changed_inside_the_graph_are_used(device: str) -> None:
    """A value that exists only inside the compiled region reaches the step."""
    torch._dynamo.reset()
    optimizer, plain, ps, qs = pair(RULES[7], device)

    def halve_and_step(opt: Any, params: list[Any]) -> None:
        for p in params:
            p.grad.mul_(0.5)
        opt.step()

    compiled = torch.compile(lambda: halve_and_step(optimizer, ps), fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        compiled()
        halve_and_step(plain, qs)
        assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.filterwarnings("ignore:the compiler gave")  # the first step, which has no plan yet, hands over copies
def test_flattened_parameters_hand_over_their_buffer(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    optimizer, plain, ps, qs = pair(RULES[7], device)
    fusedopt.flatten_(ps)
    step = torch.compile(optimizer.step, fullgraph=True)
    for i in range(4):
        if i == 2:
            monkeypatch.setattr(layout, "warn_once", lambda kind, message: pytest.fail(message))
        for p, q in zip(ps, qs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        step()
        plain.step()
        assert all(torch.equal(p, q) for p, q in zip(ps, qs, strict=True))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, of its own step too
@pytest.mark.filterwarnings("ignore:the compiler gave")
@pytest.mark.parametrize("options", [{}, dict(clip_grad_norm=0.5, ema_decay=0.9, metrics=("update_ratio",))], ids=str)
def test_a_compiled_train_step_breaks_no_graph_that_torchs_does_not(options: dict[str, Any], device: str) -> None:
    breaks = []
    for cls, chosen in ((torch.optim.AdamW, {}), (fusedopt.AdamW, options)):
        torch._dynamo.reset()
        counters.clear()
        model = torch.nn.Linear(5, 3, device=device)
        optimizer: Any = cls(model.parameters(), **chosen)

        def train_step(x: torch.Tensor, model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        step = torch.compile(train_step, backend="aot_eager")
        for _ in range(3):
            step(torch.ones(2, 5, device=device))
        breaks.append(sum(counters["graph_break"].values()))
    assert breaks[1] <= breaks[0]
