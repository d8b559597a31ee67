"""Muon and Adafactor with formats of their weights, Muon with low-precision momentum."""

from typing import Any

import pytest
import torch
from format_cases import MASTERS, assert_same, both, give, parameters, params_of, step_both, tensors_of

import fusedopt

MATRICES = ((64, 64), (70, 100), (3, 5))


@pytest.mark.parametrize("weights", MASTERS)
def test_muon(weights: str, device: str) -> None:
    """Momenta are renewed before the products, so bits agree there; weights as far as the products do."""
    state = {"float32": "float8", "kahan": "int4", "split16": "bfloat16"}.get(weights, "int8")
    options: Any = dict(master_weights=weights, state_dtype=state, state_rounding="stochastic", ema_decay=0.5)
    pair = both(lambda p, **b: fusedopt.Muon(p, lr=0.02, **options, **b), device, torch.bfloat16, MATRICES)
    for step in range(2):
        give(step, *map(params_of, pair), all_of=True)
        for optimizer in pair:
            optimizer.step()
    assert_same(*pair)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_muons_random_numbers_go_on(backend: str, device: str) -> None:
    """The pass that writes weights draws by the count of the pass that renews momenta: other numbers at every step."""
    p = torch.nn.Parameter(torch.full((64, 64), 1.0, dtype=torch.bfloat16, device=device))
    optimizer = fusedopt.Muon([p], lr=1e-3, weight_decay=1.0, master_weights="stochastic", backend=backend)  # pyright: ignore[reportArgumentType] # one of the backends
    moved = []
    for _ in range(3):
        with torch.no_grad():
            p.fill_(1.0)
        p.grad = torch.zeros_like(p)
        optimizer.step()
        moved.append(p.detach() != 1.0)
    assert optimizer.state[p]["step"] == 3
    # 1 − 1e-3 lies between 1 and the bf16 number below it, 2⁻⁸ away: 0.256 of 4096 elements, ± 0.0068
    assert all(abs(float(x.float().mean()) - 0.256) < 5 * 0.0068 for x in moved)
    assert not torch.equal(moved[0], moved[1]) and not torch.equal(moved[1], moved[2])


@pytest.mark.long
@pytest.mark.parametrize("weights", MASTERS)
def test_adafactor(weights: str, device: str) -> None:
    options: Any = dict(master_weights=weights, ema_decay=0.5)
    shapes = (*MATRICES, (5, 16, 64), (7,), ())
    step_both(
        both(lambda p, **b: fusedopt.Adafactor(p, lr=0.05, **options, **b), device, torch.bfloat16, shapes), [0, 2]
    )


@pytest.mark.parametrize("rule", ["Muon", "Adafactor"])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_exact_weights_are_those_of_an_fp32_run(rule: str, backend: str, device: str) -> None:
    low, wide = parameters(device, torch.bfloat16, MATRICES), parameters(device, torch.bfloat16, MATRICES)
    wide = [torch.nn.Parameter(p.detach().float()) for p in wide]
    make = getattr(fusedopt, rule)
    ours, plain = make(low, lr=0.01, master_weights="float32", backend=backend), make(wide, lr=0.01, backend=backend)
    for step in range(2):
        give(step, low, all_of=True)
        for p, q in zip(low, wide, strict=True):
            assert p.grad is not None
            q.grad = p.grad.float()
        ours.step()
        plain.step()
    for x, q in zip(tensors_of(ours), wide, strict=True):
        assert torch.equal(x["master_param"], q.detach())
