"""Gradient release: the same bits as a step after backward, gradients freed one by one, and what is refused."""

import copy
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import BACKENDS, assert_equal
from table import RULES, RuleRow

import fusedopt

RELEASED = tuple({row.name: row for row in RULES}.values())
"""One row of every rule."""
LOW = [
    {"master_weights": "split8", "state_dtype": "int8"},
    {"master_weights": "stochastic", "state_dtype": "bfloat16", "state_rounding": "stochastic"},
    {"master_weights": "float32", "state_dtype": "int4", "ema_decay": 0.9},
    {"clip_grad_norm": 0.1, "clip_scope": "tensor", "cautious": True, "state_dtype": "float32"},
]


def network(device: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    layers = (
        torch.nn.Linear(64, 128),
        torch.nn.Tanh(),
        torch.nn.Linear(128, 70),
        torch.nn.Tanh(),
        torch.nn.Linear(70, 3),
    )
    return torch.nn.Sequential(*layers).to(device, dtype)


def loss_of(model: torch.nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    p = next(model.parameters())
    return model(torch.randn(8, 64, generator=generator).to(p.device, p.dtype)).float().square().mean()


def trained(cls: Any, model: torch.nn.Module, steps: range = range(3), optimizer: Any = None, **options: Any) -> Any:
    """The optimizer after some steps over the model."""
    optimizer = cls(model.parameters(), **options) if optimizer is None else optimizer
    for step in steps:
        loss_of(model, step).backward()
        if options.get("release_gradients"):
            assert all(p.grad is None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("row", RELEASED, ids=str)
def test_every_rule_steps_as_after_backward(row: RuleRow, device: str) -> None:
    options = {**row.options, "backend": "eager"}
    at_once, one_by_one = (trained(row.cls, network(device), release_gradients=on, **options) for on in (False, True))
    assert_equal(at_once, one_by_one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", LOW, ids=lambda o: next(iter(o.values())))
def test_formats_and_options_around_it(options: dict[str, Any], backend: str, device: str) -> None:
    made = [
        trained(
            fusedopt.AdamW, network(device, torch.bfloat16), release_gradients=on, backend=backend, lr=0.01, **options
        )
        for on in (False, True)
    ]
    assert_equal(*made)


def test_groups_schedules_and_named_parameters(device: str) -> None:
    made = []
    for on in (False, True):
        model = network(device, torch.bfloat16)
        named = list(model.named_parameters())
        groups = [{"params": named[:2], "lr": 0.1}, {"params": named[2:], "lr": 0.01, "master_weights": "stochastic"}]
        optimizer = fusedopt.AdamW(groups, backend="eager", release_gradients=on, state_dtype="float32")
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        for step in range(3):
            loss_of(model, step).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        made.append(optimizer)
    assert_equal(*made)


def test_gradients_never_exist_all_at_once(device: str) -> None:
    """Peak memory: of the gradients one is alive at a time, where backward leaves all of them otherwise."""
    model = network(device)
    optimizer = fusedopt.AdamW(model.parameters(), backend="eager", release_gradients=True)
    alive: set[int] = set()
    most = 0

    def count(p: torch.Tensor) -> None:
        nonlocal most
        assert p.grad is not None
        alive.add(id(p))
        weakref.finalize(p.grad, alive.discard, id(p))
        most = max(most, len(alive))

    for p in model.parameters():
        hook = optimizer._release._handles.pop(p)
        hook.remove()
        p.register_post_accumulate_grad_hook(count)  # runs first
    optimizer._release.attach()
    for step in range(2):
        loss_of(model, step).backward()
        optimizer.step()
    assert most == 1 and not alive


def test_state_is_saved_and_loaded(device: str) -> None:
    options: dict[str, Any] = dict(backend="eager", release_gradients=True, master_weights="split8", state_dtype="int8")
    model = network(device, torch.bfloat16)
    whole = trained(fusedopt.AdamW, model, range(4), **options)
    model = network(device, torch.bfloat16)
    saved = copy.deepcopy(trained(fusedopt.AdamW, model, range(2), **options).state_dict())
    resumed = fusedopt.AdamW(model.parameters(), **options)
    resumed.load_state_dict(saved)
    assert_equal(whole, trained(fusedopt.AdamW, model, range(2, 4), resumed, **options))


def test_gradients_set_by_hand_and_new_groups(device: str) -> None:
    p, q = (torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    optimizer = fusedopt.SGD([p], lr=1.0, backend="eager", release_gradients=True)
    optimizer.add_param_group({"params": [q], "lr": 0.5})
    (2.0 * q).sum().backward()
    p.grad = torch.ones_like(p)
    assert torch.equal(q, torch.zeros_like(q)) and q.grad is None
    optimizer.step()
    assert torch.equal(p, torch.zeros_like(p)) and p.grad is None
    assert torch.equal(q, torch.zeros_like(q))


def test_hooks_keep_no_optimizer_alive(device: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = fusedopt.SGD([p], backend="eager", release_gradients=True)
    p.sum().backward()
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    p.sum().backward()
    assert p.grad is not None  # nobody released it


def test_accumulation_is_refused_before_it_harms(device: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = fusedopt.SGD([p], lr=1.0, backend="eager", release_gradients=True)
    p.sum().backward()
    with pytest.raises(RuntimeError, match="second gradient"):
        p.sum().backward()
    assert torch.equal(p, torch.zeros_like(p))
    with pytest.raises(RuntimeError, match="frees every gradient"):
        optimizer.accumulate()
    optimizer.zero_grad()
    p.sum().backward()
    optimizer.step()
    assert torch.equal(p, -torch.ones_like(p))


@pytest.mark.parametrize("stock", [True, False])
def test_a_scaler_is_refused(stock: bool, device: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = fusedopt.SGD([p], backend="eager", release_gradients=True)
    scaler = (torch.amp.GradScaler if stock else fusedopt.GradScaler)(device)
    scaler.scale(p.sum()).backward()
    with pytest.raises(RuntimeError, match="leave the GradScaler out"):
        scaler.step(optimizer)


@pytest.mark.parametrize(
    "options",
    [
        {"clip_grad_norm": 1.0}, {"skip_nonfinite": True}, {"skip_norm_above": 3.0}, {"metrics": ("grad_norm",)},
        {"amp_scaling": True}, {"norm_at_backward": True, "clip_grad_norm": 1.0},
    ],
)  # fmt: skip
def test_what_needs_all_gradients_is_refused(options: dict[str, Any]) -> None:
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*at once"):
        fusedopt.AdamW([p], release_gradients=True, **options)
    with pytest.raises(ValueError, match="must be True or False"):
        fusedopt.AdamW([p], release_gradients=1)  # pyright: ignore[reportArgumentType] # what is tested
    optimizer = fusedopt.AdamW([p], release_gradients=True)
    with pytest.raises(ValueError, match="clip_grad_norm"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "clip_grad_norm": 1.0})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(RuntimeError, match="total_norm"):
        optimizer.step(total_norm=1.0)


def test_the_page_runs() -> None:
    text = (Path(fusedopt.__file__).parent / "docs" / "release_gradients.md").read_text()
    alone = text.split("```python")[1].split("```")[0]
    exec(compile(alone, "release_gradients.md", "exec"), {})


def test_a_constructor_costs_little() -> None:
    """Those who step in backward by hand make an optimizer for every parameter."""
    p, calls = torch.nn.Parameter(torch.ones(3)), 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event == "call"

    fusedopt.AdamW([p])
    sys.setprofile(count)
    try:
        fusedopt.AdamW([p])
    finally:
        sys.setprofile(None)
    assert calls <= 90  # 83 when this was written; torch's own makes 14
