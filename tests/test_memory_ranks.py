"""`fusedopt.memory.per_rank` against what sharded tensors of torch hold, byte for byte; `fusedopt memory --world`.

Collectives of the process group are torch's own imitations, so that one process is any rank of any number.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_memory import Net, agree, parameters, storage
from test_memory_command import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import fusedopt
from fusedopt.memory import Memory, Ranks, estimate, per_rank, report
from fusedopt.memory.share import Sharding, Share, owners

LOW: dict[str, Any] = dict(master_weights="split8", state_dtype="int8")


@contextmanager
def rank_of(world: int, rank: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Block(nn.Module):
    """Rows that ranks share evenly, unevenly and not at all; quantised, too small and too short for it; one frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(70, 131)
        self.second = nn.Linear(131, 48, bias=False)
        self.last = nn.Linear(48, 2)
        self.first.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x)))


def local(t: Tensor) -> Tensor:
    return getattr(t, "to_local", lambda: t)()


def nbytes(tensors: Iterable[Tensor]) -> int:
    return storage(map(local, tensors))


def check(memory: Memory, model: nn.Module, optimizer: fusedopt.FusedOptimizer) -> None:
    """What a real model and optimizer of one rank have allocated."""
    params = list(model.parameters())
    state: dict[str, list[Tensor]] = {}
    for held in optimizer.state.values():
        for key, value in held.items():
            state.setdefault(key, []).append(value)
    assert memory.parameters == sum(local(p).numel() for p in params)
    assert memory.weights == nbytes(params)
    assert memory.gradients == nbytes(p.grad for p in params if p.grad is not None)
    for slot, bytes_ in memory.state.items():
        assert bytes_ == nbytes([*state.get(slot, ()), *state.get(f"{slot}_q", ())]), slot
    assert memory.scales == nbytes(t for key, found in state.items() if key.endswith("_scale") for t in found)
    assert memory.masters == nbytes(state.get("param_residual", ()))
    assert memory.ema == nbytes(state.get("ema", ()))
    assert memory.optimizer == nbytes(t for found in state.values() for t in found)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, dict(amsgrad=True, ema_decay=0.9)),
        (torch.bfloat16, dict(**LOW, ema_decay=0.9)),
        (torch.bfloat16, dict(master_weights="split16", state_dtype="int4")),
    ],
    ids=["fp32", "int8", "int4"],
)
def test_ranks_hold_what_sharded_tensors_do(dtype: torch.dtype, options: dict[str, Any]) -> None:
    with torch.device("meta"):
        before = Block().to(dtype)
    for world, shard in ((3, "fsdp"), (64, "fsdp"), (6, "hsdp:3")):
        ranks = per_rank(before, "adamw", world, shard, **options)
        assert ranks.fullest[0] == 0 and ranks.emptiest[0] == ranks.sharding.over - 1
        for rank, memory in (ranks.fullest, ranks.emptiest):
            with rank_of(world, rank):
                shape, names = ((2, 3), ("copies", "shards")) if shard != "fsdp" else ((world,), ("shards",))
                model: Any = fully_shard(Block().to(dtype), mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))
                model(torch.ones(2, 70, dtype=dtype)).sum().backward()
                optimizer = fusedopt.AdamW(model.parameters(), **options)
                optimizer.materialize_state()
                check(memory, model, optimizer)
        assert ranks.empty == sum(not rows for rows in _rows(before, ranks))
    assert ranks.whole == estimate(before, "adamw", **options)


def _rows(model: nn.Module, ranks: Ranks) -> list[int]:
    share = Share(ranks.emptiest[0], ranks.sharding.over)
    return [share.rows(p.shape[0]) for p in model.parameters()]


def test_rows_are_cut_as_torch_cuts_them() -> None:
    for count in (0, 1, 2, 7, 64, 65, 8192):
        for world in (1, 2, 3, 8, 64, 1000):
            chunks = [len(chunk) for chunk in torch.empty(count, 0).chunk(world)] if count else []
            expected = [*chunks, *[0] * (world - len(chunks))]
            assert [Share(rank, world).rows(count) for rank in range(world)] == expected


