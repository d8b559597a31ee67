"""`accelerate`: what it does to an optimizer that it prepares, on one process and by FSDP2 on two.

Two processes, each running `one_rank` below over gloo. accelerate offers FSDP on GPUs only: its FSDP2 path is entered
by hand; the code that replaces parameters is its own.
"""

import copy
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import trainer_page
from compare import assert_equal
from torch import distributed, nn

import fusedopt

pytestmark = pytest.mark.needs("accelerate>=1.1")
FORMATS: tuple[dict[str, Any], ...] = (
    {"state_dtype": "float32"},
    {"master_weights": "split8", "state_dtype": "int8", "state_rounding": "stochastic", "seed": 3},
    {"master_weights": "float32", "ema_decay": 0.9, "clip_grad_norm": 1.0},
)
"""Options of AdamW over bf16 parameters whose state torch's loader would cast."""


def net(device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 3)).to(device, dtype)


def adamw(model: nn.Module, **options: Any) -> Any:
    return fusedopt.AdamW(model.named_parameters(), lr=1e-2, **options)


def batch(step: int, like: nn.Module) -> torch.Tensor:
    p = next(like.parameters())
    return torch.randn(4, 64, generator=torch.Generator().manual_seed(step)).to(p.device, p.dtype)


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: str(next(iter(options.values()))))
def test_preparing_and_saving_keeps_every_bit_and_dtype(options: dict[str, Any], tmp_path: Path, device: str) -> None:
    """`prepare` passes the state through ``load_state_dict`` at once; gradients are clipped on the way."""
    accelerator = import_module("accelerate").Accelerator(cpu=device == "cpu")
    model, alone = net(device), net(device)
    optimizer, plain = adamw(model, **options), adamw(alone, **options)
    for each in (optimizer, plain):
        each.materialize_state()
    prepared_model, prepared = accelerator.prepare(model, optimizer)
    assert prepared.optimizer is optimizer
    assert_equal(optimizer, plain)
    for step in range(3):
        prepared.zero_grad()
        accelerator.backward(prepared_model(batch(step, model)).square().mean())
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.5)
        prepared.step()
        plain.zero_grad()
        alone(batch(step, alone)).square().mean().backward()
        assert torch.equal(norm, nn.utils.clip_grad_norm_(alone.parameters(), 0.5))
        plain.step()
        if step == 1:
            accelerator.save_state(str(tmp_path))
    assert_equal(optimizer, plain)
    accelerator.load_state(str(tmp_path))
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}
    prepared.zero_grad()
    accelerator.backward(prepared_model(batch(2, model)).square().mean())
    accelerator.clip_grad_norm_(model.parameters(), 0.5)
    prepared.step()
    assert_equal(optimizer, plain)


@pytest.mark.parametrize("amp_scaling", [False, True])
def test_accelerate_learns_of_a_skipped_step_by_default(amp_scaling: bool, device: str) -> None:
    """It replaces ``step`` to see whether the scaler calls it. With amp_scaling=True the step is called, and skips."""
    accelerator = import_module("accelerate").Accelerator(cpu=device == "cpu")
    accelerator.scaler = torch.amp.GradScaler(device, init_scale=2.0**127, backoff_factor=2.0**-30)
    model = net(device, torch.float32)
    before = copy.deepcopy(model.state_dict())
    optimizer = adamw(model, amp_scaling=amp_scaling)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (step + 1))
    model, prepared, scheduler = accelerator.prepare(model, optimizer, scheduler)
    skipped, rates = [], []
    for step in range(3):
        prepared.zero_grad()
        accelerator.backward(1e3 * model(batch(step, model)).square().mean())
        prepared.step()
        scheduler.step()
        skipped.append(prepared.step_was_skipped)
        rates.append(optimizer.param_groups[0]["lr"])
        if step == 0:
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert skipped == [not amp_scaling, False, False]
    assert rates == pytest.approx([5e-3, 1e-2 / 3, 2.5e-3] if amp_scaling else [1e-2, 5e-3, 1e-2 / 3])
    assert {float(state["step"]) for state in optimizer.state.values()} == {2.0}


def test_the_page_runs() -> None:
    assert float(trainer_page.run("accelerate")["norm"]) > 0


# ----------------------------------------------------------------------------------------------------------- FSDP2
@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
def test_fsdp2_replaces_the_parameters_after_construction(tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path)


def one_rank(store: str, rank: int, world: int) -> None:
    """What one of two processes checks: training as one process does, with state and weights in shards."""
    ranks_of = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ.update({name: str(value) for name, value in ranks_of.items()}, ACCELERATE_USE_CPU="true")
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for options in ({}, {"clip_grad_norm": 0.5, "ema_decay": 0.9}):
        _train(rank, world, {"backend": "eager", **options})
    ranks.finish()


@contextmanager
def _fsdp2() -> Iterator[Any]:
    accelerate = import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.distributed_type = accelerate.DistributedType.FSDP
    accelerator.state.fsdp_plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2)
    yield accelerator
    import_module("accelerate.state").AcceleratorState._reset_state()


def _train(rank: int, world: int, options: dict[str, Any]) -> None:
    """Three output features on two ranks: uneven shards."""
    dtensor = import_module("torch.distributed.tensor").DTensor
    model, alone = net("cpu", torch.float32), net("cpu", torch.float32)
    optimizer, single = adamw(model, **options), adamw(alone, **options)
    old = list(optimizer.param_groups[0]["params"])
    with _fsdp2() as accelerator:
        model, prepared = accelerator.prepare(model, optimizer)
        new = optimizer.param_groups[0]["params"]
        assert len(new) == len(old) and all(isinstance(p, dtensor) for p in new)
        for step in range(4):
            batches = [batch(world * step + i, alone) for i in range(world)]
            prepared.zero_grad()
            accelerator.backward(model(batches[rank]).square().mean())
            _as_one_process(alone, batches)
            if step == 3 and "clip_grad_norm" not in options:
                norm = accelerator.clip_grad_norm_(model.parameters(), 1e-3).full_tensor()
                torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(alone.parameters(), 1e-3))
            prepared.step()
            single.step()
            if step == 2 or "clip_grad_norm" in options:
                _assert_equal(optimizer, single, exact="clip_grad_norm" not in options)
    assert not {id(p) for p in optimizer.state} & {id(p) for p in old} and len(optimizer.state) == len(new)


def _as_one_process(model: nn.Module, batches: list[torch.Tensor]) -> None:
    """Gradients as FSDP makes them: of each rank's batch, averaged."""
    each = []
    for x in batches:
        model.zero_grad()
        model(x).square().mean().backward()
        each.append([p.grad for p in model.parameters()])
    for p, *grads in zip(model.parameters(), *each, strict=True):
        p.grad = torch.stack(grads).mean(0)


def _assert_equal(sharded: Any, single: Any, exact: bool) -> None:
    """exact: in every bit; else up to a norm that is an ulp off, and what four steps make of that."""
    near = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-5, "atol": 1e-7}
    for p, q in zip(sharded.param_groups[0]["params"], single.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), **near)
        state, other = sharded.state[p], single.state[q]
        assert state.keys() == other.keys()
        for key, value in other.items():
            assert isinstance(state[key], type(p)) == (value.dim() > 0), key
            torch.testing.assert_close(state[key].full_tensor() if value.dim() else state[key], value, **near)
    if not exact:
        ours, theirs = (float(optimizer.metrics()["grad_norm"]) for optimizer in (sharded, single))
        assert ours == pytest.approx(theirs, rel=1e-6) and ours > 0.5


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
