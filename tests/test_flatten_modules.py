"""flatten_ and unflatten_: modules keep working, and memory is given back."""

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from flat_nets import Net, assert_equal, assert_same_numbers, backward, grad, lay, one_storage, pair
from table import RULES
from torch import nn

import fusedopt
from fusedopt import buffers

ADAMW = RULES[7]
BACKENDS = ("eager", "triton")


@pytest.mark.parametrize("grads", [False, True], ids=["params", "grads"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_training_with_accumulation_ties_and_freezing(backend: str, grads: bool, device: str) -> None:
    nets = pair(device, grads)
    a, b = nets
    opts = [ADAMW.cls(net.parameters(), **ADAMW.options, backend=backend) for net in nets]
    for step in range(5):
        for net, opt in zip(nets, opts, strict=True):
            opt.zero_grad()
            net.linear.weight.requires_grad_(step not in (2, 3))
        for _ in range(1 + step % 2):
            backward(*nets)
        for opt in opts:
            opt.step()
        assert_equal(a, b, *opts)
        assert b.unused.grad is None and b.unused not in opts[1].state
        assert (b.linear.weight.grad is None) == (step in (2, 3))
        given = [p.grad for p in b.parameters() if p.grad is not None]
        assert one_storage(given) == grads
    assert b.head.weight is b.embedding.weight and one_storage(list(b.parameters()))


def test_moments_of_a_flattened_module_are_those_of_torch(device: str) -> None:
    """Against torch.optim itself, so that a fault common to both of our runs shows."""
    a, b = pair(device, grads=True)
    reference = torch.optim.AdamW(a.parameters(), lr=0.01)
    optimizer = fusedopt.AdamW(b.parameters(), lr=0.01)
    for _ in range(3):
        for opt in (reference, optimizer):
            opt.zero_grad()
        backward(a, b)
        for opt in (reference, optimizer):
            opt.step()
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*Profiler record function", "ignore:the compiler gave")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler uses its own old API
def test_a_compiled_step_over_a_flattened_module(device: str) -> None:
    torch._dynamo.reset()
    a, b = pair(device, grads=True)
    opts = [ADAMW.cls(net.parameters(), **ADAMW.options) for net in (a, b)]
    compiled = torch.compile(opts[1].step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        for opt in opts:
            opt.zero_grad()
        backward(a, b)
        opts[0].step()
        compiled()
        assert_equal(a, b, *opts)
    assert all(map(buffers.is_placed, b.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_that_share_memory_keep_sharing_it(backend: str, device: str) -> None:
    weight = torch.randn(3, 4, device=device)
    twins = [nn.Parameter(weight), nn.Parameter(weight), nn.Parameter(weight.t())]
    other = nn.Parameter(torch.randn(2, device=device))
    fusedopt.flatten_([*twins, other], grads=True)
    assert len({p.data_ptr() for p in twins}) == 1 and buffers.is_placed(twins[2])
    optimizer = RULES[0].cls([twins[0], other], lr=1.0, backend=backend)
    twins[0].grad = torch.ones(3, 4, device=device)
    optimizer.step()
    assert torch.equal(twins[2].t(), weight - 1) and torch.equal(twins[1], weight - 1)
    for p in twins:
        p.grad = None
        (2 * p).sum().backward()
    assert len({p.grad.data_ptr() for p in twins if p.grad is not None}) == 3  # gradients are never shared
    fusedopt.unflatten_([*twins, other])
    with torch.no_grad():
        twins[0][0, 1] = 7.0
    assert twins[1][0, 1] == 7.0 and twins[2][1, 0] == 7.0 and not buffers.is_placed(twins[0])


def test_state_dicts_go_both_ways(device: str) -> None:
    a, b = pair(device)
    other = Net().to(device)
    addresses = [p.data_ptr() for p in b.parameters()]
    b.load_state_dict(other.state_dict())
    assert [p.data_ptr() for p in b.parameters()] == addresses
    assert_equal(other, b)
    a.load_state_dict(b.state_dict())
    assert_equal(a, b)
    b.load_state_dict({k: v.clone() for k, v in a.state_dict().items()}, assign=True)
    assert not any(buffers.is_placed(p) for p in b.parameters())  # ordinary parameters, found out by the next step


def test_saving_a_part_stores_the_buffer_unless_cloned() -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(100, 100))
    fusedopt.flatten_(net.parameters())

    def size(value: Any) -> int:
        file = io.BytesIO()
        torch.save(value, file)
        return file.tell()

    part = net[0].state_dict()
    assert size(part) > 40_000 > 5_000 > size({k: v.clone() for k, v in part.items()})


@pytest.mark.parametrize("grads", [False, True], ids=["params", "grads"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_copies_of_a_module_are_independent(backend: str, grads: bool, device: str) -> None:
    _, b = pair(device, grads)
    backward(b)
    for duplicate in (copy.deepcopy(b), pickle.loads(pickle.dumps(b))):
        before = copy.deepcopy(b)
        assert_same_numbers(duplicate, b)
        assert duplicate.head.weight is duplicate.embedding.weight
        assert not any(buffers.is_placed(p) for p in duplicate.parameters())
        assert not {p.data_ptr() for p in duplicate.parameters()} & {p.data_ptr() for p in b.parameters()}
        optimizer = ADAMW.cls(duplicate.parameters(), lr=0.1, backend=backend)
        optimizer.zero_grad()
        backward(duplicate)
        optimizer.step()
        assert not torch.equal(duplicate.linear.weight, b.linear.weight)
        assert_same_numbers(before, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_optimizer_can_be_copied_and_flattened_in_mid_training(backend: str, device: str) -> None:
    a = Net().to(device)
    b = copy.deepcopy(a)
    opts = [ADAMW.cls(net.parameters(), **ADAMW.options, backend=backend) for net in (a, b)]
    for step in range(5):
        if step == 1:
            fusedopt.flatten_(opts[1].param_groups)
        if step == 2:
            fusedopt.flatten_(opts[1].param_groups, grads=True)
        if step == 3:
            b, opts[1] = copy.deepcopy((b, opts[1]))
        if step == 4:
            fusedopt.flatten_(b.parameters(), grads=True)
            fusedopt.unflatten_(b.parameters())
        for opt in opts:
            opt.zero_grad(set_to_none=step % 2 == 0)
        backward(a, b)
        for opt in opts:
            opt.step()
        assert_equal(a, b, *opts)


@pytest.mark.parametrize("change", ["double", "half and back", "channels first", "data", "assign"])
@pytest.mark.parametrize("grads", [False, True], ids=["params", "grads"])
def test_a_module_that_is_moved_or_cast_trains_on(change: str, grads: bool, device: str) -> None:
    """It is an ordinary module again, and the buffers are freed."""
    a, b = pair(device, grads)
    backward(a, b)
    buffer = weakref.ref(b.scale.untyped_storage())
    for net in (a, b):
        if change == "double":
            net.double()
        elif change == "half and back":
            net.half().float()
        elif change == "channels first":
            lay(net.conv, torch.contiguous_format)
        elif change == "data":
            net.linear.weight.data = net.linear.weight.data.clone() + 1
        else:
            net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)
    gc.collect()
    assert (buffer() is None) == (change in ("double", "half and back", "assign"))
    opts = [ADAMW.cls(net.parameters(), **ADAMW.options) for net in (a, b)]
    for _ in range(2):
        for net, opt in zip((a, b), opts, strict=True):
            opt.zero_grad()
            net.float() if change != "double" else net.double()
        images = torch.randn(2, 3, 5, 5, device=device, dtype=b.scale.dtype)
        tokens = torch.tensor([1, 4], device=device)
        for net, opt in zip((a, b), opts, strict=True):
            net(images, tokens).square().sum().backward()
            opt.step()
        assert_equal(a, b, *opts)


def test_a_released_gradient_buffer_is_freed_and_flattening_again_makes_another(device: str) -> None:
    p = nn.Parameter(torch.ones(3, device=device))
    fusedopt.flatten_([p], grads=True)
    (2 * p).sum().backward()
    buffer = weakref.ref(grad(p).untyped_storage())
    p.grad = None
    p.data = p.data.double()
    (2 * p).sum().backward()
    gc.collect()
    assert buffer() is None and grad(p).dtype == torch.float64 and not buffers.is_placed(grad(p))
    fusedopt.flatten_([p], grads=True)
    assert buffers.is_placed(grad(p)) and torch.equal(grad(p), torch.full_like(p, 2.0))
    assert p._post_accumulate_grad_hooks is not None and len(p._post_accumulate_grad_hooks) == 1


def test_unflatten_gives_back_memory(device: str) -> None:
    a, b = pair(device, grads=True)
    backward(a, b)
    buffer = [weakref.ref(t.untyped_storage()) for t in (b.scale, grad(b.scale))]
    fusedopt.unflatten_(b.parameters())
    gc.collect()
    assert [ref() for ref in buffer] == [None, None]
    assert_equal(a, b)
    assert all(p.untyped_storage().nbytes() == p.numel() * 4 for p in b.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in b.parameters())
    assert b.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_unflatten_leaves_others_alone() -> None:
    p, meta = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, device="meta"))
    address = p.data_ptr()
    fusedopt.unflatten_([p, meta])
    assert p.data_ptr() == address and p.grad is None
