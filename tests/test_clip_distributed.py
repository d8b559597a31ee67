"""`fusedopt.clip_grad_norm_` on DTensors: two processes, each running `one_rank` below over gloo."""

import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import distributed, nn


@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
def test_sharded_replicated_and_partial_gradients(tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path)


def test_one_process_and_the_compiler(tmp_path: Path) -> None:
    """A DTensor beside a plain tensor, in one graph."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    from fusedopt.clip import clip_grad_norm_

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for norm_type in (2.0, math.inf):
            torch._dynamo.reset()
            results = []
            for compiled in (False, True):
                params = []
                for place in (Shard(0), Replicate(), Partial()):
                    params.append(nn.Parameter(DTensor.from_local(torch.zeros(4, 2), mesh, [place])))
                    params[-1].grad = DTensor.from_local(torch.arange(8.0).reshape(4, 2), mesh, [place])
                params.append(nn.Parameter(torch.zeros(3)))
                params[-1].grad = torch.ones(3)

                def call(params: list[Any] = params, norm_type: float = norm_type) -> torch.Tensor:
                    return clip_grad_norm_(params, 0.5, norm_type)

                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    norm = torch.compile(call, fullgraph=True, backend="aot_eager")() if compiled else call()
                results.append([norm, *(p.grad.to_local() for p in params[:3]), params[3].grad])
            assert all(map(torch.equal, *results)) and type(results[0][0]) is torch.Tensor
    finally:
        distributed.destroy_process_group()


def one_rank(store: str, rank: int) -> None:
    """What one of two processes checks."""
    from torch.distributed.device_mesh import init_device_mesh

    from fusedopt import clip_tables

    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    line = init_device_mesh("cpu", (2,))
    grids = [init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")) for shape in ((2, 1), (1, 2))]
    for backend in ("eager", "triton") if clip_tables.LAUNCHER.accepts_cpu else ("eager",):
        clip_tables.BACKEND = backend
        for norm_type in (1.0, 2.0, math.inf):
            _one_mesh_equals_torch(line, norm_type)
            _many_meshes(line, grids, norm_type)
        _nan_reaches_every_rank(line, rank)
        _collectives(line, grids)
    ranks.finish()


def _full(n: int) -> list[torch.Tensor]:
    """The same on every rank: uneven shards, one that leaves a rank empty, several chunks."""
    generator = torch.Generator().manual_seed(n)
    return [torch.randn(shape, generator=generator) for shape in ((5, 3), (1, 4), (6,), (7, 3000))]


def _spread(full: torch.Tensor, mesh: Any, places: list[Any]) -> Any:
    """A parameter whose gradient is ``full`` in these placements; partial sums are unequal shares."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

    whole = [Replicate() if place.is_partial() else place for place in places]
    grad = distribute_tensor(full.clone(), mesh, whole)
    if whole != places:
        share = (0.25, 0.75)[distributed.get_rank()] if mesh.size(places.index(Partial())) == 2 else 1.0
        local = grad.to_local() * share
        grad = DTensor.from_local(local, mesh, places, shape=full.shape, stride=full.stride())
    p = nn.Parameter(torch.zeros_like(grad))
    p.grad = grad
    return p


def _check(params: list[Any], full: list[torch.Tensor], norm_type: float, limit: float = 0.5) -> None:
    from fusedopt.clip import clip_grad_norm_, get_total_norm

    exact = torch.linalg.vector_norm(torch.cat([t.reshape(-1) for t in full]).double(), norm_type)
    measured = get_total_norm([p.grad for p in params], norm_type)
    norm = clip_grad_norm_(params, limit, norm_type)
    assert type(norm) is torch.Tensor and norm.shape == () and torch.equal(norm, measured)
    torch.testing.assert_close(norm.double(), exact, rtol=2**-23, atol=0)
    other = norm.clone()
    distributed.broadcast(other, 0)
    assert torch.equal(norm, other)
    for p, whole in zip(params, full, strict=True):
        grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        torch.testing.assert_close(grad, (whole.double() * (limit / exact)).float(), rtol=1e-6, atol=1e-9)


def _one_mesh_equals_torch(mesh: Any, norm_type: float) -> None:
    """Gradients on one mesh, which torch takes too."""
    from torch.distributed.tensor import Shard

    from fusedopt.clip import clip_grad_norm_

    full = _full(0)[:1] + _full(0)[2:]  # no empty shard: torch's inf-norm refuses it
    ours, theirs = ([_spread(t, mesh, [Shard(0)]) for t in full] for _ in range(2))
    norm = clip_grad_norm_(ours, 0.5, norm_type)
    expected: Any = nn.utils.clip_grad_norm_(theirs, 0.5, norm_type)
    torch.testing.assert_close(norm, expected.full_tensor(), rtol=1e-5, atol=0)  # torch sums 21,000 numbers in fp32
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.grad.to_local(), q.grad.to_local(), rtol=1e-5, atol=0)
        assert p.grad._version and p.grad._local_tensor._version


def _many_meshes(line: Any, grids: list[Any], norm_type: float) -> None:
    """Every placement, three meshes and plain tensors at once."""
    from torch.distributed.tensor import Partial, Replicate, Shard

    kinds = [
        (line, [Shard(0)]), (line, [Replicate()]), (line, [Partial()]), (grids[0], [Shard(0), Shard(1)]),
        (grids[1], [Replicate(), Shard(0)]), (grids[0], [Partial(), Shard(0)]), (grids[1], [Shard(0), Partial()]),
    ]  # fmt: skip
    params: list[Any] = []
    full: list[torch.Tensor] = []
    for n, (mesh, places) in enumerate(kinds):
        for t in _full(n):
            if t.dim() >= len(places):
                full.append(t)
                params.append(_spread(t, mesh, places))
        plain = torch.full((3,), float(n))
        params.append(nn.Parameter(torch.zeros(3)))
        params[-1].grad = plain.clone()
        full.append(plain)
    _check(params, full, norm_type)


def _nan_reaches_every_rank(mesh: Any, rank: int) -> None:
    from torch.distributed.tensor import Shard

    from fusedopt.clip import clip_grad_norm_

    for norm_type in (1.0, 2.0, math.inf):
        p = _spread(torch.ones(4, 2), mesh, [Shard(0)])
        if rank == 1:
            p.grad.to_local()[0, 0] = math.nan
        assert clip_grad_norm_([p], 1.0, norm_type).isnan() and p.grad.to_local().isnan().all()


def _collectives(line: Any, grids: list[Any]) -> None:
    """One for every mesh and dim that shards something, whatever the number of tensors."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.debug import CommDebugMode

    from fusedopt.clip import get_total_norm

    params = [_spread(t, line, [Shard(0)]) for t in _full(0)] + [_spread(t, line, [Replicate()]) for t in _full(1)]
    more = [
        _spread(torch.ones(4, 6), grids[0], places) for places in ([Shard(0), Shard(1)], [Shard(1), Replicate()]) * 3
    ]
    for members, count in ((params, 1), (params[4:], 0), (more, 2), (params + more, 3)):
        with CommDebugMode() as seen:
            get_total_norm([p.grad for p in members])
        assert seen.get_total_counts() == count


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    one_rank(sys.argv[1], int(sys.argv[2]))
