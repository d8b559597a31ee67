"""Reading the averages of the weights, and a context in which the parameters hold them."""

import copy
from typing import Any

import pytest
import torch
from compare import BACKENDS, contents, give_gradients, parameters, params_of, train
from flat_nets import one_storage
from torch import nn

import fusedopt

SHAPES = ((33, 7), (5,), (), (0,))
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)

pytestmark = pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8).clone()


def trained(device: str, dtype: torch.dtype = torch.float32, backend: str = "eager") -> Any:
    """Three steps on; the last parameter is frozen and has changed since its average began."""
    params = parameters(device, *SHAPES, (4,), dtype=dtype)
    params[-1].requires_grad_(False)
    optimizer = fusedopt.AdamW(params, lr=0.1, ema_decay=0.75, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    for t in range(3):
        give_gradients(t, params[:-1])
        optimizer.step()
        params[-1].add_(1.0)
    return optimizer


# --------------------------------------------------------------------------------------------------------- reading
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_of_every_parameter_in_order(dtype: torch.dtype, device: str) -> None:
    """Before the first step they are the parameters; they are the state itself, not copies."""
    params = parameters(device, *SHAPES, dtype=dtype)
    counts = torch.zeros(3, dtype=torch.int64, device=device)
    groups = [{"params": params[:2], "ema_decay": 0.9}, {"params": [params[2], counts]}, {"params": params[3:]}]
    optimizer = fusedopt.SGD(groups, lr=0.1)
    with pytest.raises(RuntimeError, match="pass ema_decay"):
        fusedopt.SGD(params, lr=0.1).ema_parameters()
    assert [ema.shape for ema in optimizer.ema_parameters()] == [(33, 7), (5,)]
    optimizer = fusedopt.SGD([{"params": params[:2]}, {"params": [*params[2:], counts]}], lr=0.1, ema_decay=0.9)
    with torch.inference_mode():
        averages = optimizer.ema_parameters()
    for p, ema in zip(params, averages, strict=True):
        assert ema is optimizer.state[p]["ema"] and optimizer.state[p]["ema_step"] == 0
        assert torch.equal(ema.to(dtype), p) and ema is not p and not ema.requires_grad and not ema.is_inference()
    for t in range(3):
        give_gradients(t, params)
        optimizer.step()
    assert all(x is y for x, y in zip(averages, optimizer.ema_parameters(), strict=True))
    assert all(not torch.equal(ema, p) for ema, p in zip(averages, params, strict=True) if p.numel())


# ----------------------------------------------------------------------------------------------------------- swaps
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_hold_their_averages_inside_and_come_back(dtype: torch.dtype, backend: str, device: str) -> None:
    """In place, with their versions counted; the bits come back, and training goes on as if nothing had been."""
    optimizer, other = trained(device, dtype, backend), trained(device, dtype, backend)
    params = params_of(optimizer)
    before = [(bits(p), p.data_ptr(), p._version) for p in params]
    averages = [bits(ema) for ema in optimizer.ema_parameters()]
    with optimizer.swap_ema() as nothing:
        assert nothing is None
        for p, (was, address, version), ema in zip(params, before, optimizer.ema_parameters(), strict=True):
            assert torch.equal(p, ema.to(dtype)) and p.data_ptr() == address and p._version > version
            assert not p.numel() or not torch.equal(bits(p), was)
        inside = [p._version for p in params]
    for p, (was, address, _), version in zip(params, before, inside, strict=True):
        assert torch.equal(bits(p), was) and p.data_ptr() == address and p._version > version
    assert all(torch.equal(bits(ema), was) for ema, was in zip(optimizer.ema_parameters(), averages, strict=True))
    plan = optimizer._plan
    give_gradients(3, params[:-1], params_of(other)[:-1])
    for each in (optimizer, other):
        each.step()
    assert optimizer._plan is plan
    for (p, state), (q, theirs) in zip(contents(optimizer), contents(other), strict=True):
        assert torch.equal(p, q) and torch.equal(state["ema"], theirs["ema"])


def test_an_exception_inside_brings_the_weights_back(device: str) -> None:
    optimizer = trained(device)
    params = params_of(optimizer)
    params[0].detach().view(torch.int32).view(-1)[:2] = torch.tensor([0x7FC12345, -0x3DCBA9], dtype=torch.int32)
    before = [bits(p) for p in params]  # among them NaN with bits of its own
    with pytest.raises(ZeroDivisionError), optimizer.swap_ema():
        assert not torch.equal(bits(params[1]), before[1])
        _ = 1 / 0
    assert all(torch.equal(bits(p), was) for p, was in zip(params, before, strict=True))
    with optimizer.swap_ema():
        pass  # it may be entered again
    assert all(torch.equal(bits(p), was) for p, was in zip(params, before, strict=True))


def test_what_would_take_averages_for_weights_is_refused(device: str) -> None:
    """And the context goes on to bring the weights back."""
    optimizer = trained(device)
    saved = copy.deepcopy(optimizer.state_dict())
    before = [bits(p) for p in params_of(optimizer)]
    with optimizer.swap_ema():
        inside = [bits(p) for p in params_of(optimizer)]
        for name, action in (
            ("step", lambda: train([4], optimizer)),
            ("load_state_dict", lambda: optimizer.load_state_dict(saved)),
            ("swap_ema", lambda: optimizer.swap_ema().__enter__()),
            ("materialize_state", optimizer.materialize_state),
        ):
            with pytest.raises(RuntimeError, match=rf"{name}\(\) was called inside .*leave the context first"):
                action()
        assert all(torch.equal(bits(p), was) for p, was in zip(params_of(optimizer), inside, strict=True))
        assert optimizer.state_dict()["state"][0]["ema_step"] == 3
    assert all(torch.equal(bits(p), was) for p, was in zip(params_of(optimizer), before, strict=True))
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="pass ema_decay"), fusedopt.SGD(params_of(optimizer), lr=0.1).swap_ema():
        pass


