"""`fully_shard`: two processes train as one does, with its policies; what users call on such an optimizer."""

import copy
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, distributed, nn

import fusedopt
from fusedopt_kernels import numerics

STEPS = 20


@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
def test_two_ranks_train_as_one(tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path)


def one_rank(store: str, rank: int, world: int) -> None:
    """What one of two processes checks."""
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    mixed = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for backend in ("eager", "triton")[: 1 + numerics.INTERPRETED]:
        options = {"backend": backend, "clip_grad_norm": 0.5, "ema_decay": 0.9}
        _trains_as_one(rank, options, {}, 1e-5)
        _trains_as_one(rank, options, {"offload_policy": CPUOffloadPolicy(pin_memory=False)}, 1e-5)
        _trains_as_one(rank, options, {"mp_policy": mixed}, 0.05)
        _scalers(rank, backend)
        _stages(rank, backend)
        _beside_a_plain_parameter(rank, backend)
        _calls(rank, backend)
    ranks.finish()


def _net() -> Any:
    """Uneven rows, rows that one rank has none of, a frozen layer."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 33), nn.Tanh(), nn.Linear(33, 8), nn.Tanh(), nn.Linear(8, 1))
    net[2].bias.requires_grad_(False)
    return net


def _shard(net: Any, **policies: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, **policies)
    return fully_shard(net, **policies)


def _batch(step: int) -> Tensor:
    return torch.randn(2, 4, 16, generator=torch.Generator().manual_seed(step))


def _trains_as_one(rank: int, options: dict[str, Any], policies: dict[str, Any], bound: float) -> None:
    """Each rank's loss is a mean over its half; bound: largest difference, of the largest number of a tensor.

    Gradients are added up in another order, a few ulps of fp32 (of bf16 under that policy) for each of 20 steps, whose
    size is at most lr; Adam divides small gradients by their own size, which is why ulps of them show.
    """
    net = _net()
    sharded = _shard(copy.deepcopy(net), **policies)
    one = fusedopt.AdamW(net.parameters(), lr=1e-3, **options)
    many = fusedopt.AdamW(sharded.parameters(), lr=1e-3, **options)
    for step in range(STEPS):
        batch = _batch(step)
        one.zero_grad()
        many.zero_grad()
        net(batch).square().mean().backward()
        sharded(batch[rank]).square().mean().backward()
        one.step()
        many.step()
        torch.testing.assert_close(many.metrics()["grad_norm"], one.metrics()["grad_norm"], rtol=10 * bound, atol=0.0)
    for p, q in zip(net.parameters(), sharded.parameters(), strict=True):
        _near(q, p, bound)
        for key, value in one.state.get(p, {}).items():
            _near(many.state[q][key], value, 100 * bound if key == "exp_avg_sq" else 10 * bound)
    _alike(many)


def _near(q: Any, p: Tensor, bound: float) -> None:
    q = q.full_tensor().detach() if hasattr(q, "full_tensor") else q.detach()
    assert (q - p.detach()).abs().max() <= bound * p.detach().abs().max()


def _alike(optimizer: Any) -> None:
    """What is not shared out is the same on both ranks, bit for bit: step counts, norms, skips."""
    mine = [*optimizer.metrics().values(), *(s["step"] for s in optimizer.state.values() if "step" in s)]
    for value in mine:
        theirs = value.clone()
        distributed.broadcast(theirs, 0)
        assert torch.equal(theirs, value)


def _scalers(rank: int, backend: str) -> None:
    """A gradient that overflows on one rank alone is skipped on both, whichever scaler looks at it."""
    makers = (
        (fusedopt.GradScaler, {}), (torch.amp.GradScaler, {}), (torch.amp.GradScaler, {"amp_scaling": True}),
    )  # fmt: skip
    for make, options in makers:
        net = _shard(_net())
        optimizer = fusedopt.AdamW(net.parameters(), lr=1e-2, backend=backend, clip_grad_norm=0.5, **options)
        scaler = make("cpu", init_scale=4.0)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(net(_batch(step)[rank]).square().mean()).backward()
            if step == 1 and rank == 1:
                local = next(p for p in net.parameters() if p.grad is not None and p.grad._local_tensor.numel())
                local.grad._local_tensor.view(-1)[:1] = torch.inf
            before = [p.full_tensor().clone() for p in net.parameters()]
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(p.full_tensor(), x) for p, x in zip(net.parameters(), before, strict=True))
            assert same == (step == 1), (make, options, step)
            assert scaler.get_scale() == (4.0 if step == 0 else 2.0), (make, options, step)


def _stages(rank: int, backend: str) -> None:
    """Ranks that hold different parameters, as pipeline stages do, clip by one norm."""
    torch.manual_seed(0)
    whole = [nn.Parameter(torch.randn(40, 3)), nn.Parameter(torch.randn(70))]
    own = [nn.Parameter(whole[rank].detach().clone())]
    options: dict[str, Any] = {"lr": 1e-2, "backend": backend, "clip_grad_norm": 0.1, "skip_norm_above": 50.0}
    one = fusedopt.AdamW(whole, **options)
    stage: Any = fusedopt.AdamW(own, norm_group=distributed.group.WORLD, **options)
    twin = copy.deepcopy(stage)
    for scale in (1.0, 3.0, 100.0):
        for i, p in enumerate(whole):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * scale
        own[0].grad = whole[rank].grad
        one.step()
        stage.step()
        assert torch.equal(own[0], whole[rank])
        assert torch.equal(stage.metrics()["grad_norm"], one.metrics()["grad_norm"])
    assert one.metrics()["skipped_steps"] == stage.metrics()["skipped_steps"] == 1
    before = own[0].detach().clone()
    stage.found_inf = torch.tensor(float(rank == 1))  # as torch's GradScaler says
    own[0].grad = torch.ones_like(own[0])
    stage.step()
    assert torch.equal(own[0], before) and stage.metrics()["skipped_steps"] == 2
    assert twin._norm_group is stage._norm_group
    with pytest.raises(TypeError, match="norm_group must be a process group"):
        fusedopt.AdamW(own, norm_group="world")
    with pytest.raises(TypeError, match="save its state_dict"):
        import pickle

        pickle.dumps(stage)


def _beside_a_plain_parameter(rank: int, backend: str) -> None:
    """A DTensor and a replica in one group, which torch's fused and foreach steps refuse."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    x, y = torch.randn(5, 3), torch.randn(7)
    plain = [nn.Parameter(x.clone()), nn.Parameter(y.clone())]
    mixed: Any = [nn.Parameter(distribute_tensor(x, mesh, [Shard(0)])), nn.Parameter(y.clone())]
    one, many = (fusedopt.AdamW(ps, lr=0.1, clip_grad_norm=0.1, backend=backend) for ps in (plain, mixed))
    for p, q in zip(plain, mixed, strict=True):
        p.grad = torch.ones_like(p)
        q.grad = torch.ones_like(q)
    one.step()
    many.step()
    assert torch.equal(mixed[0].full_tensor(), plain[0]) and torch.equal(mixed[1], plain[1])
    assert torch.equal(many.metrics()["grad_norm"], one.metrics()["grad_norm"])


