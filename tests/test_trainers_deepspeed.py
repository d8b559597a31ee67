"""What DeepSpeed does to a client optimizer: against a stub, and in DeepSpeed itself where that is installed.

DeepSpeed compiles parts of itself on the machine it runs on, so what usually runs is the stub. It is written from
DeepSpeed 0.19.8 (`runtime/engine.py`, `runtime/zero/stage_1_and_2.py` and `stage3.py`): it makes the same calls of the
optimizer in the same order, on one rank. The reference is torch.optim.AdamW in the same stub.
"""

import copy
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ranks
import torch
import trainer_page
from compare import assert_close, assert_equal
from tolerances import TOLERANCES
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import fusedopt

SHAPES = ((5, 3), (4, 4, 2), (7,), (64, 70), (1,), (3,))


class Engine:
    """One rank of ZeRO. client: an optimizer, or a function that makes one of the model's parameters."""

    def __init__(self, client: Any, params: Sequence[nn.Parameter]) -> None:
        optimizer = client if isinstance(client, torch.optim.Optimizer) else client(params)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if len(group["params"]) != 0]
        seen = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(seen) == len(set(seen))
        self.optimizer: Any = optimizer
        self.low: list[list[nn.Parameter]] = []
        self.flat: list[torch.Tensor] = []
        self.group_of: list[int] = []
        self.partition()
        for flat in self.flat:  # state is made lazily, by the first step
            flat.grad = torch.zeros_like(flat)
            flat.grad = None

    def own(self, group: int, members: list[nn.Parameter]) -> torch.Tensor:
        """A flat fp32 copy of low-precision parameters."""
        self.low.append(members)
        self.group_of.append(group)
        self.flat.append(torch.cat([p.detach().reshape(-1) for p in members]).float().requires_grad_(True))
        return self.flat[-1]

    def partition(self) -> None:
        """Give every group what it owns."""
        raise NotImplementedError

    def step_of(self, index: int) -> None:
        """Step one partition."""
        raise NotImplementedError

    def step(self, number: int, scaler: Any = None) -> None:
        for i, flat in enumerate(self.flat):
            random = torch.Generator().manual_seed(100 * number + i)
            flat.grad = torch.randn(flat.shape, generator=random).to(flat.device)
        norm = torch.cat([flat.grad for flat in self.flat if flat.grad is not None]).norm()
        for flat in self.flat:
            assert flat.grad is not None
            flat.grad.mul_(1.0 / max(1.0, float(norm)))
        for i, (flat, members) in enumerate(zip(self.flat, self.low, strict=True)):
            self.step_of(i)
            flat.grad = None
            with torch.no_grad():
                parts = flat.split([p.numel() for p in members])
                for p, part in zip(members, parts, strict=True):
                    p.copy_(part.view_as(p))

    def save(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def load(self, saved: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(saved)


class Stage2(Engine):
    """Stages 1 and 2: a partition for each group, and a list of groups that holds one of them while it is stepped."""

    def partition(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            group["params"] = [self.own(i, group["params"])]

    def step_of(self, index: int) -> None:
        groups = self.optimizer.param_groups
        self.optimizer.param_groups = [groups[index]]
        self.optimizer.step()
        self.optimizer.param_groups = groups
        assert self.optimizer.state[self.flat[index]]["exp_avg"].shape == self.flat[index].shape

    def elastic(self) -> list[dict[str, Any]]:
        """State by group without padding, as an elastic checkpoint holds it."""
        states = [self.optimizer.state[group["params"][0]] for group in self.optimizer.param_groups]
        return [{key: value.clone() for key, value in state.items()} for state in states]

    def restore(self, saved: list[dict[str, Any]], step: int) -> None:
        """Copied into live state, with a ``step`` in the groups, whatever the optimizer."""
        for group, state in zip(self.optimizer.param_groups, saved, strict=True):
            live = self.optimizer.state[group["params"][0]]
            for key, value in state.items():
                if key in live:
                    live[key].data.copy_(value.data)
                else:
                    live[key] = value
        for group in self.optimizer.param_groups:
            group["step"] = step


class Stage3(Engine):
    """Several partitions in a group; a group has parameters only while one of its partitions is stepped."""

    def partition(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            members, group["params"] = group["params"], []
            for j in range(0, len(members), 2):
                self.own(i, members[j : j + 2])

    def step_of(self, index: int) -> None:
        group = self.optimizer.param_groups[self.group_of[index]]
        group["params"] = [self.flat[index]]
        self.optimizer.step()
        group["params"] = []

    def with_all(self, call: Callable[[], Any]) -> Any:
        for index, flat in zip(self.group_of, self.flat, strict=True):
            self.optimizer.param_groups[index]["params"].append(flat)
        result = call()
        for group in self.optimizer.param_groups:
            group["params"] = []
        return result

    def save(self) -> dict[str, Any]:
        return self.with_all(super().save)

    def load(self, saved: dict[str, Any]) -> None:
        self.with_all(lambda: self.optimizer.load_state_dict(saved))


def engine(cls: Any, optimizer: Any, device: str, **options: Any) -> Any:
    """An engine over a bf16 model: decayed parameters, a group that has none, the rest."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(device, torch.bfloat16)) for shape in SHAPES]

    def make(_: Any) -> Any:
        groups = [{"params": params[:4]}, {"params": []}, {"params": params[4:], "weight_decay": 0.0}]
        return optimizer(groups, lr=1e-2, weight_decay=0.1, **options)

    return cls(make, params)


@pytest.mark.parametrize("cls", [Stage2, Stage3])
def test_zero_gives_torchs_steps(cls: Any, device: str) -> None:
    ours, theirs = engine(cls, fusedopt.AdamW, device), engine(cls, torch.optim.AdamW, device)
    schedules = [LambdaLR(each.optimizer, lambda step: 0.9**step) for each in (ours, theirs)]
    for step in range(4):
        for each, schedule in zip((ours, theirs), schedules, strict=True):
            each.step(step)
            schedule.step()
    if cls is Stage3:
        ours.with_all(lambda: theirs.with_all(lambda: assert_close(ours.optimizer, theirs.optimizer, 4)))
    else:
        assert_close(ours.optimizer, theirs.optimizer, 4)
    assert len(ours.optimizer.state) == len(ours.flat) == len(theirs.optimizer.state)
    assert {float(state["step"]) for state in ours.optimizer.state.values()} == {4.0}


@pytest.mark.parametrize("options", [{}, {"state_dtype": "bfloat16", "state_rounding": "stochastic"}], ids=str)
@pytest.mark.parametrize("cls", [Stage2, Stage3])
def test_checkpoints_continue_bit_for_bit(cls: Any, options: dict[str, Any], device: str) -> None:
    whole, resumed = (engine(cls, fusedopt.AdamW, device, **options) for _ in range(2))
    for step in range(4):
        whole.step(step)
        if step == 1:
            resumed.load(copy.deepcopy(whole.save()))  # as a file would give it
            for mine, other in zip(resumed.flat, whole.flat, strict=True):
                mine.data.copy_(other.data)
        if step > 1:
            resumed.step(step)
    for mine, other in zip(resumed.flat, whole.flat, strict=True):
        assert torch.equal(mine, other)
        torch.testing.assert_close(resumed.optimizer.state[mine], whole.optimizer.state[other], rtol=0, atol=0)


def test_an_elastic_checkpoint_is_copied_into_live_state(device: str) -> None:
    whole, resumed = (engine(Stage2, fusedopt.AdamW, device) for _ in range(2))
    for step in range(2):
        whole.step(step)
    resumed.restore(whole.elastic(), 2)
    for mine, other in zip(resumed.flat, whole.flat, strict=True):
        mine.data.copy_(other.data)
    whole.step(2)
    resumed.step(2)
    assert_equal(whole.optimizer, resumed.optimizer)


def test_names_of_parameters_that_are_gone_are_not_used(device: str) -> None:
    """A group keeps its names when its parameters become one."""
    params = [nn.Parameter(torch.ones(3, device=device, dtype=torch.bfloat16)) for _ in range(2)]
    named = [{"params": [(f"layer{i}", p) for i, p in enumerate(params)]}]
    run = Stage2(fusedopt.AdamW(named, metrics=("grad_norm",)), params)
    run.step(0)
    assert float(run.optimizer.metrics("tensor")["grad_norm/0.0"]) == pytest.approx(1.0)


def test_a_step_between_swaps_keeps_the_plan_of_a_single_group(device: str) -> None:
    """A list of groups that is another object each time is no change; other parameters are."""
    counts = []
    for groups in (1, 2):
        params = [nn.Parameter(torch.ones(3, device=device, dtype=torch.bfloat16)) for _ in range(groups)]
        run = Stage2(lambda ps: fusedopt.AdamW([{"params": [p]} for p in ps], lr=1e-2), params)
        plans = []
        for step in range(3):
            run.step(step)
            plans.append(run.optimizer._plan)
        counts.append(len({id(plan) for plan in plans}) == 1)
    assert counts == [True, False]


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def initialize(model: Any, optimizer: Any, model_parameters: Any, config: dict[str, Any]) -> tuple[Any, ...]:
        assert config["zero_allow_untested_optimizer"]
        return Stage2(optimizer, list(model_parameters)), None, None, None

    module: Any = ModuleType("deepspeed")
    module.initialize = initialize
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    engine = trainer_page.run("DeepSpeed")["engine"]
    engine.step(0)
    assert type(engine.optimizer) is fusedopt.AdamW


# ---------------------------------------------------------------------------------------------------------- DeepSpeed
@pytest.mark.long
@pytest.mark.needs("deepspeed>=0.19")
@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
@pytest.mark.parametrize("stage", ["1", "2", "3"])
def test_deepspeed_itself(stage: str, tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path, 1, stage)


def one_rank(store: str, stage: int) -> None:
    """What the only process checks: losses of torch's AdamW, a checkpoint that is read back."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29583"}
    os.environ.update(place, DS_ACCELERATOR="cpu", CCL_LOCAL_SIZE="1")
    losses, _ = _train(torch.optim.AdamW, stage)
    ours, trained = _train(fusedopt.AdamW, stage)
    assert isinstance(trained.optimizer.optimizer, fusedopt.AdamW)
    assert ours == pytest.approx(losses, rel=TOLERANCES["trainers, bf16"].value) and ours[0] != ours[-1]
    trained.save_checkpoint(f"{store}.saved")
    _, fresh = _train(fusedopt.AdamW, stage, steps=1)
    fresh.load_checkpoint(f"{store}.saved")
    assert {float(state["step"]) for state in fresh.optimizer.optimizer.state.values()} == {4.0}
    assert all(torch.equal(p, q) for p, q in zip(fresh.parameters(), trained.parameters(), strict=True))
    print("all ranks agree")


def _train(cls: Any, stage: int, steps: int = 4) -> tuple[list[float], Any]:
    def make(given: Any) -> Any:
        params = list(given)
        matrices, vectors = ([p for p in params if (p.dim() > 1) is matrix] for matrix in (True, False))
        return cls([{"params": matrices}, {"params": []}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    config = {
        "train_batch_size": 4, "bf16": {"enabled": True}, "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.5, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    engine = import_module("deepspeed").initialize(
        model=net, optimizer=make, config=config, model_parameters=net.parameters()
    )[0]
    losses = []
    for step in range(steps):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step)).bfloat16()
        loss = (10 * engine(x)).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses, engine


if __name__ == "__main__":
    one_rank(sys.argv[1], int(sys.argv[4]))