def test_schedule_free_weights_are_not_exchanged_inside(device: str) -> None:
    optimizer = fusedopt.AdamWScheduleFree(parameters(device, (5,)), ema_decay=0.9, backend="eager")
    train(range(3), optimizer)
    before = bits(params_of(optimizer)[0])
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="leave the context first"):
        optimizer.eval()
    assert torch.equal(bits(params_of(optimizer)[0]), before)
    optimizer.eval()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.out = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.embed(x)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_flattened_and_tied_parameters_stay_so(backend: str, device: str) -> None:
    net = Tied().to(device)
    fusedopt.flatten_(net.parameters(), grads=True)
    optimizer = fusedopt.AdamW(net.parameters(), lr=0.1, ema_decay=0.75, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    x = torch.arange(6, device=device)
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    weights = [bits(p) for p in net.parameters()]
    plain = net(x)
    reference = copy.deepcopy(net)
    for p, ema in zip(reference.parameters(), optimizer.ema_parameters(), strict=True):
        p.data = ema.clone()
    with optimizer.swap_ema(), torch.inference_mode():
        assert net.out.weight is net.embed.weight and one_storage(list(net.parameters()))
        assert torch.equal(net(x), reference(x)) and not torch.equal(net(x), plain)
    assert all(torch.equal(bits(p), was) for p, was in zip(net.parameters(), weights, strict=True))
    assert torch.equal(net(x), plain) and one_storage(list(net.parameters()))


def test_parameters_that_share_memory_come_back(device: str) -> None:
    """Two parameters over the same numbers, which a step takes as long as only one has a gradient."""
    first = parameters(device, (5,))[0]
    second = nn.Parameter(first.detach())
    optimizer = fusedopt.SGD([first, second], lr=0.1, ema_decay=0.75)
    for t in range(3):
        give_gradients(t, [first])
        optimizer.step()
    before = bits(first)
    with optimizer.swap_ema():
        assert torch.equal(first, second) and not torch.equal(bits(first), before)
    assert torch.equal(bits(first), before)


def test_autograd_sees_the_exchange(device: str) -> None:
    """A graph made before the context must not run backward on averages."""
    optimizer = trained(device)
    p = params_of(optimizer)[0]
    loss = p.square().sum()
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
