"""Gradient release under DistributedDataParallel and FSDP2: the bits of a step after backward, made in backward.

Three processes, each running `one_rank` below over gloo: a mean over three rounds, over two it would not.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import fusedopt
from fusedopt_kernels import numerics

WORLD, STEPS = 3, 3
SMALL = {"bucket_cap_mb": 0.02}
"""Several buckets."""
LOW = {"master_weights": "split8", "state_dtype": "int8", "state_rounding": "stochastic", "seed": 3}
ROUNDED = {"master_weights": "stochastic", "state_dtype": "bfloat16", "clip_grad_norm": 0.1, "clip_scope": "tensor"}
CASES: tuple[tuple[torch.dtype, dict[str, Any], dict[str, Any]], ...] = (
    (torch.float32, {"ema_decay": 0.9}, SMALL),
    (torch.float32, {}, {"gradient_as_bucket_view": True, **SMALL}),
    (torch.bfloat16, LOW, {"static_graph": True, **SMALL}),
    (torch.bfloat16, ROUNDED, {}),
)
"""Dtype of the parameters, options of AdamW and of DDP."""


@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
def test_buckets_are_updated_as_they_come(tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path, WORLD)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:.*")
def test_buckets_are_updated_in_stream_order(tmp_path: Path) -> None:
    """One process with NCCL: continuations are on streams of torch's, updates on one of ours."""
    ranks.agree(__file__, tmp_path, 1)


def one_gpu(store: str) -> None:
    """What a process with a GPU checks."""
    distributed.init_process_group("nccl", init_method=f"file://{store}", rank=0, world_size=1)
    for dtype, options, kind in CASES:
        _compare(0, Dense, dtype, options, kind, device="cuda")
    distributed.destroy_process_group()
    print("all ranks agree")


