"""flatten_ beside torch.distributed."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from flat_nets import Net, assert_equal, assert_same_numbers, backward, one_storage
from table import RULES
from torch import nn

import fusedopt

ADAMW = RULES[7]


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    """One process of its own."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("grads", [False, True], ids=["params", "grads"])
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_distributed_data_parallel(late: bool, grads: bool, process_group: None) -> None:
    a = Net()
    b = copy.deepcopy(a)
    if not late:
        fusedopt.flatten_(b.parameters(), grads=grads)
    wrapped = [nn.parallel.DistributedDataParallel(net, find_unused_parameters=True) for net in (a, b)]
    if late:
        fusedopt.flatten_(b.parameters(), grads=grads)
    opts = [ADAMW.cls(net.parameters(), **ADAMW.options) for net in (a, b)]
    for step in range(4):
        for opt in opts:
            opt.zero_grad(set_to_none=step != 2)
        backward(*wrapped)
        for opt in opts:
            opt.step()
        assert_equal(a, b, *opts)
        assert one_storage([p.grad for p in b.parameters() if p.grad is not None]) == grads


def test_gradient_buckets_are_refused(process_group: None) -> None:
    a = Net()
    b, c = copy.deepcopy(a), copy.deepcopy(a)
    fusedopt.flatten_(b.parameters(), grads=True)
    fusedopt.flatten_(c.parameters())
    wrapped = [
        nn.parallel.DistributedDataParallel(net, find_unused_parameters=True, gradient_as_bucket_view=True)
        for net in (a, b, c)
    ]
    opts = [ADAMW.cls(net.parameters(), **ADAMW.options) for net in (a, b, c)]
    backward(*wrapped)
    for opt in opts:
        opt.step()
    assert_same_numbers(a, b)  # right until it is noticed
    assert_same_numbers(a, c)
    with pytest.raises(RuntimeError, match="gradient_as_bucket_view=True"):
        opts[1].zero_grad()
    with pytest.raises(ValueError, match=r"'scale': it is .*gradient_as_bucket_view=True"):
        fusedopt.flatten_(c.named_parameters(), grads=True)
    opts[2].zero_grad()  # parameters alone go together with buckets


def test_a_real_dtensor_is_refused(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    p = nn.Parameter(distribute_tensor(torch.ones(4, 2), init_device_mesh("cpu", (1,))))
    with pytest.raises(ValueError, match="'w': it is a DTensor"):
        fusedopt.flatten_([("w", p)])
