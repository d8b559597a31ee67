"""A train step under torch.compile, forward, backward and update together: the numbers of the ordinary one."""

from typing import Any

import pytest
import torch
import trainer_page
from compare import assert_equal
from torch import nn
from torch._dynamo.utils import counters

import fusedopt

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Profiler record function"),  # torch's own hook around step
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # torch's compiler uses its own old API
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # of torch's own step too
    pytest.mark.filterwarnings("ignore:the compiler gave"),  # aot_eager always hands over copies
]


def test_a_compiled_train_step_equals_the_ordinary_one_at_every_learning_rate(device: str) -> None:
    """The schedule changes the learning rate at each step and recompiles nothing."""
    torch._dynamo.reset()
    counters.clear()
    runs, graphs = [], []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
        optimizer = fusedopt.AdamW(model.named_parameters(), lr=1e-2, clip_grad_norm=0.5, ema_decay=0.9)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 6)

        def train_step(x: torch.Tensor, model: Any = model, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (5.0 * model(x)).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        step: Any = torch.compile(train_step, backend="aot_eager") if compiled else train_step
        losses = []
        for i in range(6):
            losses.append(step(torch.randn(4, 6, generator=torch.Generator().manual_seed(i)).to(device)).item())
            schedule.step()
            graphs.append(counters["stats"]["unique_graphs"])
        runs.append((losses, optimizer))
    (losses, optimizer), (ordinary, other) = runs
    assert losses == ordinary and len(set(losses)) == 6
    assert_equal(optimizer, other)
    assert graphs[0] > 0 and len(set(graphs[1:])) == 1


def test_the_page_runs() -> None:
    torch._dynamo.reset()
    assert all(float(state["step"]) == 3.0 for state in trainer_page.run("torch.compile")["optimizer"].state.values())