def one_rank(store: str, rank: int) -> None:
    """What one of the processes checks."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    for dtype, options, kind in CASES:
        _compare(rank, Dense, dtype, {"backend": "eager", **options}, kind)
    if numerics.INTERPRETED:
        _compare(rank, Parted, torch.bfloat16, {"backend": "triton", **LOW}, {"find_unused_parameters": True})
    for kind in ({}, {"gradient_as_bucket_view": True}):
        _compare(rank, Parted, torch.float32, {"backend": "eager"}, {"find_unused_parameters": True, **kind})
    _compare(rank, Dense, torch.float32, {"backend": "eager"}, {}, passes=2)
    _compare(rank, Deep, torch.bfloat16, {"backend": "eager", **LOW}, SMALL)
    _compare(rank, Embedded, torch.float32, {"backend": "eager", "sparse": "lazy"}, {})
    for dtype, options in ((torch.float32, {"clip_grad_norm": 0.1, "clip_scope": "tensor"}), (torch.bfloat16, LOW)):
        _sharded(rank, dtype, options)
    _an_own_group(rank)
    _others_are_left_alone(rank)
    text = (Path(fusedopt.__file__).parent / "docs" / "release_gradients.md").read_text()
    exec(compile(text.split("```python")[2].split("```")[0], "release_gradients.md", "exec"), {})
    _refusals()
    ranks.finish()


class Dense(nn.Module):
    """Rows that are whole groups of quantised state, rows that are none, a weight that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 65))
        self.turned = nn.Parameter(torch.randn(65, 4).t())

    def forward(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return self.layers(x) @ self.turned.t()


class Deep(nn.Module):
    """Many buckets, whose continuations come at once and in several threads."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(64 if i == 0 else 160, 160) for i in range(10)))

    def forward(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return torch.tanh(self.layers(x))


class Parted(nn.Module):
    """A part that all ranks use, one that only the first does, one that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(64, 5) for _ in range(3)])

    def forward(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return sum(part(x) for part in self.parts[: 2 if rank == 0 else 1])  # pyright: ignore[reportReturnType] # no 0


class Embedded(nn.Module):
    """Sparse gradients beside dense ones."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(9, 64, sparse=True), nn.Linear(64, 5)

    def forward(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return self.layer(self.table(torch.tensor([rank, rank + 1])) + x[:2])


def _compare(
    rank: int, net: Callable[[], nn.Module], dtype: torch.dtype, options: dict[str, Any], kind: dict[str, Any],
    passes: int = 1, device: str = "cpu",
) -> None:  # fmt: skip
    """Train with and without release; every bit must be the same, on every rank."""
    made = []
    for on in (False, True):
        torch.manual_seed(0)
        start = net().to(device, dtype)
        made.append(_trained(rank, start, {**options, "release_gradients": on}, kind, passes))
    case = f"{net}, {dtype}, {options}, {kind}, {passes} passes"
    for (name, plain), (other, mine) in zip(*map(_named_bits, made), strict=True):
        assert name == other, case
        theirs = mine.clone()
        distributed.broadcast(theirs, 0)
        assert torch.equal(mine, theirs), f"{name} differs between ranks: {case}"
        assert torch.equal(mine, plain), f"{name} is not that of a step after backward: {case}"


def _trained(rank: int, inner: nn.Module, options: dict[str, Any], kind: dict[str, Any], passes: int) -> Any:
    first = next(inner.parameters())
    model = DistributedDataParallel(inner, **kind)
    optimizer = fusedopt.AdamW(inner.named_parameters(), lr=1e-2, **options)
    if released := options["release_gradients"]:
        fusedopt.release_under_ddp(model, optimizer)
    for step in range(STEPS):
        torch.manual_seed(step)
        batches = torch.randn(passes, WORLD, 3, 64).to(first)
        for i in range(passes):
            with nullcontext() if i == passes - 1 else model.no_sync():
                model(batches[i, rank], rank).square().sum().backward()
        _step(optimizer, inner, released and not isinstance(inner, Parted | Embedded))
    return optimizer


def _step(optimizer: Any, net: nn.Module, done: bool) -> None:
    """Step; done: backward has updated everything, and gradients take no memory beside their buckets."""
    before = [p.detach().clone() for p in net.parameters()]
    if done:
        grads = [p.grad for p in net.parameters() if p.grad is not None]
        assert len({g.untyped_storage().data_ptr() for g in grads}) < len(grads) == len(before)
    optimizer.step()
    if done:
        assert all(map(torch.equal, before, net.parameters()))
    if optimizer._release is None:
        optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def _named_bits(optimizer: Any) -> list[tuple[str, torch.Tensor]]:
    named: list[tuple[str, torch.Tensor]] = []
    for i, p in enumerate(optimizer.param_groups[0]["params"]):
        tensors = {"parameter": p.detach(), **(optimizer.state[p] if p in optimizer.state else {})}
        named.extend((f"{key} of {i}", t.contiguous().reshape(-1).view(torch.uint8)) for key, t in tensors.items())
    return named


def _sharded(rank: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """FSDP2: gradients are reduced when their hooks run; shards are uneven, some empty."""
    shards: list[list[torch.Tensor]] = []
    for on in (False, True):
        torch.manual_seed(0)
        net = Dense().to(dtype)
        net.turned = nn.Parameter(net.turned.detach().contiguous())
        for part in (net.layers[0], net.layers[2], net):
            fully_shard(part)
        optimizer = fusedopt.AdamW(net.named_parameters(), backend="eager", release_gradients=on, **options)
        for _ in range(STEPS):
            net(torch.randn(WORLD, 3, 64).to(dtype)[rank], rank).square().sum().backward()
            if on:
                assert all(p.grad is None for p in net.parameters())
            optimizer.step()
            optimizer.zero_grad()
        tensors = [t for p in net.parameters() for t in (p.detach(), *optimizer.state[p].values())]
        shards.append([t.to_local() if isinstance(t, DTensor) else t for t in tensors])
    assert len(shards[0]) == len(shards[1]) > 0
    assert all(map(torch.equal, *shards)), f"shards are not those of a step after backward: {dtype}, {options}"


def _an_own_group(rank: int) -> None:
    """Means are over the model's process group, not over all processes."""
    groups = [distributed.new_group([0, 1]), distributed.new_group([2])]
    linear = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(linear.weight)
    model = DistributedDataParallel(linear, process_group=groups[rank // 2])
    optimizer = fusedopt.SGD(model.parameters(), lr=1.0, release_gradients=True)
    fusedopt.release_under_ddp(model, optimizer)
    model(torch.full((1, 2), float(rank))).sum().backward()
    assert torch.equal(linear.weight, torch.full((1, 2), -2.0 if rank == 2 else -0.5))
    optimizer.step()


def _others_are_left_alone(rank: int) -> None:
    """Two optimizers that release, one that steps after backward, one that is gone."""
    layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(4)])
    model = DistributedDataParallel(nn.Sequential(*layers))
    first, second, gone = (
        fusedopt.SGD(layer.parameters(), lr=1.0, release_gradients=True) for layer in (layers[0], layers[1], layers[3])
    )
    third = torch.optim.SGD(layers[2].parameters(), lr=1.0)
    fusedopt.release_under_ddp(model, first, second, gone)
    del gone
    before = [p.detach().clone() for p in layers.parameters()]
    model(torch.full((1, 3), 1.0 + rank)).sum().backward()
    changed = [not torch.equal(a, b) for a, b in zip(before, layers.parameters(), strict=True)]
    assert changed == [True] * 4 + [False] * 4
    grads = [p.grad for p in (*layers[2].parameters(), *layers[3].parameters())]
    for grad in grads:
        assert grad is not None
        theirs = grad.clone()
        distributed.broadcast(theirs, 0)
        assert torch.equal(grad, theirs)
    for optimizer in (first, second, third):
        optimizer.step()
    assert not torch.equal(before[4], layers[2].weight)


def _refusals() -> None:
    linear = nn.Linear(3, 3)
    optimizer = fusedopt.SGD(linear.parameters(), lr=1.0, release_gradients=True)
    before = linear.weight.detach().clone()
    model = DistributedDataParallel(linear)
    x = torch.ones(1, 3)
    with pytest.raises(RuntimeError, match=r"nothing was updated.*release_under_ddp"):
        model(x).sum().backward()
    optimizer.zero_grad()
    with pytest.raises(TypeError, match="must be a DistributedDataParallel, got Linear"):
        fusedopt.release_under_ddp(linear, optimizer)  # pyright: ignore[reportArgumentType] # what is tested
    model = DistributedDataParallel(linear)
    for wrong in ((), (optimizer, fusedopt.SGD(linear.parameters()))):
        with pytest.raises(ValueError, match="release_gradients=True"):
            fusedopt.release_under_ddp(model, *wrong)
    fusedopt.release_under_ddp(model, optimizer)
    optimizer = fusedopt.SGD(linear.parameters(), lr=1.0, release_gradients=True)
    fusedopt.release_under_ddp(model, optimizer)  # which takes the place of the one before
    other = DistributedDataParallel(nn.Linear(3, 3))
    other.register_comm_hook(None, default_hooks.allreduce_hook)
    with pytest.raises(RuntimeError, match="only be called once"):
        fusedopt.release_under_ddp(other, optimizer)
    with model.no_sync():
        model(x).sum().backward()
    with pytest.raises(RuntimeError, match=r"nothing was updated.*no_sync"):
        optimizer.step()
    assert torch.equal(linear.weight, before)
    optimizer.zero_grad()
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="a second gradient"):
        model(x).sum().backward()


if __name__ == "__main__":
    torch.set_num_threads(1)
    if int(sys.argv[3]) == 1:
        one_gpu(sys.argv[1])
    else:
        one_rank(sys.argv[1], int(sys.argv[2]))
