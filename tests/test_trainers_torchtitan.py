"""torchtitan's optimizer container with our optimizers in it: against torchtitan where it is installed, and a stub.

torchtitan needs far more than a test should, so what usually runs is `Stub`: written from torchtitan 0.3.0, it makes
the same calls of an optimizer in the same order. With torchtitan in the environment every test runs against both.
"""

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import trainer_page
from compare import assert_equal
from tolerances import TOLERANCES
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

import fusedopt

NAME = "torchtitan.components.optimizer"
OURS = "fusedopt.trainers.torchtitan"


# ---------------------------------------------------------------------------------------------------------- the stub
@dataclass(kw_only=True)
class Pattern:
    """A group, by a pattern of names."""

    pattern: str
    optimizer_name: str
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


class Stub(torch.optim.Optimizer):
    """One optimizer for each name and part of the model; groups as dicts, with the names of their parameters."""

    @dataclass(kw_only=True, slots=True)
    class Config:
        param_groups: list[Any] = field(default_factory=list)
        implementation: str = "fused"
        optimizer_factory_kwargs_by_name: dict[str, dict[str, Any]] = field(default_factory=dict)

    optimizers: list[Any]

    def __init__(self, config: Any, *, model_parts: list[nn.Module]) -> None:
        flags = {"fused": config.implementation.startswith("fused"), "foreach": config.implementation == "foreach"}
        self.optimizers = []
        for part in model_parts:
            groups, left = defaultdict(list), dict(part.named_parameters())
            for given in config.param_groups:
                chosen = {name: left.pop(name) for name in list(left) if re.search(given.pattern, name)}
                lists = {"params": list(chosen.values()), "param_names": list(chosen)}
                groups[given.optimizer_name].append({**lists, **flags, **given.optimizer_kwargs})
            for name, made in groups.items():
                more = config.optimizer_factory_kwargs_by_name.get(name, {})
                self.optimizers.append(self._resolve_optimizer_factory(name)(made, **more))
        torch.optim.Optimizer.__init__(self, [p for part in model_parts for p in part.parameters()], {})

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Any:
        if name not in ("Adam", "AdamW"):
            raise NotImplementedError(f"Optimizer {name} not added.")
        return getattr(torch.optim, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.optimizers)

    def step(self, closure: Any = None) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for optimizer in self.optimizers:
            self._make_state(optimizer)
            packed = optimizer.state_dict()
            for group in packed["param_groups"]:
                for name, number in zip(group["param_names"], group["params"], strict=True):
                    options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
                    flat.update({f"param_groups.{name}.{key}": value for key, value in options.items()})
                    flat.update({f"state.{name}.{k}": v for k, v in packed["state"].get(number, {}).items()})
        return flat

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            self._make_state(optimizer)
            groups, state = [], {}
            for group in optimizer.param_groups:
                numbers = []
                for name, p in zip(group["param_names"], group["params"], strict=True):
                    numbers.append(len(state))
                    full = {key: f"state.{name}.{key}" for key in optimizer.state[p]}
                    state[numbers[-1]] = {key: state_dict[at] for key, at in full.items() if at in state_dict}
                kept = [key for key in group if key not in ("params", "param_names")]
                first = group["param_names"][0]
                groups.append({"params": numbers, **{k: state_dict[f"param_groups.{first}.{k}"] for k in kept}})
            optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _make_state(self, optimizer: Any) -> None:
        """By a step of lr 0 over gradients of 0, which counts."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        if optimizer.state or any(p.grad is not None for p in params):
            return
        for p in params:
            p.grad = torch.zeros_like(p)
        rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        optimizer.step(closure=None)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)


@pytest.fixture(params=["stub", pytest.param("torchtitan", marks=pytest.mark.needs("torchtitan>=0.3", "tyro"))])
def titan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """theirs, ours: containers; Group: config of a group."""
    if request.param == "stub":
        for name in (NAME.split(".")[0], NAME.rpartition(".")[0]):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        module: Any = ModuleType(NAME)
        module.OptimizersContainer, module.ParamGroupConfig = Stub, Pattern
        monkeypatch.setitem(sys.modules, NAME, module)
    theirs: Any = import_module(NAME)
    ours = import_module(OURS).FusedOptimizersContainer
    yield SimpleNamespace(theirs=theirs.OptimizersContainer, ours=ours, Group=theirs.ParamGroupConfig)
    sys.modules.pop(OURS)


# ------------------------------------------------------------------------------------------------------------- tests
def net(device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 80), nn.LayerNorm(80), nn.Linear(80, 2)).to(device, dtype)


def made(titan: Any, container: Any, model: nn.Module, name: str = "AdamW", **options: Any) -> Any:
    """A container with two groups and no learning rate but theirs."""
    common = {"lr": 1e-2, "betas": (0.9, 0.95), **options}
    groups = [
        titan.Group(pattern=r"bias$|^1\.", optimizer_name=name, optimizer_kwargs={**common, "weight_decay": 0.0}),
        titan.Group(pattern=r".*", optimizer_name=name, optimizer_kwargs={**common, "weight_decay": 0.1}),
    ]
    config = container.Config(param_groups=groups)
    return config.build(model_parts=[model]) if hasattr(config, "build") else container(config, model_parts=[model])


def trained(container: Any, model: nn.Module, steps: range) -> list[float]:
    """torchtitan's train step: clip, step, schedule. Returns the losses."""
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1.0 / (step + 1), steps.start - 1) for o in container
    ]
    losses, p = [], next(model.parameters())
    for step in steps:
        container.zero_grad()
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        loss = model(x.to(p.device, p.dtype)).square().mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        container.step()
        for schedule in schedules:
            schedule.step()
        losses.append(loss.item())
    return losses