def test_state_of_all_ranks_is_that_of_the_whole() -> None:
    """Nothing is lost or held twice but step counts; what pads weights and gradients is the only thing that is more."""
    from fusedopt.memory.held import Twins

    model, world = Block().to(torch.bfloat16), 5
    twins = Twins(model)
    optimizer = fusedopt.AdamW(twins.groups, **LOW, ema_decay=0.9)
    whole, ranks = twins.count(optimizer), [twins.count(optimizer, None, Share(r, world)) for r in range(world)]
    for name in ("parameters", "trainable", "scales", "masters", "ema"):
        assert sum(getattr(held, name) for held in ranks) == getattr(whole, name), name
    assert sum(held.state["exp_avg"] for held in ranks) == whole.state["exp_avg"]
    assert {held.counters for held in ranks} == {whole.counters}
    assert {held.weights for held in ranks} == {ranks[0].weights} and ranks[0].weights * world > whole.weights


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch's own import
def test_zero1_gives_each_rank_what_torch_gives_it() -> None:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    shapes = [(8, 8), (64,), (64, 64), (70, 65), (4096,), (64, 64), (3,), (5, 5), (4096,)]
    for world in (1, 2, 4, 12):
        params = parameters(shapes, torch.bfloat16)
        found = owners([params[:5], params[5:]], world)
        with rank_of(world, 0):
            groups = [{"params": params[:5]}, {"params": params[5:]}]
            zero: Any = ZeroRedundancyOptimizer(groups, torch.optim.SGD, lr=1.0)  # pyright: ignore[reportArgumentType] # groups are fine
            theirs = zero._partition_parameters()
        expected = [{p for group in groups for p in group["params"]} for groups in theirs]
        assert [set(owned) for owned in found] == expected
        ranks = per_rank(groups, "adamw", world, "zero1", **LOW)
        for rank, memory in (ranks.fullest, ranks.emptiest):
            own = [p for p in params if p in expected[rank]]
            held = estimate(own, "adamw", **LOW).optimizer if own else 0
            assert memory.optimizer == held
            assert (memory.weights, memory.gradients) == (ranks.whole.weights, ranks.whole.gradients)
            assert memory.tensors == len(params)
        assert ranks.empty == len(params) - len(expected[ranks.emptiest[0]])


def test_ddp_and_one_rank_hold_everything() -> None:
    net = Net()
    whole = estimate(net, "adamw", ema_decay=0.9)
    for world, shard in ((1, "fsdp"), (1, "zero1"), (7, "ddp"), (7, "hsdp:1")):
        ranks = per_rank(net, "adamw", world, shard, ema_decay=0.9)
        assert ranks.fullest == ranks.emptiest == (0, whole) and ranks.whole == whole and ranks.empty == 0
    optimizer = fusedopt.AdamW([p for p in net.parameters() if p.requires_grad])
    params = [p for p in net.parameters() if p.requires_grad]
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    agree(per_rank(params, "adamw", 3, "ddp").fullest[1], params, optimizer)


def test_matrix_rules_are_counted_where_matrices_stay_whole() -> None:
    params = parameters([(64, 64), (64, 128)], torch.float32)
    ranks = per_rank(params, "muon", 2, "zero1")
    assert [held.state["momentum_buffer"] for _, held in (ranks.fullest, ranks.emptiest)] == [4 * 64 * 128, 4 * 64 * 64]


