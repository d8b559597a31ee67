"""Checkpoints of `torch.distributed.checkpoint`: saved by four ranks, read by three, two and one, in every format.

What is read has the bits of one process that was never interrupted, and so has the next step.
"""

import copy
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dcp_nets
import pytest
import ranks
import torch
from dcp_nets import EVERY, SOME, Formats, Pair, Run
from torch import Tensor, distributed, nn

import fusedopt

SAVED: dict[str, Any] = {"lr": 2e-2, "seed": 7}
"""Of what is saved; what it is read into is made with others."""


@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
def test_four_ranks_save_and_others_go_on(tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path, 4)


def one_rank(store: str, rank: int, world: int) -> None:
    """What one of four processes checks."""
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    line, square = DeviceMesh("cpu", [0, 1, 2, 3]), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    three, two = DeviceMesh("cpu", [0, 1, 2]), DeviceMesh("cpu", [0, 1])
    some = three if rank < 3 else None, two if rank < 2 else None
    folder = Path(store).parent
    _sharded(folder / "sharded", EVERY, line, some)
    _sharded(folder / "flat", SOME, line, some, flatten_optimizer_state_dict=True)
    _whole(line, square, rank)
    _first_step(folder / "first", line, square)
    _while_training(folder / "async", line, square)
    _placed(folder / "placed", line, square, some[0])
    _formats(folder / "formats", line, rank)
    ranks.finish()


def _sharded(folder: Path, formats: Formats, line: Any, meshes: tuple[Any, ...], **choice: Any) -> None:
    """Saved by all; read by three ranks while the fourth reads alone, then by two while two read alone."""
    whole, parts = dcp_nets.made(formats, **SAVED), dcp_nets.made(formats, line, **SAVED)
    dcp_nets.train(range(2), whole, parts)
    before = dcp_nets.kept(*whole)
    dcp_nets.same(dcp_nets.numbers(*parts), before, "saved")
    dcp_nets.save(parts, folder, **choice)
    dcp_nets.train([2], whole)
    for mesh in meshes:
        pair = dcp_nets.made(formats, mesh)
        new = [p.detach().clone() for p in pair[0].parameters()]
        state = dcp_nets.states(pair, **choice)  # makes state by a step with lr=0
        for p, was in zip(pair[0].parameters(), new, strict=True):
            assert torch.equal(dcp_nets.bits(p.detach()), dcp_nets.bits(was)), "the step that makes state moves weights"
        dcp_nets.load(pair, folder, state, mesh, **choice)
        _goes_on(pair, before, whole, f"{mesh}, {choice}")
        assert _drawn(pair[1]) == _drawn(parts[1]) != []


def _goes_on(pair: Pair, before: dict[str, Tensor], whole: Pair, case: str) -> None:
    """What was read, and the step after it."""
    dcp_nets.same(dcp_nets.numbers(*pair), before, f"read by {case}")
    assert all(group["lr"] == SAVED["lr"] for group in pair[1].param_groups)
    dcp_nets.train([2], pair)
    dcp_nets.same(dcp_nets.numbers(*pair), dcp_nets.numbers(*whole), f"the step after it by {case}")


def _drawn(optimizer: Any) -> list[Any]:
    """Seeds and streams of the groups that round stochastically."""
    options = [group.get("fusedopt", {}) for group in optimizer.param_groups]
    return [(chosen["seed"], chosen["streams"]) for chosen in options if "streams" in chosen]