def test_training_is_that_of_torchs_adamw(titan: Any, device: str) -> None:
    theirs, ours = net(device), net(device)
    container = made(titan, titan.ours, ours)
    assert [type(optimizer) for optimizer in container] == [fusedopt.AdamW]
    calls: list[int] = []
    container.register_step_pre_hook(lambda *_: calls.append(1))
    losses = trained(made(titan, titan.theirs, theirs), theirs, range(4))
    assert trained(container, ours, range(4)) == pytest.approx(losses, rel=0.0, abs=TOLERANCES["trainers"].value)
    assert len(calls) == 4 and [group["lr"] for group in container.optimizers[0].param_groups] == [2e-3] * 2
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=TOLERANCES["trainers"].value)


def test_names_choose_our_classes_and_else_torchtitans(titan: Any, device: str) -> None:
    assert type(made(titan, titan.ours, net(device), "Adan", betas=(0.98, 0.92, 0.99)).optimizers[0]) is fusedopt.Adan
    with pytest.raises(NotImplementedError, match="Shampoo"):
        made(titan, titan.ours, net(device), "Shampoo")


LOW = {"master_weights": "split8", "state_dtype": "int8", "state_rounding": "stochastic", "ema_decay": 0.9}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # the intent is to save in a single process
def test_a_checkpoint_before_the_first_step_and_one_after_continue_bit_for_bit(
    titan: Any, tmp_path: Path, device: str
) -> None:
    """Through torch.distributed.checkpoint, as torchtitan saves: in place, over the state dict of a new container."""
    whole, model = net(device, torch.bfloat16), net(device, torch.bfloat16)
    reference, container = made(titan, titan.ours, whole, **LOW), made(titan, titan.ours, model, **LOW)
    first = container.state_dict()
    assert {float(value) for key, value in first.items() if key.endswith(".step")} == {0.0}
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), whole.parameters(), strict=True))
    container.load_state_dict(first)
    assert trained(container, model, range(3)) == trained(reference, whole, range(3))
    save({"model": model.state_dict(), **container.state_dict()}, checkpoint_id=tmp_path, no_dist=True)
    resumed = net(device, torch.bfloat16)
    again = made(titan, titan.ours, resumed, **LOW)
    loaded = {"model": resumed.state_dict(), **again.state_dict()}
    load(loaded, checkpoint_id=tmp_path, no_dist=True)
    resumed.load_state_dict(loaded.pop("model"))
    again.load_state_dict(loaded)
    assert_equal(again.optimizers[0], container.optimizers[0])
    for each, of in ((again, resumed), (container, model)):
        for group in each.optimizers[0].param_groups:
            group["lr"] = group["initial_lr"] = 1e-2
        trained(each, of, range(3, 5))
    assert_equal(again.optimizers[0], container.optimizers[0])


def test_checkpoints_of_torchs_adamw_load_here_and_ours_there(titan: Any, device: str) -> None:
    """While no option of ours is set, whose group key their file lacks."""
    models = [net(device) for _ in range(4)]
    theirs, ours, from_theirs, from_ours = (
        made(titan, titan.theirs if i in (0, 3) else titan.ours, model) for i, model in enumerate(models)
    )
    for written, read, i in ((theirs, from_theirs, 0), (ours, from_ours, 1)):
        trained(written, models[i], range(3))
        models[i + 2].load_state_dict(models[i].state_dict())
        read.load_state_dict(written.state_dict())
        assert_equal(written.optimizers[0], read.optimizers[0])
    with pytest.raises(KeyError, match="fusedopt"):
        made(titan, titan.ours, net(device), ema_decay=0.9).load_state_dict(theirs.state_dict())


def test_what_a_container_cannot_do_is_refused(titan: Any, device: str) -> None:
    groups = [titan.Group(pattern=".*", optimizer_name="AdamW", optimizer_kwargs={"lr": 1e-3})]
    config = titan.ours.Config(param_groups=groups, implementation="fused_opt_states_bf16")
    with pytest.raises(ValueError, match="'state_dtype': 'bfloat16'"):
        titan.ours(config, model_parts=[net(device)])
    groups[0].optimizer_kwargs["clip_grad_norm"] = 1.0
    config = titan.ours.Config(param_groups=groups)
    assert len(titan.ours(config, model_parts=[net(device)]).optimizers) == 1
    with pytest.raises(ValueError, match=r"2 optimizers share .* training\.max_norm"):
        titan.ours(config, model_parts=[net(device), net(device)])


def test_the_page_runs(titan: Any, device: str) -> None:
    model = net(device, torch.float32)
    container = titan.ours(trainer_page.run("torchtitan")["optimizer"], model_parts=[model])
    assert len(set(trained(container, model, range(2)))) == 2
    assert {state["exp_avg"].dtype for state in container.optimizers[0].state.values()} == {torch.bfloat16}