@pytest.mark.parametrize(
    ("rule", "world", "shard", "message"),
    [
        ("adamw", 0, "fsdp", "world must be a number of ranks, 1 or more, got 0"),
        ("adamw", True, "fsdp", "world must be a number of ranks"),
        ("adamw", 4, "fsdp2", "shard must be fsdp, hsdp:K, ddp or zero1"),
        ("adamw", 4, "fsdp:2", "shard must be"),
        ("adamw", 4, "hsdp", "shard must be"),
        ("adamw", 4, "hsdp:3", "takes a K that divides world=4, got 'hsdp:3'"),
        ("adamw", 4, "hsdp:0", "takes a K that divides"),
        ("adamw", 4, "hsdp:²", "takes a K that divides"),
        ("muon", 4, "fsdp", "muon needs whole ones; use shard='ddp' or 'zero1'"),
    ],
)
def test_what_cannot_be_sharded_is_named(rule: str, world: int, shard: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_rank(parameters([(64, 64)], torch.float32), rule, world, shard)


def test_a_scalar_parameter_is_refused_as_torch_refuses_it() -> None:
    params = parameters([(), (3,)], torch.float32)
    with pytest.raises(ValueError, match="no scalar parameters; give them a dimension of size 1"):
        per_rank(params, "adamw", 2)
    assert per_rank(params, "adamw", 2, "zero1").whole.parameters == 4
    model = nn.Module()
    model.scalar = params[0]
    with rank_of(2, 0), pytest.raises(ValueError, match="scalar parameters"):
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


# The command ---------------------------------------------------------------------------------------------------------
def test_the_command_counts_a_rank(capsys: pytest.CaptureFixture[str]) -> None:
    options = "adamw --model llama3-70b --param-dtype bf16 --master-weights split8 --state-dtype int8".split()
    status, out, err = run(capsys, *options, "--world", "64")
    words = " ".join(out.split())
    assert (status, err) == (0, "")
    assert "64 ranks, fully_shard over all of them" in words and "each rank, MiB" in words
    assert "state exp_avg, int8 65.71 1,051.31" in words and "state exp_avg_sq, uint8" in words
    assert "pads every rank's weights and gradients" in words
    assert max(map(len, out.splitlines())) <= report.WIDTH
    status, out, err = run(capsys, *options, "--world", "1000", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "") and (found["world"], found["shard"]) == (1000, "fsdp")
    fullest, emptiest = (found["ranks"][name] for name in ("fullest", "emptiest"))
    rows = {8192: 9, 1024: 2, 28672: 29, 128256: 129}  # of 1,000 ranks the first
    count = 80 * 8192 * (2 * rows[8192] + 2 * rows[1024] + 2 * rows[28672]) + 80 * 28672 * rows[8192]
    count += 2 * 8192 * rows[128256] + (2 * 80 + 1) * rows[8192]
    assert (fullest["rank"], fullest["memory"]["parameters"]) == (0, count)
    assert fullest["memory"]["weights"] == emptiest["memory"]["weights"] == 2 * count
    assert (emptiest["rank"], emptiest["memory"]["parameters"]) == (999, 0) and found["empty_on_emptiest"] == 723
    assert fullest["memory"]["formats"]["exp_avg"] == {"int8": count - 161 * 9, "float32": 4 * 161 * 9}


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("hsdp:8", "32 ranks, fully_shard over groups of 8, of which there are 4"),
        ("ddp", "32 ranks, DDP: every rank holds everything"),
        ("zero1", "Of 141 of 148 tensors rank 16 keeps no state."),
    ],
)
def test_the_command_takes_every_sharding(shard: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "--model", "gpt2", "--world", "32", "--shard", shard)
    assert (status, err) == (0, "") and words in " ".join(out.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "ddp"], "--shard says how --world ranks share the model: give --world too"),
        (["--world", "0"], "0 is not in the range x>=1"),
        (["--world", "4", "--shard", "tp"], "--shard must be fsdp, hsdp:K, ddp or zero1"),
        (["--world", "6", "--shard", "hsdp:4"], "a K that divides world=6"),
        (["adafactor", "--world", "2"], "adafactor needs whole ones"),
        (["adamw", "--clip-grad-norm", "1.0", "--norm-at-backward", "--world", "2"], "norm_at_backward does not take"),
        (["--wrld", "2"], "did you mean --world?"),
    ],
)
def test_bad_input_about_ranks_gets_one_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *options)
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1


def test_shardings_have_names() -> None:
    assert [Sharding.of(8, name).over for name in ("fsdp", "hsdp:4", "ddp", "zero1")] == [8, 4, 1, 1]
