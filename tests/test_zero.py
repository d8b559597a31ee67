"""ZeRO-1: `torch.distributed.optim.ZeroRedundancyOptimizer` around our classes has the bits of one process.

Two processes, each running `one_rank` below over gloo.
"""

import copy
import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from fusedopt_kernels import numerics

STEPS = 2
LOW = {"master_weights": "split8", "state_dtype": "int8"}
CASES: tuple[tuple[torch.dtype, dict[str, Any], bool, bool], ...] = (
    (torch.float32, {"ema_decay": 0.9, "clip_grad_value": 0.05}, False, False),
    (torch.bfloat16, {**LOW, "master_rounding": "nearest"}, False, True),
    (torch.bfloat16, {**LOW, "state_rounding": "stochastic", "seed": 3}, True, False),
)
"""Dtype of the parameters, options of AdamW, whether parameters have names, whether they lie in buckets."""


@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
def test_shares_of_a_model_are_updated_as_the_whole(tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path)


def one_rank(store: str, rank: int) -> None:
    """What one of two processes checks."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for dtype, options, named, view in CASES:
        _compare(rank, dtype, "eager", options, named, view)
    if numerics.INTERPRETED:
        _compare(rank, torch.bfloat16, "triton", CASES[1][1], False, False)
    for layers in (1, 3):
        _clipped(rank, layers)
    _released(rank)
    _refusals()
    ranks.finish()


def _net(dtype: torch.dtype, layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64, bias=i > 0) for i in range(layers))).to(dtype)


def _batches(step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(step)).to(dtype)


def _zero(params: Any, view: bool = False, whole: dict[str, Any] | None = None, **options: Any) -> Any:
    """whole: options of the whole optimizer, which may not be keys of a group, as ZeRO makes its keywords."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of torch's own TorchScript

    made: Any = functools.partial(fusedopt.AdamW, **({"backend": "eager"} if whole is None else whole))
    return ZeroRedundancyOptimizer(params, optimizer_class=made, parameters_as_bucket_view=view, lr=1e-2, **options)


def _groups(net: nn.Module, named: bool) -> list[Any]:
    """A group for each parameter, because ZeRO takes names in no other way; or one list."""
    if not named:
        return list(net.parameters())
    return [{"params": [p], "param_names": [name]} for name, p in net.named_parameters()]


def _compare(rank: int, dtype: torch.dtype, backend: str, options: dict[str, Any], named: bool, view: bool) -> None:
    """Some steps, all state by way of a consolidated state dict into a new optimizer, and as many steps."""
    net, alone = _net(dtype), _net(dtype)
    model = DistributedDataParallel(net)
    whole = {"backend": backend}
    optimizer = _zero(_groups(net, named), view, whole, **options)
    single = fusedopt.AdamW(_groups(alone, named), lr=1e-2, **whole, **options)
    for step in range(2 * STEPS):
        if step == STEPS:
            again = _zero(_groups(net, named), view, whole, **options)
            again.load_state_dict(_consolidated(optimizer, rank))
            optimizer = again
        model(_batches(step, dtype)[rank]).square().sum().backward()
        _one_process(alone, _batches(step, dtype))
        for each in (optimizer, single):
            each.step()
            each.zero_grad()
            for group in each.param_groups:
                group["lr"] *= 0.9
    saved = _consolidated(optimizer, rank)
    plain = fusedopt.AdamW(_groups(net, named), lr=1.0, **whole, **options)
    plain.load_state_dict(copy.deepcopy(saved))
    case = f"{dtype}, {whole}, {options}, {named}, {view}"
    for i, (p, q) in enumerate(zip(net.parameters(), alone.parameters(), strict=True)):
        assert torch.equal(p, q), f"parameter {i} differs from one process's: {case}"
        assert saved["state"][i].keys() == single.state[q].keys(), case
        for key, value in single.state[q].items():
            assert torch.equal(saved["state"][i][key], value), f"{key} of {i} differs from one process's: {case}"
    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
        p.grad = q.grad = torch.ones_like(p)
    for each in (plain, single):
        each.step()
    assert all(map(torch.equal, net.parameters(), alone.parameters())), f"a plain optimizer goes on otherwise: {case}"


def _consolidated(optimizer: Any, rank: int) -> dict[str, Any]:
    """The state dict of all ranks, as rank 0 would save it."""
    optimizer.consolidate_state_dict(0)
    box = [copy.deepcopy(optimizer.state_dict()) if rank == 0 else None]
    distributed.broadcast_object_list(box, 0)
    assert box[0] is not None
    return box[0]


def _one_process(net: nn.Module, batches: torch.Tensor) -> None:
    """Gradients as DDP makes them: of each rank's batch divided by two, then added up."""
    halves = []
    for batch in batches:
        net.zero_grad()
        net(batch).square().sum().backward()
        halves.append([p.grad / 2 for p in net.parameters() if p.grad is not None])
    for p, a, b in zip(net.parameters(), *halves, strict=True):
        p.grad = a + b


def _clipped(rank: int, layers: int) -> None:
    """The norm is that of all ranks, one of which has no parameter where there is but one."""
    net, alone = _net(torch.float32, layers), _net(torch.float32, layers)
    model = DistributedDataParallel(net)
    options = {"clip_grad_norm": 0.1}
    whole = {"backend": "eager", "metrics": ["grad_norm"]}
    optimizer = _zero(net.parameters(), whole={**whole, "norm_group": distributed.group.WORLD}, **options)
    single = fusedopt.AdamW(alone.parameters(), lr=1e-2, **whole, **options)
    for step in range(2):
        model(_batches(step, torch.float32)[rank]).square().sum().backward()
        _one_process(alone, _batches(step, torch.float32))
        for each in (optimizer, single):
            each.step()
            each.zero_grad()
        if optimizer.optim.param_groups[0]["params"]:
            norms = [each.metrics()["grad_norm"] for each in (optimizer.optim, single)]
            torch.testing.assert_close(*norms, rtol=2e-7, atol=0.0)
        for p, q in zip(net.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def _released(rank: int) -> None:
    """A rank's share is updated in backward, then handed to the others."""
    made = []
    for on in (False, True):
        net = _net(torch.float32)
        model = DistributedDataParallel(net)
        optimizer = _zero(net.parameters(), whole={"release_gradients": on})
        if on:
            fusedopt.release_under_ddp(model, optimizer.optim)
        for step in range(2):
            model(_batches(step, torch.float32)[rank]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append(list(net.parameters()))
    assert all(map(torch.equal, *made))


def _refusals() -> None:
    net = _net(torch.float32)
    DistributedDataParallel(net)(_batches(0, torch.float32)[0]).square().sum().backward()
    for options in ({"clip_grad_norm": 1.0}, {"skip_nonfinite": True}, {"skip_norm_above": 3.0}):
        with pytest.raises(RuntimeError, match=r"this rank's piece .* norm_group="):
            _zero(net.parameters(), **options).step()
    with pytest.raises(ValueError, match="backend belongs to the whole optimizer"):
        _zero(net.parameters(), backend="eager")
    with pytest.raises(ValueError, match="no supported functional optimizer"):
        _zero(net.parameters(), overlap_with_ddp=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(sys.argv[1], int(sys.argv[2]))
