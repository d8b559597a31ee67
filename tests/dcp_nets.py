"""Parameters in every format, spread over ranks or whole, stepped with the same gradients: for tests of checkpoints."""

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedopt

STATES = (None, "float32", "bfloat16", "float16", "int8", "float8_e4m3", "float8_e5m2", "int4")
WEIGHTS = (None, "float32", "split16", "split8", "kahan", "stochastic")
EVERY = tuple((state, weight) for state in STATES for weight in WEIGHTS)
SOME = tuple((state, WEIGHTS[i % len(WEIGHTS)]) for i, state in enumerate(STATES))
SHAPES = ((65, 67), (3, 1400), (7,))
"""Uneven rows that are no whole groups; quantised rows of which the fourth of four ranks has none; neither."""

Pair = tuple[Any, Any]
"""A net and its optimizer."""
Formats = Iterable[tuple[str | None, str | None]]


class Net(nn.Module):
    """The parameters of one group for each pair of formats; fp32 ones where weights have none, else bf16."""

    def __init__(self, formats: Formats) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.wide, self.low = nn.Module(), nn.Module()
        self.formats = list(formats)
        for state, weight in self.formats:
            part, dtype = (self.wide, torch.float32) if weight is None else (self.low, torch.bfloat16)
            for i, shape in enumerate(SHAPES if state in (None, weight) or weight == "split16" else SHAPES[:1]):
                p = nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
                part.register_parameter(f"{state}_{weight}_{i}", p)

    def groups(self, named: bool, seed: int) -> list[dict[str, Any]]:
        """Groups with the options of their formats; averages in some, random state in others."""
        groups = []
        for state, weight in self.formats:
            options = {"state_dtype": state, "master_weights": weight}
            if state == "int8":
                options["ema_decay"] = 0.9
            if state in ("bfloat16", "int4"):
                options["state_rounding"] = "stochastic"
            if weight in ("split8", "stochastic") or "state_rounding" in options:
                options["seed"] = seed
            prefixes = tuple(f"{part}.{state}_{weight}_" for part in ("wide", "low"))
            mine = [(name, p) for name, p in self.named_parameters() if name.startswith(prefixes)]
            groups.append({"params": mine if named else [p for _, p in mine], **options})
        return groups


def spread(net: Net, mesh: Any) -> Net:
    """The same net under FSDP2."""
    from torch.distributed.fsdp import fully_shard

    for part in (net.wide, net.low):
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    return net


def made(
    formats: Formats, mesh: Any = None, named: bool = True, seed: int = 0, **options: Any
) -> tuple[Net, fusedopt.AdamW]:
    """A net, whole or spread over a mesh, and its optimizer."""
    net = Net(formats) if mesh is None else spread(Net(formats), mesh)
    return net, fusedopt.AdamW(net.groups(named, seed), **{"lr": 1e-2, "backend": "eager", **options})


def like(whole: Tensor, t: Any) -> Tensor:
    """What this rank has of a tensor that is spread as another."""
    from torch.distributed.tensor import distribute_tensor

    if not hasattr(t, "placements"):
        return whole
    return distribute_tensor(whole, t.device_mesh, t.placements, src_data_rank=None)


def train(steps: Iterable[int], *pairs: Pair) -> None:
    """Steps of optimizers with gradients that depend on the step alone."""
    for step in steps:
        for net, optimizer in pairs:
            generator = torch.Generator().manual_seed(step)
            for p in net.parameters():
                p.grad = like(torch.randn(p.shape, generator=generator, dtype=p.dtype), p)
            optimizer.step()
            optimizer.zero_grad()


def numbers(net: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Parameters and state by name."""
    found = {}
    for name, p in net.named_parameters():
        found[name] = p.detach()
        found |= {f"{name}: {key}": value.detach() for key, value in optimizer.state[p].items()}
    return found


def kept(net: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """A copy of them."""
    return {key: value.clone() for key, value in numbers(net, optimizer).items()}


def same(mine: dict[str, Tensor], whole: dict[str, Tensor], what: Any) -> None:
    """Demand that this rank's numbers have the bits of its part of the whole ones."""
    assert mine.keys() == whole.keys(), f"{what}: {sorted(mine.keys() ^ whole.keys())[:9]}"
    for key, value in mine.items():
        assert value.shape == whole[key].shape, f"{what}: {key}"
        assert torch.equal(bits(value), bits(like(whole[key], value))), f"{what}: {key}"


def bits(t: Any) -> Tensor:
    """Bytes of what this rank has of a tensor, after one for its dtype."""
    t = t._local_tensor if hasattr(t, "placements") else t
    kind = torch.tensor([sum(str(t.dtype).encode()) % 251], dtype=torch.uint8)
    return torch.cat([kind, t.contiguous().reshape(-1).view(torch.uint8)])


def states(pair: Pair, **choice: Any) -> dict[str, Any]:
    """State dicts of both, which DCP saves, or reads into; choice: of StateDictOptions."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    model, optimizer = get_state_dict(*pair, options=StateDictOptions(**choice))
    return {"model": model, "optimizer": optimizer}


def save(pair: Pair, folder: Path, alone: bool = False, **choice: Any) -> None:
    """By all ranks, or by this one alone."""
    from torch.distributed.checkpoint.state_dict_saver import save

    save(states(pair, **choice), checkpoint_id=folder, no_dist=alone)


def load(pair: Pair, folder: Path, state: dict[str, Any], mesh: Any, planner: Any = None, **choice: Any) -> None:
    """Read into state dicts and take those over; by the ranks of a mesh (two dims: all), None: by this one alone."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
    from torch.distributed.checkpoint.state_dict_loader import load

    group = mesh.get_group() if mesh is not None and mesh.ndim == 1 else None
    load(state, checkpoint_id=folder, planner=planner, process_group=group, no_dist=mesh is None)
    options = StateDictOptions(**choice)
    model, optimizer = state["model"], state["optimizer"]
    set_state_dict(*pair, model_state_dict=model, optim_state_dict=optimizer, options=options)


def load_whole(pair: Pair, other: Pair) -> None:
    """Another's state, gathered, straight into an optimizer; its weights are left."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

    state = get_optimizer_state_dict(*other, options=StateDictOptions(full_state_dict=True))
    pair[1].load_state_dict(copy.deepcopy(state))
    pair[1].materialize_state()


class Small(nn.Module):
    """Uneven rows, quantised ones of which the fourth of four ranks has none."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 1401, dtype=dtype), nn.Linear(1401, 3, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Run:
    """A net, whole or under FSDP2, and its optimizer."""

    def __init__(self, cls: Any, dtype: torch.dtype, mesh: Any = None, **options: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        self.net: Any = Small(dtype)
        if mesh is not None:
            fully_shard(self.net, mesh=mesh)
        ours = {"backend": "eager"} if cls.__module__.startswith("fusedopt") else {}
        self.optimizer = cls(list(self.net.named_parameters()), **{"lr": 1e-2, **ours, **copy.deepcopy(options)})

    @property
    def pair(self) -> Pair:
        return self.net, self.optimizer

    def numbers(self) -> dict[str, Tensor]:
        return numbers(*self.pair)

    def train(self, *steps: int) -> None:
        train(steps, self.pair)
