"""Checkpoints of `torch.distributed.checkpoint` beside formats: other rules, torch's own files, other groups, what goes
wrong. Two processes, each running `one_rank` below over gloo.
"""

import copy
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import dcp_nets
import pytest
import ranks
import torch
from dcp_nets import Run
from torch import distributed, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

import fusedopt

STOCHASTIC = {"master_weights": "split8", "state_dtype": {"exp_avg": "int8", "exp_avg_sq": "bfloat16"}}
CASES: tuple[tuple[Any, torch.dtype, dict[str, Any]], ...] = (
    (fusedopt.NAdam, torch.float32, {"ema_decay": 0.9, "ema_warmup": True}),
    (fusedopt.ASGD, torch.float32, {}),
    (fusedopt.SGD, torch.float32, {}),
    (fusedopt.SGD, torch.bfloat16, {"momentum": 0.9, "master_weights": "kahan"}),
    (fusedopt.Adagrad, torch.float32, {"lr": torch.tensor(0.1), "initial_accumulator_value": 0.1}),
    (fusedopt.AdamWScheduleFree, torch.float32, {"weight_decay": 0.1}),
    (
        fusedopt.LAMB,
        torch.float16,
        {"master_weights": "float32", "state_dtype": "int8", "clip_grad_norm": torch.tensor(9.0)},
    ),
    (fusedopt.AdamW, torch.bfloat16, {**STOCHASTIC, "seed": 3, "amsgrad": False}),
)


@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
def test_checkpoints_of_two_ranks(tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path)


def load(run: Run, folder: Path, mesh: Any, without: str = "", planner: Any = None, **choice: Any) -> None:
    """Read by all ranks, or, without a mesh, by this one alone; without: a group key that is not read."""
    state = dcp_nets.states(run.pair, **choice)
    for group in state["optimizer"]["param_groups"] if without else ():
        group.pop(without)
    dcp_nets.load(run.pair, folder, state, mesh, planner, **choice)


def one_rank(store: str, rank: int) -> None:
    """What one of two processes checks."""
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.device_mesh import DeviceMesh

    folder, mesh = Path(store).parent, DeviceMesh("cpu", [0, 1])
    for number, case in enumerate(CASES):
        _rules(folder / f"rules{number}", mesh, *case)
    _masks(folder, mesh)
    _torch_files(folder, mesh)
    _other_groups(folder, mesh)
    _replicas(folder, mesh)
    _older_shards(folder, mesh, rank)
    if rank == 0:
        _one_file(folder)
        _killed(folder)
    ranks.finish()


