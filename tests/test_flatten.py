"""flatten_: where parameters lie, and that a step gives the bits that it gives for scattered parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_nets import Net, one_storage
from table import BASIC, DTYPES, RULES, RuleRow, dtype_for, private
from torch import nn

import fusedopt
from fusedopt import buffers
from fusedopt.flatten import bases
from fusedopt_kernels import launch, table

ADAMW = RULES[7]
BACKENDS = ("eager", "triton")
CHUNK = table.CHUNK


def test_parameters_are_aligned_views_of_one_buffer_per_dtype_and_stay_themselves(device: str) -> None:
    net = Net().to(device)
    net.linear.to(torch.bfloat16)
    net.linear.weight.requires_grad_(False)
    before = {name: (p, p.detach().clone(), p.stride(), p._version) for name, p in net.named_parameters()}
    fusedopt.flatten_(net.parameters())
    for name, p in net.named_parameters():
        same, values, stride, version = before[name]
        assert p is same and torch.equal(p, values) and p.stride() == stride and p.is_leaf, name
        assert p.data_ptr() % buffers.ALIGNMENT == 0 and p._version == version, name
    assert not net.linear.weight.requires_grad and net.linear.bias.requires_grad
    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    low = [net.linear.weight, net.linear.bias]
    assert one_storage(low) and one_storage([p for p in net.parameters() if p.dtype == torch.float32])
    assert len(bases(net.parameters())) == 2


def test_unusual_shapes_and_values_move(device: str) -> None:
    params = [
        nn.Parameter(t.to(device))
        for t in (
            torch.tensor([float("nan"), -0.0, float("inf")]),
            torch.empty(0, 3),
            torch.randn(3, 4).t(),
            torch.randn(2, 1, 3),
            torch.empty(0),
            torch.randn((), dtype=torch.float64),
            torch.randn(3, dtype=torch.complex64),
            torch.randn(3, dtype=torch.complex64).conj(),
            torch.randn(CHUNK + 1),
        )
    ]
    before = [(p.detach().clone(), p.stride()) for p in params]
    fusedopt.flatten_(params, grads=True)
    for p, (values, stride) in zip(params, before, strict=True):
        assert p.stride() == stride and p.data_ptr() % buffers.ALIGNMENT == 0
        torch.testing.assert_close(p.detach(), values, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(params[0][1])


@pytest.mark.parametrize("kind", ["tensors", "pairs", "groups", "optimizer"])
def test_takes_what_torch_optim_takes(kind: str) -> None:
    net = Net()
    half = list(net.parameters())[:3], list(net.parameters())[3:]
    groups = [{"params": half[0]}, {"params": half[1]}, {"params": net.scale}]
    makers: dict[str, Callable[[], Any]] = {
        "tensors": net.parameters,
        "pairs": net.named_parameters,
        "groups": lambda: groups,
        "optimizer": lambda: torch.optim.SGD(net.named_parameters(), lr=0.1).param_groups,
    }
    fusedopt.flatten_(makers[kind]())
    assert one_storage(list(net.parameters()))
    fusedopt.unflatten_(makers[kind]())
    assert not any(buffers.is_placed(p) for p in net.parameters())
    fusedopt.flatten_([])


@pytest.mark.parametrize("bad", [torch.zeros(3), [nn.Linear(1, 1)], [{"params": ["weight"]}]], ids=str)
def test_refuses_what_is_no_collection_of_tensors(bad: Any) -> None:
    with pytest.raises(TypeError, match="flatten_ and unflatten_ take"):
        fusedopt.flatten_(bad)


def test_flattening_again_moves_nothing_and_a_longer_list_moves_all(device: str) -> None:
    params = [nn.Parameter(torch.randn(5, device=device)) for _ in range(3)]
    fusedopt.flatten_(params[:2])
    addresses = [p.data_ptr() for p in params]
    fusedopt.flatten_(params[:2], grads=True)
    assert [p.data_ptr() for p in params] == addresses
    fusedopt.flatten_(params)
    assert one_storage(params) and params[0].data_ptr() != addresses[0]


def test_bases_are_the_buffers_and_see_the_parameters(device: str) -> None:
    params = [nn.Parameter(torch.randn(3, device=device)) for _ in range(4)]
    fusedopt.flatten_(params[:3])
    buffer, other = bases(params)
    assert other is params[3] and buffer.dim() == 1
    buffer.fill_(2.5)
    assert all(torch.equal(p, torch.full_like(p, 2.5)) for p in params[:3])
    fusedopt.unflatten_(params)
    assert all(x is y for x, y in zip(bases(params), params, strict=True))


SHAPES: tuple[tuple[int, ...], ...] = ((3, 5), (), (0,), (CHUNK + 1,), (7,), (2, 3, 4))


def two_sets(dtype: torch.dtype, device: str, grads: bool) -> tuple[list[Any], list[Any]]:
    scattered = [nn.Parameter(torch.randn(s, dtype=dtype, device=device)) for s in SHAPES]
    scattered.append(nn.Parameter(torch.randn(4, 6, dtype=dtype, device=device).t()))
    flat = [nn.Parameter(p.detach().clone()) for p in scattered]
    fusedopt.flatten_(flat, grads=grads)
    return scattered, flat


def assert_same_steps(row: RuleRow, dtype: torch.dtype, device: str, backend: str, grads: bool, **options: Any) -> None:
    scattered, flat = two_sets(dtype, device, grads)
    optimizers = [row.cls(params, **row.options, backend=backend) for params in (scattered, flat)]
    for optimizer in optimizers:
        if options:
            private(optimizer, **options)
    for step in range(3 if backend == "eager" else 2):  # the interpreter is slow
        for optimizer in optimizers:
            optimizer.zero_grad()
        for i, (p, q) in enumerate(zip(scattered, flat, strict=True)):
            if step != 1 or i % 3:  # a backward pass that does not reach every parameter
                weight = torch.randn_like(p)
                for x in (p, q):
                    (x * weight).sum().abs().backward()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(scattered, flat, strict=True):
            assert torch.equal(p, q) and buffers.is_placed(q) == (q.numel() > 0)
            assert (p.grad is None) == (q.grad is None)
            assert not grads or q.grad is None or not q.numel() or buffers.is_placed(q.grad)
            states = [opt.state.get(x, {}) for opt, x in zip(optimizers, (p, q), strict=True)]
            assert states[0].keys() == states[1].keys()
            assert all(torch.equal(states[0][k], v) for k, v in states[1].items())
    if backend == "triton" and optimizers[0]._tables[0].use.with_norm:
        headers = [optimizer._tables[0].header.tolist() for optimizer in optimizers]
        assert headers[0] == headers[1] and headers[0][table.NORM.value] > 0


@pytest.mark.parametrize("grads", [False, True], ids=["params", "grads"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [RULES[3], RULES[6], RULES[7]], ids=str)
def test_every_rule_gives_the_same_bits(row: RuleRow, backend: str, grads: bool, device: str) -> None:
    assert_same_steps(row, torch.float32, device, backend, grads)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose
def test_every_dtype_gives_the_same_bits(dtype: torch.dtype, backend: str, device: str) -> None:
    assert_same_steps(ADAMW, dtype, device, backend, True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BASIC)
def test_every_format_and_the_norm_give_the_same_bits(name: str, backend: str, device: str) -> None:
    assert_same_steps(ADAMW, dtype_for(BASIC[name]), device, backend, True, **BASIC[name])


def test_segments_are_not_merged(device: str) -> None:
    """Launches, chunk maps and rows are those of the scattered run, but for addresses and alignment."""
    records = []
    for params in two_sets(torch.float32, device, True):
        optimizer = private(ADAMW.cls(params, backend="triton"), clip_grad_norm=1.0)
        optimizer._launcher = recorder = launch.Recorder()
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        rows = optimizer._tables[0].rows.array.copy()
        addresses = [table.PARAM.value, table.STEP.value, table.FLAGS.value, table.SLOTS.value, table.SLOTS.value + 2]
        rows[:, addresses] = 0
        records.append(([(spec, grid) for spec, grid, _ in recorder.record], rows.tolist()))
    assert records[0] == records[1]
