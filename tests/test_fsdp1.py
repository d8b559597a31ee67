"""FullyShardedDataParallel, the older one: element-wise rules have the bits of one process, what needs more is refused.

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
from torch.distributed.fsdp import FullOptimStateDictConfig, FullStateDictConfig, StateDictType
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import fusedopt
from fusedopt_kernels import numerics

STEPS = 3
BF16 = {"lr": 1e-2, "state_dtype": "bfloat16"}
CASES: tuple[tuple[Any, torch.dtype, dict[str, Any], bool, bool], ...] = (
    (fusedopt.AdamW, torch.float32, {"lr": 1e-2, "ema_decay": 0.9, "clip_grad_value": 0.05}, True, True),
    (fusedopt.AdamW, torch.float32, {"lr": 1e-2}, False, True),
    (fusedopt.NAdam, torch.bfloat16, {**BF16, "master_weights": "kahan"}, True, True),
    (fusedopt.SGD, torch.bfloat16, {"lr": 1e-2, "momentum": 0.9, "master_weights": "float32"}, True, True),
    (fusedopt.AdamW, torch.bfloat16, {**BF16, "master_weights": "split16"}, True, False),
    (fusedopt.Lion, torch.bfloat16, {**BF16, "master_weights": "split8", "master_rounding": "nearest"}, True, False),
)
"""Class, dtype of the parameters, options; whether FSDP keeps the original parameters, and whether it can gather the
state: all of it must be of one dtype."""
WHOLE = "are pieces of tensors: {} works on whole ones"
ALONE = r"this rank's piece .* norm_group="
REFUSED: tuple[tuple[Any, dict[str, Any], str], ...] = (
    (fusedopt.Muon, {"adamw": {"lr": 1e-2}}, WHOLE.format("muon")),
    (fusedopt.Adafactor, {}, WHOLE.format("adafactor")),
    (fusedopt.LAMB, {}, WHOLE.format("lamb")),
    (fusedopt.LARS, {}, WHOLE.format("lars")),
    (fusedopt.NovoGrad, {}, WHOLE.format("novograd")),
    (fusedopt.StableAdamW, {}, WHOLE.format("stable_adamw")),
    (fusedopt.AdamW, {"clip_grad_norm": 1.0, "clip_scope": "tensor"}, "clip_scope"),
    (fusedopt.AdamW, {"cautious": True}, "cautious=True"),
    (fusedopt.AdamW, {"metrics": ["update_norm"]}, "metrics of parameters"),
    (fusedopt.AdamW, {"state_dtype": {"exp_avg": "int8"}}, "state_dtype='int8'"),
    (fusedopt.AdamW, {"state_rounding": "stochastic", "state_dtype": "bfloat16"}, "stochastic rounding"),
    (fusedopt.AdamW, {"master_weights": "split8"}, "stochastic rounding"),
    (fusedopt.AdamW, {"clip_grad_norm": 1.0}, ALONE),
    (fusedopt.AdamW, {"skip_nonfinite": True}, ALONE),
    (fusedopt.AdamW, {"metrics": ["grad_norm"]}, ALONE),
)


@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
def test_fragments_are_updated_or_refused(tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path)


def one_rank(store: str, rank: int) -> None:
    """What one of two processes checks."""
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for cls, dtype, options, original, whole in CASES:
        _compare(rank, cls, dtype, {"backend": "eager", **options}, original, whole)
    if numerics.INTERPRETED:
        _compare(rank, fusedopt.AdamW, torch.bfloat16, {"backend": "triton", **CASES[4][2]}, True, False)
    _clipped(rank)
    _refusals()
    ranks.finish()


class Net(nn.Module):
    """The larger part lies on both ranks, cut off a multiple of 8; the smaller in whole on one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 70), nn.Linear(70, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


def _batches(step: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(step)).to(dtype)


def _compare(rank: int, cls: Any, dtype: torch.dtype, options: dict[str, Any], original: bool, whole: bool) -> None:
    """Half of the steps, all state through a state dict into a new optimizer, the other half."""
    model, alone = _wrapped(dtype, original), Net().to(dtype)
    single = cls(alone.named_parameters(), **options)
    optimizer = cls(model.parameters(), **options)
    for step in range(2 * STEPS):
        if step == STEPS:
            optimizer = _again(model, optimizer, cls(model.parameters(), **options), whole)
        model(_batches(step, dtype)[rank]).square().sum().backward()
        _one_process(alone, _batches(step, dtype))
        for each in (optimizer, single):
            each.step()
            each.zero_grad()
    case = f"{cls.__name__}, {dtype}, {options}, {original}"
    with FSDP.summon_full_params(model):
        for (name, p), q in zip(alone.named_parameters(), model.module.parameters(), strict=True):
            assert torch.equal(p, q), f"{name} differs from one process's: {case}"
    state = FSDP.optim_state_dict(model, optimizer)["state"] if whole else {}
    for name, p in alone.named_parameters() if whole else ():
        assert state[name].keys() == single.state[p].keys(), case
        for key, value in single.state[p].items():
            assert torch.equal(state[name][key], value), f"{key} of {name} differs from one process's: {case}"


def _again(model: Any, old: Any, new: Any, whole: bool) -> Any:
    """The new optimizer with the old one's state: by way of whole tensors, or rank by rank."""
    if whole:
        new.load_state_dict(FSDP.optim_state_dict_to_load(model, new, FSDP.optim_state_dict(model, old)))
    else:
        with pytest.raises(AssertionError, match="dtype"):
            FSDP.optim_state_dict(model, old)
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    return new


def _wrapped(dtype: torch.dtype, original: bool = True) -> Any:
    model = FSDP(Net().to(dtype), use_orig_params=original, device_id=torch.device("cpu"))
    # moved to the CPU when it is there already, all state would be views of one buffer, which the next overwrites
    kept = FullOptimStateDictConfig(offload_to_cpu=False)
    FSDP.set_state_dict_type(model, StateDictType.FULL_STATE_DICT, FullStateDictConfig(), kept)
    return model


def _one_process(net: nn.Module, batches: torch.Tensor) -> None:
    """Gradients as FSDP makes them: of each rank's batch divided by two, then added up."""
    halves = []
    for batch in batches:
        net.zero_grad()
        net(batch).square().sum().backward()
        halves.append([p.grad / 2 for p in net.parameters() if p.grad is not None])
    for p, a, b in zip(net.parameters(), *halves, strict=True):
        p.grad = a + b


def _clipped(rank: int) -> None:
    """The norm is that of all ranks."""
    model, alone = _wrapped(torch.float32), Net()
    options: dict[str, Any] = {"lr": 1.0, "backend": "eager", "clip_grad_norm": 0.1, "metrics": ["grad_norm"]}
    optimizer = fusedopt.SGD(model.parameters(), norm_group=distributed.group.WORLD, **options)
    single = fusedopt.SGD(alone.parameters(), **options)
    model(_batches(0, torch.float32)[rank]).square().sum().backward()
    _one_process(alone, _batches(0, torch.float32))
    for each in (optimizer, single):
        each.step()
    norms = [each.metrics()["grad_norm"] for each in (optimizer, single)]
    assert float(norms[1]) > 1.0
    torch.testing.assert_close(*norms, rtol=2e-7, atol=0.0)
    with FSDP.summon_full_params(model):
        for p, q in zip(alone.parameters(), model.module.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def _refusals() -> None:
    model = _wrapped(torch.bfloat16)
    model(_batches(0, torch.bfloat16)[0]).square().sum().backward()
    for cls, options, message in REFUSED:
        optimizer = cls(model.parameters(), lr=1e-2, backend="eager", **options)
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    with pytest.raises(RuntimeError, match="pieces of tensors: release_gradients"):
        fusedopt.AdamW(model.parameters(), release_gradients=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(sys.argv[1], int(sys.argv[2]))