def _rules(folder: Path, mesh: Any, cls: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Saved sharded, flattened and not; loaded sharded and by one process."""
    whole, parts = Run(cls, dtype, **options), Run(cls, dtype, mesh, **options)
    for run in (whole, parts):
        run.train(0, 1)
    before = dcp_nets.kept(*whole.pair)
    for flat in (False, True):
        dcp_nets.save(parts.pair, folder / str(flat), flatten_optimizer_state_dict=flat)
    whole.train(2)
    for flat in (False, True):
        for where in (mesh, None):
            run = Run(cls, dtype, where, **{**options, "lr": torch.tensor(1.0)} if "lr" in options else options)
            if not flat:
                run.optimizer.materialize_state()
            load(run, folder / str(flat), where, flatten_optimizer_state_dict=flat)
            dcp_nets.same(run.numbers(), before, f"{cls.__name__}, {options}, flat {flat}, read by {where}")
            run.train(2)
            dcp_nets.same(run.numbers(), whole.numbers(), f"{cls.__name__}, {options}, flat {flat}, after {where}")


def _masks(folder: Path, mesh: Any) -> None:
    """A mask is read where one is set."""
    runs = [Run(fusedopt.AdamW, torch.float32, where) for where in (None, mesh, mesh, None)]
    for run, blank in zip(runs, (False, False, True, True), strict=True):
        mask = torch.arange(1401 * 4).reshape(1401, 4) % 3 > 0
        run.optimizer.set_update_mask(run.net.first.weight, torch.zeros_like(mask) if blank else mask)
        if not blank:
            run.train(0)
    dcp_nets.save(runs[1].pair, folder / "masks")
    for run in runs[2:]:
        run.optimizer.materialize_state()  # state of one parameter alone is all that torch would read
        load(run, folder / "masks", None if run is runs[3] else mesh)
    for run in runs:
        run.train(1)
    for run in runs[1:]:
        dcp_nets.same(run.numbers(), runs[0].numbers(), "a mask")


def _torch_files(folder: Path, mesh: Any) -> None:
    """What torch.optim wrote under FSDP2 and what it reads."""
    theirs, ours = Run(torch.optim.AdamW, torch.float32, mesh), Run(fusedopt.AdamW, torch.float32, mesh, lr=1.0)
    theirs.train(0, 1)
    for flat in (False, True):
        path = folder / f"torch{flat}"
        dcp_nets.save(theirs.pair, path, flatten_optimizer_state_dict=flat)
        for run in (ours, Run(fusedopt.AdamW, torch.float32, lr=1.0)):
            load(run, path, mesh if run is ours else None, flatten_optimizer_state_dict=flat)
            if run is ours:
                dcp_nets.same(run.numbers(), theirs.numbers(), "torch's state")
            assert run.optimizer.param_groups[0]["lr"] == 1e-2
        back = Run(torch.optim.AdamW, torch.float32, mesh, lr=1.0)
        dcp_nets.save(ours.pair, folder / f"ours{flat}", flatten_optimizer_state_dict=flat)
        load(back, folder / f"ours{flat}", mesh, flatten_optimizer_state_dict=flat)
        dcp_nets.same(back.numbers(), theirs.numbers(), "our state in torch")
    for flat in (False, True):
        clipped = Run(fusedopt.AdamW, torch.float32, mesh, clip_grad_norm=1.0)
        with pytest.raises(CheckpointException, match=r"Missing key in checkpoint state_dict: optimizer.*fusedopt"):
            load(clipped, folder / f"torch{flat}", mesh, flatten_optimizer_state_dict=flat)
        for way in ({"planner": DefaultLoadPlanner(allow_partial_load=True)}, {"without": "fusedopt"})[: 2 - flat]:
            clipped = Run(fusedopt.AdamW, torch.float32, mesh, clip_grad_norm=1.0)
            load(clipped, folder / f"torch{flat}", mesh, **way, flatten_optimizer_state_dict=flat)
            dcp_nets.same(clipped.numbers(), theirs.numbers(), "torch's state beside options")
            assert clipped.optimizer.param_groups[0]["fusedopt"] == {"version": 1, "clip_grad_norm": 1.0}
    both = [Run(fusedopt.AdamW, torch.float32, where, state_dtype="int8") for where in (mesh, None)]
    for run in both:
        dcp_nets.load_whole(run.pair, theirs.pair)
    dcp_nets.same(both[0].numbers(), both[1].numbers(), "torch's state in codes")
    coded = Run(fusedopt.AdamW, torch.float32, mesh, state_dtype="int8")
    coded.train(0)
    back.optimizer.load_state_dict(coded.optimizer.to_torch_state_dict())
    whole = Run(fusedopt.AdamW, torch.float32, state_dtype="int8")
    whole.train(0)
    plain = Run(torch.optim.AdamW, torch.float32)
    plain.optimizer.load_state_dict(whole.optimizer.to_torch_state_dict())
    state = {key: value for key, value in back.numbers().items() if ":" in key}
    dcp_nets.same(state, {key: value for key, value in plain.numbers().items() if ":" in key}, "codes for torch")


def _other_groups(folder: Path, mesh: Any) -> None:
    """Flattened, into two optimizers and back into one: hyper-parameters and streams follow the names."""
    options = {"state_dtype": "bfloat16", "state_rounding": "stochastic", "seed": 5}
    whole, parts = (Run(fusedopt.AdamW, torch.float32, where, **options) for where in (None, mesh))
    for run in (whole, parts):
        run.train(0, 1)
    dcp_nets.save(parts.pair, folder / "one", flatten_optimizer_state_dict=True)
    stages = Run(fusedopt.AdamW, torch.float32, mesh, **options)
    named = list(stages.net.named_parameters())
    stages.optimizer = [
        fusedopt.AdamW(half, backend="eager", **{**options, "seed": 0}) for half in (named[2:], named[1::-1])
    ]
    load(stages, folder / "one", mesh, flatten_optimizer_state_dict=True)
    assert [len(o.param_groups[0]["param_names"]) for o in stages.optimizer] == [2, 2]
    dcp_nets.save(stages.pair, folder / "two", flatten_optimizer_state_dict=True)
    again = Run(fusedopt.AdamW, torch.float32, mesh, **options)
    load(again, folder / "two", mesh, flatten_optimizer_state_dict=True)
    whole.train(2)
    again.train(2)
    dcp_nets.same(again.numbers(), whole.numbers(), "two optimizers' in one")
    generator = torch.Generator().manual_seed(2)
    for p in stages.net.parameters():
        p.grad = dcp_nets.like(torch.randn(p.shape, generator=generator, dtype=p.dtype), p)
    for optimizer in stages.optimizer:
        optimizer.step()
    found = {
        key: value for o in stages.optimizer for key, value in dcp_nets.numbers(stages.net, o).items() if ":" in key
    }
    dcp_nets.same(found, {key: value for key, value in whole.numbers().items() if ":" in key}, "one's in two")
    nameless = [fusedopt.AdamW([p for _, p in half], backend="eager", **options) for half in (named[2:], named[:2])]
    stages.optimizer = nameless
    stages.net.zero_grad()
    with pytest.raises(ValueError, match="belong to its parameters cannot be told"):
        load(stages, folder / "one", mesh, flatten_optimizer_state_dict=True)


def _replicas(folder: Path, mesh: Any) -> None:
    """DDP's checkpoint under FSDP2 and the other way round; whole state dicts go straight into the optimizer."""
    whole, parts, copies = (Run(fusedopt.AdamW, torch.bfloat16, where, **STOCHASTIC) for where in (None, mesh, None))
    runs = whole, parts, copies
    copies.net = nn.parallel.DistributedDataParallel(copies.net)
    for run in runs:
        run.train(0, 1)
    dcp_nets.save(copies.pair, folder / "ddp")
    dcp_nets.save(parts.pair, folder / "fsdp")
    into = [Run(fusedopt.AdamW, torch.bfloat16, where, **STOCHASTIC) for where in (mesh, None, mesh)]
    load(into[0], folder / "ddp", mesh)
    into[1].net = nn.parallel.DistributedDataParallel(into[1].net)
    load(into[1], folder / "fsdp", mesh)
    into[2].net.load_state_dict(parts.net.state_dict())
    dcp_nets.load_whole(into[2].pair, copies.pair)
    whole.train(2)
    for run in into:
        run.train(2)
        got = {key.removeprefix("module."): value for key, value in run.numbers().items()}
        dcp_nets.same(got, whole.numbers(), "replicas and shards")


def _older_shards(folder: Path, mesh: Any, rank: int) -> None:
    """FSDP1 gathers what it cuts itself, where all state of a parameter is of one dtype."""
    runs = [Run(fusedopt.AdamW, torch.bfloat16) for _ in range(2)]
    for run in runs:
        run.net = FSDP(run.net, use_orig_params=True, device_id=torch.device("cpu"))
        run.optimizer = fusedopt.AdamW(run.net.parameters(), state_dtype="bfloat16", master_weights="kahan")
    for step in range(3):
        if step == 2:
            dcp_nets.save(runs[0].pair, folder / "fsdp1")
            dcp_nets.load(runs[1].pair, folder / "fsdp1", dcp_nets.states(runs[1].pair), mesh)
        x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(step)).to(torch.bfloat16)
        for run in runs[: 1 + step // 2]:
            run.net(x[rank]).square().sum().backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    dcp_nets.same(runs[1].numbers(), runs[0].numbers(), "FSDP1")


def _one_file(folder: Path) -> None:
    """What two ranks saved in parts, as one file, which goes straight into an optimizer of other formats."""
    dcp_to_torch_save(folder / "fsdp", folder / "one.pt")
    file = torch.load(folder / "one.pt", weights_only=False)
    exact, other = (Run(fusedopt.AdamW, torch.bfloat16, **options) for options in (STOCHASTIC, {"state_dtype": "int4"}))
    for run in (exact, other):
        run.net.load_state_dict(file["model"])
        run.optimizer.load_state_dict(copy.deepcopy(file["optimizer"]))
        run.optimizer.materialize_state()
    whole = Run(fusedopt.AdamW, torch.bfloat16, **STOCHASTIC)
    whole.train(0, 1)
    dcp_nets.same(exact.numbers(), whole.numbers(), "one file")
    other_state = other.optimizer.state[other.net.first.weight]
    assert other_state["exp_avg_q"].dtype == torch.int32 and other_state["step"] == 2


def _killed(folder: Path) -> None:
    """A process that is killed while it saves leaves what was saved before, and a folder that is refused."""
    run = Run(fusedopt.AdamW, torch.bfloat16, **STOCHASTIC)
    run.train(0)
    dcp_nets.save(run.pair, folder / "step1", alone=True)
    before = dcp_nets.kept(*run.pair)
    if (child := os.fork()) == 0:
        run.train(1)
        FileSystemWriter.finish = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        dcp_nets.save(run.pair, folder / "step2", alone=True)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert [*(folder / "step2").glob("*.distcp")] and not (folder / "step2" / ".metadata").exists()
    again = Run(fusedopt.AdamW, torch.bfloat16, **STOCHASTIC)
    with pytest.raises(CheckpointException, match="metadata"):
        load(again, folder / "step2", None)
    again = Run(fusedopt.AdamW, torch.bfloat16, **STOCHASTIC)
    load(again, folder / "step1", None)
    dcp_nets.same(again.numbers(), before, "what was saved before")


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(sys.argv[1], int(sys.argv[2]))