def _whole(line: Any, square: Any, rank: int) -> None:
    """Gathered on all ranks or the first; spread again by all, from the first, or read by one process."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    whole, parts = dcp_nets.made(SOME, **SAVED), dcp_nets.made(SOME, line, **SAVED)
    dcp_nets.train(range(2), whole, parts)
    before = dcp_nets.kept(*whole)
    dcp_nets.train([2], whole)
    full: dict[str, Any] = {"full_state_dict": True}
    for flat in (False, True):
        for how, mesh in (({"cpu_offload": True, "broadcast_from_rank0": True}, line), ({}, square), ({}, None)):
            get = {name: how[name] for name in how if name == "cpu_offload"}
            found = get_state_dict(*parts, options=StateDictOptions(**full, **get, flatten_optimizer_state_dict=flat))
            assert bool(found[1]) == (rank == 0 or not how)
            model, state = copy.deepcopy(found)
            pair, options = dcp_nets.made(SOME, mesh), StateDictOptions(**full, **how)
            set_model_state_dict(pair[0], model, options=options)
            set_optimizer_state_dict(*pair, state, options=options)
            _goes_on(pair, before, whole, f"whole state dicts, {how}, {mesh}, flat {flat}")


def _first_step(folder: Path, line: Any, square: Any) -> None:
    """Before the first step there is state after `materialize_state`, of step 0 and nothing else."""
    whole, pair = dcp_nets.made(SOME), dcp_nets.made(SOME, line)
    pair[1].materialize_state()
    dcp_nets.save(pair, folder)
    assert all(state["step"] == 0 for state in pair[1].state.values())
    other = dcp_nets.made(SOME, square, lr=1.0)
    dcp_nets.load(other, folder, dcp_nets.states(other), square)
    for each in (whole, pair, other):
        dcp_nets.train([0], each)
        dcp_nets.same(dcp_nets.numbers(*each), dcp_nets.numbers(*whole), "the first step")


def _while_training(folder: Path, line: Any, square: Any) -> None:
    """An asynchronous save holds what was there when it was asked for; unnamed parameters, memory of the host."""
    from torch.distributed.checkpoint.state_dict_saver import async_save

    whole, pair = dcp_nets.made(SOME, named=False, **SAVED), dcp_nets.made(SOME, line, named=False, **SAVED)
    dcp_nets.train(range(2), whole, pair)
    before = dcp_nets.kept(*whole)
    running: Any = async_save(dcp_nets.states(pair), checkpoint_id=folder)
    dcp_nets.train([2], whole, pair)
    running.result()
    other = dcp_nets.made(SOME, square, named=False)
    other[1].materialize_state()
    dcp_nets.load(other, folder, dcp_nets.states(other, cpu_offload=True), square, cpu_offload=True)
    _goes_on(other, before, whole, "after an asynchronous save")
    dcp_nets.same(dcp_nets.numbers(*pair), dcp_nets.numbers(*whole), "trained while it was saved")


def _placed(folder: Path, line: Any, square: Any, three: Any) -> None:
    """From every kind of placement into rows on three ranks, one process, and the same places in another order."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    places = [
        (line, [Shard(1)]), (square, [Shard(0), Shard(1)]), (square, [Replicate(), Shard(0)]), (line, [Replicate()]),
        None, (square, [_StridedShard(0, split_factor=2), Shard(0)]), (square, [Shard(1), Replicate()]),
        (square["tp"], [Shard(0)]),
    ]  # fmt: skip
    rows = [None if three is None else (three, [Shard(0)])] * len(places)
    options: dict[str, Any] = {"state_dtype": "int8", "master_weights": "split8", "seed": 3}

    def made(where: list[Any], **more: Any) -> Pair:
        from torch.distributed.tensor import distribute_tensor

        generator = torch.Generator().manual_seed(1)
        net = nn.ParameterList()
        for place in where:
            p = torch.randn(64, 256, generator=generator, dtype=torch.bfloat16)
            net.append(nn.Parameter(p if place is None else distribute_tensor(p, *place, src_data_rank=None)))
        return net, fusedopt.AdamW(net.named_parameters(), backend="eager", **{**options, **more})

    whole, pair = made([None] * len(places), **SAVED), made(places, **SAVED)
    dcp_nets.train(range(2), whole, pair)
    before = dcp_nets.kept(*whole)
    dcp_nets.save(pair, folder)
    one, many = (copy.deepcopy(optimizer.state_dict()) for _, optimizer in (whole, pair))
    dcp_nets.train([2], whole)
    for where, mesh in ((rows, three), (places[::-1], line)):
        other = made(where)
        dcp_nets.load(other, folder, dcp_nets.states(other), mesh)
        _goes_on(other, before, whole, f"{where}")
    for where, state in ((places, one), (places[::-1], many), ([None] * len(places), many)):
        net, optimizer = made(where)
        optimizer.load_state_dict(copy.deepcopy(state))
        for name, p in net.named_parameters():
            p.detach().copy_(dcp_nets.like(before[name], p))
        _goes_on((net, optimizer), before, whole, f"{where}, without files")


def _formats(folder: Path, mesh: Any, rank: int) -> None:
    """Numbers of one format are not read as those of another; what would cut groups is refused."""
    from torch.distributed.checkpoint import state_dict as dcp
    from torch.distributed.tensor import Shard, distribute_tensor

    saved = {"state_dtype": "int8", "master_weights": "kahan"}
    parts, whole = (Run(fusedopt.AdamW, torch.bfloat16, where, **saved) for where in (mesh, None))
    for run in (parts, whole):
        run.train(0)
    dcp_nets.save(parts.pair, folder)
    full = dcp.StateDictOptions(full_state_dict=True)
    first = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = dcp.get_optimizer_state_dict(*parts.pair, options=full)
    for option, other in (("master_weights", "split16"), ("state_dtype", "float8_e5m2"), ("state_dtype", "float32")):
        kind = {**saved, option: other}
        run, refused = Run(fusedopt.AdamW, torch.bfloat16, mesh, **kind), f"saved with {option}='{saved[option]}' was"
        with pytest.raises(BaseException, match="Missing key" if other == "float32" else refused):
            dcp_nets.load(run.pair, folder, dcp_nets.states(run.pair), mesh)
        run = Run(fusedopt.AdamW, torch.bfloat16, mesh, **kind)
        with nullcontext() if other == "float32" and rank == 0 else pytest.raises(RuntimeError, match=refused):
            dcp.set_optimizer_state_dict(*run.pair, copy.deepcopy(state) if rank == 0 else {}, options=first)
        want = Run(fusedopt.AdamW, torch.bfloat16, **kind)
        want.net.load_state_dict(whole.net.state_dict())
        want.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
        want.train(1)
        for way in ("straight", "by torch", "later"):
            run = Run(fusedopt.AdamW, torch.bfloat16, mesh, **(saved if way == "later" else kind))
            run.net.load_state_dict(parts.net.state_dict())
            if way == "straight":
                run.optimizer.load_state_dict(copy.deepcopy(state))
            elif way == "by torch":
                dcp.set_optimizer_state_dict(*run.pair, copy.deepcopy(state), options=full)
            else:
                dcp_nets.load(run.pair, folder, dcp_nets.states(run.pair), mesh)
                run.optimizer.param_groups[0]["fusedopt"][option] = other
            run.train(1)
            dcp_nets.same(run.numbers(), want.numbers(), f"{kind}, {way}")
    cut = nn.ParameterList([distribute_tensor(torch.zeros(64, 96), mesh, [Shard(1)])])
    with pytest.raises(RuntimeError, match="would cut: shard it along dim 0"):
        dcp.get_optimizer_state_dict(cut, fusedopt.AdamW(cut.parameters(), state_dtype="int8"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
