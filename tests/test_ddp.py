"""Under DistributedDataParallel replicas stay equal in every bit, and equal to one process that has both batches.

Two processes, each running `one_rank` below over gloo.
"""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import distributed, nn

import fusedopt
from fusedopt_kernels import numerics

STEPS = 3
KINDS: tuple[dict[str, Any], ...] = ({}, {"gradient_as_bucket_view": True}, {"static_graph": True})
RANDOM = {"state_rounding": "stochastic", "clip_grad_norm": 0.5, "seed": 3}
CASES: tuple[tuple[torch.dtype, dict[str, Any]], ...] = (
    (torch.float32, {"clip_grad_norm": 0.5, "ema_decay": 0.9}),
    (torch.bfloat16, {"master_weights": "split8", "state_dtype": "int8", **RANDOM}),
    (torch.bfloat16, {"master_weights": "stochastic", "state_dtype": "bfloat16", **RANDOM}),
)
"""Dtype of the parameters, and options of AdamW."""


@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
def test_replicas_are_equal_in_every_bit(tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path)


def one_rank(store: str, rank: int) -> None:
    """What one of two processes checks."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for dtype, options in CASES:
        for kind in KINDS:
            _run(rank, dtype, {"backend": "eager", **options}, kind)
        if numerics.INTERPRETED:
            _run(rank, dtype, {"backend": "triton", **options}, KINDS[1])
    ranks.finish()


def _net(dtype: torch.dtype) -> nn.Module:
    """Rows that are whole groups of quantised state, rows that are none, biases of few elements."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 65)).to(dtype)


def _run(rank: int, dtype: torch.dtype, options: dict[str, Any], kind: dict[str, Any]) -> None:
    net = _net(dtype)
    alone = copy.deepcopy(net)
    wrapped = nn.parallel.DistributedDataParallel(net, **kind)
    optimizer = fusedopt.AdamW(net.named_parameters(), lr=1e-2, **options)
    single = fusedopt.AdamW(alone.named_parameters(), lr=1e-2, **options)
    for step in range(STEPS):
        batches = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        wrapped(batches[rank]).square().sum().backward()
        _as_one_process(alone, batches)
        optimizer.step()
        single.step()
    case = f"{dtype}, {options}, {kind}"
    for name, mine, other in zip(_names(optimizer), _bits(net, optimizer), _bits(alone, single), strict=True):
        theirs = mine.clone()
        distributed.broadcast(theirs, 0)
        assert torch.equal(mine, theirs), f"{name} differs between ranks: {case}"
        assert torch.equal(mine, other), f"{name} differs from one process's: {case}"


def _as_one_process(net: nn.Module, batches: torch.Tensor) -> None:
    """Gradients as DDP makes them: of each rank's batch divided by two, then added up."""
    halves = []
    for batch in batches:
        net.zero_grad()
        net(batch).square().sum().backward()
        halves.append([p.grad / 2 for p in net.parameters() if p.grad is not None])
    for p, a, b in zip(net.parameters(), *halves, strict=True):
        p.grad = a + b


def _names(optimizer: Any) -> list[str]:
    count = len(optimizer.param_groups[0]["params"])
    return [*(f"parameter {i}" for i in range(count)), *(f"{key} of {i}" for i, key in _keys(optimizer))]


def _keys(optimizer: Any) -> list[tuple[int, str]]:
    params = optimizer.param_groups[0]["params"]
    return [(i, key) for i, p in enumerate(params) for key in sorted(optimizer.state[p])]


def _bits(net: nn.Module, optimizer: Any) -> list[torch.Tensor]:
    params = list(net.parameters())
    tensors = [*(p.detach() for p in params), *(optimizer.state[params[i]][key] for i, key in _keys(optimizer))]
    return [t.contiguous().reshape(-1).view(torch.uint8) for t in tensors]


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(sys.argv[1], int(sys.argv[2]))
