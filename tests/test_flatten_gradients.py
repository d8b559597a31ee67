"""flatten_(grads=True): every way in which gradients come and go."""

from typing import Any

import pytest
import torch
from flat_nets import assert_equal, backward, grad, pair
from table import RULES
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt import buffers

ADAMW = RULES[7]
BACKENDS = ("eager", "triton")


@pytest.mark.parametrize("how", ["optimizer", "zeros", "module", "none"])
def test_every_way_to_clear_gradients(how: str, device: str) -> None:
    a, b = pair(device, grads=True)
    opts = [ADAMW.cls(net.parameters(), **ADAMW.options) for net in (a, b)]
    addresses = set()
    for _ in range(4):
        for net, opt in zip((a, b), opts, strict=True):
            if how == "optimizer":
                opt.zero_grad()
            elif how == "zeros":
                opt.zero_grad(set_to_none=False)
            elif how == "module":
                net.zero_grad()
            else:
                for p in net.parameters():
                    p.grad = None
        backward(a, b)
        for net, opt in zip((a, b), opts, strict=True):
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)  # leaves alone what has no gradient
            opt.step()
        assert_equal(a, b, *opts)
        addresses.add(tuple(p.grad.data_ptr() for p in b.parameters() if p.grad is not None))
    assert len(addresses) == 1


def test_a_negative_zero_stays_negative(device: str) -> None:
    p = nn.Parameter(torch.ones(3, device=device))
    fusedopt.flatten_([p], grads=True)
    (p * -0.0).sum().backward()
    assert buffers.is_placed(grad(p)) and torch.signbit(grad(p)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_written_by_hand_are_used(backend: str, device: str) -> None:
    """Assigned (used where it is), written in place without a backward pass, and accumulated onto."""
    a, b = ([nn.Parameter(torch.ones(3, device=device)) for _ in range(2)] for _ in range(2))
    fusedopt.flatten_(b, grads=True)
    opts = [ADAMW.cls(params, **ADAMW.options, backend=backend) for params in (a, b)]
    for p in (*a, *b):
        p.grad = torch.full_like(p, 3.0)
    assert not buffers.is_placed(grad(b[0]))
    for step in range(4):
        for params, opt in zip((a, b), opts, strict=True):
            if step == 1:
                (params[0] * 2).sum().backward()
            if step == 2:
                opt.zero_grad(set_to_none=False)
                grad(params[1]).copy_(torch.arange(3.0))
            if step == 3:
                opt.zero_grad()
                params[0].grad = torch.tensor([1.0, -1.0, 0.5], device=device)
            opt.step()
        for p, q in zip(a, b, strict=True):
            assert torch.equal(p, q)
            assert all(torch.equal(opts[0].state[p][k], v) for k, v in opts[1].state[q].items())


class CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_zeros_are_written_by_one_fill_and_only_to_the_optimizers_own(device: str) -> None:
    params = [nn.Parameter(torch.ones(3, device=device)) for _ in range(20)]
    fusedopt.flatten_(params, grads=True)
    whole, half = (RULES[0].cls(ps, lr=0.1) for ps in (params, params[:10]))

    def zeroing(optimizer: Any) -> list[str]:
        torch.stack([p.sum() for p in params]).sum().backward()
        with CountOps() as ops:
            optimizer.zero_grad(set_to_none=False)
        return [name for name in ops.names if "zero" in name]

    assert zeroing(whole) == ["zero_"]
    assert not any(grad(p).any() for p in params)
    versions = [grad(p)._version for p in params]
    whole.zero_grad(set_to_none=False)
    assert all(grad(p)._version > v for p, v in zip(params, versions, strict=True))
    assert zeroing(half) == ["_foreach_zero_"]
    assert not any(grad(p).any() for p in params[:10]) and all(grad(p).all() for p in params[10:])


def test_the_profiler_label_is_torchs(device: str) -> None:
    p = nn.Parameter(torch.ones(3, device=device))
    fusedopt.flatten_([p], grads=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        RULES[0].cls([p], lr=0.1).zero_grad()
    assert [event.key for event in profile.key_averages()].count("Optimizer.zero_grad#SGD.zero_grad") == 1


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_gradients_that_cannot_be_placed_stay_where_they_are(device: str) -> None:
    p, q = nn.Parameter(torch.ones(3, device=device)), nn.Embedding(4, 2, sparse=True, device=device)
    fusedopt.flatten_([p, *q.parameters()], grads=True)
    (p.square().sum()).backward(create_graph=True)
    assert grad(p).requires_grad
    p.grad = None
    q(torch.tensor([1, 1], device=device)).sum().backward()
    assert grad(q.weight).is_sparse
    optimizer = RULES[0].cls([p, *q.parameters()], lr=0.1)
    optimizer.zero_grad(set_to_none=False)
    assert grad(q.weight).to_dense().abs().sum() == 0
    optimizer.zero_grad()
    assert q.weight.grad is None


def test_gradients_in_another_dtype_have_their_own_buffer(device: str) -> None:
    a, b = (nn.Parameter(torch.ones(3, device=device)) for _ in range(2))
    for p in (a, b):
        p.grad_dtype = torch.bfloat16
    fusedopt.flatten_([b], grads=True)
    opts = [RULES[1].cls([p], lr=0.1, momentum=0.9) for p in (a, b)]
    for _ in range(2):
        for p, opt in zip((a, b), opts, strict=True):
            opt.zero_grad()
            (p * 0.3).sum().backward()
            opt.step()
        assert torch.equal(a, b) and grad(b).dtype == torch.bfloat16 and buffers.is_placed(grad(b))