def _calls(rank: int, backend: str) -> None:
    """What users do beside stepping."""
    net = _shard(_net().bfloat16())
    options: dict[str, Any] = {"master_weights": "float32", "ema_decay": 0.9, "seed": 1, "backend": backend}
    optimizer = fusedopt.AdamW(net.named_parameters(), lr=1e-2, **options)
    before = {name: p.full_tensor().clone() for name, p in net.named_parameters()}
    optimizer.materialize_state()
    assert all(torch.equal(p.full_tensor(), before[name]) for name, p in net.named_parameters())
    assert {s["step"].item() for s in optimizer.state.values()} == {0.0}
    net(_batch(0)[rank].bfloat16()).square().mean().backward()
    optimizer.step()
    for p in net.parameters():  # as FSDP2 writes what is loaded into a model
        p._local_tensor.fill_(0.25)
    optimizer.step()
    largest = max((p.full_tensor().float() - 0.25).abs().max().item() for p in net.parameters())
    assert largest < 0.02, "a step of lr 0.01 from what was written"
    masters: Any = optimizer.master_state_dict()
    for name, p in net.named_parameters():
        assert masters[name].placements == p.placements and masters[name].dtype == torch.float32
        assert torch.equal(masters[name].full_tensor().bfloat16(), p.full_tensor())
    averages: Any = optimizer.ema_parameters()
    average = [p.full_tensor().bfloat16() for p in averages]
    now = [p.full_tensor().clone() for p in net.parameters()]
    with optimizer.swap_ema():
        assert all(torch.equal(p.full_tensor(), x) for p, x in zip(net.parameters(), average, strict=True))
    assert all(torch.equal(p.full_tensor(), x) for p, x in zip(net.parameters(), now, strict=True))
    loaded = fusedopt.AdamW(net.named_parameters(), lr=1.0, **options)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.param_groups[0]["lr"] == 1e-2
    for p, state in optimizer.state.items():
        assert all(torch.equal(_whole(loaded.state[p][key]), _whole(value)) for key, value in state.items())
    whole = {name: torch.full(p.shape, 0.3) for name, p in net.named_parameters()}
    loaded.load_master_state_dict(whole)
    assert all(torch.equal(p.full_tensor(), torch.full(p.shape, 0.3).bfloat16()) for p in net.parameters())
    assert all(
        s["master_param"]._local_tensor.eq(torch.tensor(0.3)).all() for s in loaded.state.values() if "step" in s
    )
    exported = optimizer.to_torch_state_dict()
    theirs = torch.optim.AdamW(net.parameters(), lr=1.0)
    theirs.load_state_dict(exported)
    count, _ = optimizer.warmup()
    assert count == 0 or backend == "eager" or numerics.INTERPRETED


def _whole(t: Any) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
