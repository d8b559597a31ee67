"""``python -m perf.scale``: traffic against the collectives of `fully_shard`, times against hand arithmetic, the page.

Rows of a GPU here are invented.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from matplotlib.image import imread
from perf_rows import GPU
from torch import Tensor, nn

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from fusedopt.shapes import Model
from perf import predict
from perf.report.drawing import save
from perf.results import Row, Writer, read
from perf.scale import page, plot, sharded, simulate
from perf.scale.__main__ import ROWS, main
from perf.scale.cluster import Cluster
from perf.scale.simulate import OURS, SMALL, TORCH, WAYS, WORLDS, Simulation


def simulation(model: str = "gpt2", rows: Sequence[Row] = ()) -> Simulation:
    return Simulation(model, "H200", rows)


def dtensor_rows(ours: float = 0.5, theirs: float = 4.0) -> list[Row]:
    """Of torch's fused step over plain tensors, the times that steps over DTensors take."""
    about = {"kind": "sharded", "tensors": 100, "work": "clip", "commit": "abc1234", "machine": GPU}
    return [
        {**about, "contender": who, "dtensor": dtensor, "ratio": ratio, "host_us": 1000 * ratio, "all_reduces": 1,
         "payload": payload}
        for who, payload, ratio in (("fusedopt", 16, ours), ("torch fused", 400, theirs)) for dtensor in (True, False)
    ]  # fmt: skip


# Traffic -------------------------------------------------------------------------------------------------------------
class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 18)
        self.layers = nn.ModuleList([nn.Linear(18, 18), nn.Linear(18, 18, bias=False), nn.Linear(18, 18)])
        self.head = nn.Linear(18, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class Moved(TorchDispatchMode):
    """Bytes of whole buffers that are gathered, and reduced and scattered."""

    def __init__(self) -> None:
        super().__init__()
        self.gathered: list[int] = []
        self.reduced: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._opname == "_allgather_base_":
            self.gathered.append(args[0].nbytes)
        if func._opname == "_reduce_scatter_base_":
            self.reduced.append(args[1].nbytes)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("world", [2, 4, 7])
def test_traffic_is_that_of_fully_shard(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Tiny()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    monkeypatch.setattr(simulate, "MODELS", {"tiny": Model("tiny", "here", lambda: shapes)})
    with sharded.other_ranks(world):
        policy, mesh = MixedPrecisionPolicy(param_dtype=torch.bfloat16), init_device_mesh("cpu", (world,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        with Moved() as moved:
            model(torch.ones(3, 5)).sum().backward()
    found = simulation("tiny").traffic(world)
    assert (found.gathered, found.reduced) == (sum(moved.gathered), sum(moved.reduced))
    assert found.calls == len(moved.gathered) + len(moved.reduced) == 3 * 3 + 2
    assert found.received(world) == (found.gathered + found.reduced) * (world - 1) / world


def test_collectives_take_what_their_formulas_say() -> None:
    cluster = Cluster()
    assert cluster.all_reduce(1) == cluster.ring_latency(1) == cluster.gathering(1, 1e9) == 0
    assert cluster.all_reduce(8) == pytest.approx(6.8e-6 + 2 * 7 * 0.6e-6)
    assert cluster.all_reduce(1024) == pytest.approx(6.8e-6 + 2 * (7 * 0.6e-6 + 7 * 5e-6))
    assert cluster.ring_latency(16) == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 14e-6)
    assert cluster.gathering(8, 1e12) == pytest.approx(7 / 8 * 1e12 / 450e9 / 0.8)  # NVLink
    assert cluster.gathering(1024, 1e12) == pytest.approx(1016 / 1024 * 1e12 / 400e9 / 0.8)  # eight network cards
    assert cluster.compute(10**9, 1000) == pytest.approx(6e12 / (0.4 * 989e12))


# Steps ---------------------------------------------------------------------------------------------------------------
def test_a_step_moves_its_shards_bytes() -> None:
    found = simulation("llama3-70b", dtensor_rows())
    for way, moved in ((OURS, 32), (SMALL, 14.19), (TORCH, 40)):
        step = found.step(way, 64)  # 64 divides every number of rows
        assert step.sweeps == pytest.approx(moved * found.parameters / 64 / 4.3e12, rel=2e-3)
        assert step.device == step.sweeps + step.rest + Cluster().all_reduce(64) and not step.sources
        assert found.step(way, 8).sweeps == pytest.approx(8 * step.sweeps)
        assert step.wall == max(step.device, step.host)
    assert found.bytes_of(OURS, 64).fullest[1].total == pytest.approx(16 * found.parameters / 64, rel=1e-5)


def test_an_uneven_world_waits_for_the_fullest_rank() -> None:
    found = simulation("llama3-70b")
    assert found.step(OURS, 1000).sweeps > 1.06 * found.parameters * 32 / 1000 / 4.3e12


def test_what_limits_a_step_is_named() -> None:
    found = simulation("llama3-70b", dtensor_rows())
    assert [found.step(TORCH, world).limit for world in (8, 1024)] == ["bandwidth", "host"]
    assert found.step(OURS, 8).limit == "bandwidth" and found.step(OURS, 1024).device < found.step(OURS, 8).device
    quick = simulation("gpt2", dtensor_rows(ours=1e-6))
    quick.times.host.clear()  # pyright: ignore[reportAttributeAccessIssue] # a dict
    with pytest.raises(ValueError, match="rows of kind host are missing"):
        quick.step(OURS, 8)


def test_host_time_is_that_over_dtensors_where_it_was_measured() -> None:
    slow, fast = (simulation("gpt2", dtensor_rows(theirs=ratio)) for ratio in (8.0, 4.0))
    base = fast.times.host["torch fused", "step"]
    once = base[0] + base[1] * 148
    assert slow.step(TORCH, 8).host - fast.step(TORCH, 8).host == pytest.approx(4 * once)
    assert simulation("gpt2").step(TORCH, 8).host < fast.step(TORCH, 8).host, "over plain tensors"


def test_measured_rows_of_the_same_gpu_correct_the_prediction() -> None:
    """As if a step took twice as long on the device, and three times in Python."""
    before = simulation("llama3-8b")
    about = {"kind": "measured", "device": "cuda", "case": "llama3-8b", "part": "8 of 32 layers", "tensors": 75}
    about |= {"elements": 2_796_032_000, "format": "fp32", "work": "clip", "graph": False, "contender": "fusedopt"}
    row: Row = {**about, "machine": {**GPU, "cuda": "13.0"}, "commit": "abc1234", "dirty": False}
    guess = predict.compare({**row, "device_ms": 1.0, "host_us": 1.0, "wall_ms": 1.0}, predict.known([]))
    assert guess is not None
    row |= {"device_ms": 2 * guess["device_ms"], "host_us": 3 * guess["host_us"]}
    after = simulation("llama3-8b", [row])
    old, new = before.step(OURS, 8), after.step(OURS, 8)
    assert new.sweeps == pytest.approx(2 * old.sweeps) and new.rest == pytest.approx(2 * old.rest)
    assert new.host == pytest.approx(3 * old.host) and new.reduce == old.reduce
    assert after.step(TORCH, 8) == before.step(TORCH, 8), "of another contender nothing was measured"
    assert "corrected by what was measured on Invented H200, llama3-8b" in page.steps(page.Plan(after, (8,)))
    other = simulation("llama3-8b", [{**row, "machine": {**row["machine"], "gpu": "Invented A100"}}])
    assert other.step(OURS, 8) == old and simulation("llama3-8b", [{**row, "graph": True}]).step(OURS, 8) == old


def test_python_over_dtensors_is_measured_and_collectives_are_counted(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "rows.jsonl")
    sharded.rows(writer, "gpt2", 6, rounds=3)
    found = {(row["contender"], row["work"], row["dtensor"]): row for row in read(writer.path)}
    assert len(found) == 8 and all(row["kind"] == "sharded" and row["world"] == 4 for row in found.values())
    sums = {key: (row["all_reduces"], row["payload"]) for key, row in found.items() if row["all_reduces"]}
    assert sums == {("fusedopt", "clip", True): (1, 16), ("torch fused", "clip", True): (1, 6 * 4)}
    assert found["torch fused", "step", False]["ratio"]["median"] == 1
    assert not torch.distributed.is_initialized()


# The page ------------------------------------------------------------------------------------------------------------
def test_every_number_on_the_page_says_how_it_is_known() -> None:
    plan = page.Plan(simulation("gpt2", dtensor_rows()), (8, 16))
    for name, make in page.BLOCKS.items():
        text = make(plan)
        words = ("assumed",) if name == "assumptions" else ("exact", "Exact", "predicted", "Predicted")
        assert any(word in text for word in words), name
    heads = page.traffic(plan).split("\n\n")[1].splitlines()[0].split(" | ")
    assert all(any(word in head for word in ("predicted", "exact")) for head in heads[1:])
    assert "**All of it predicted** for an H200; no GPU was measured" in page.steps(plan)
    assert all("predicted" in line or "exact" in line for line in page.verdicts(plan).splitlines())
    assert "| torch fused | 1 | 400 | 4,000 | 4,000 | 1.00 × |" in page.traffic(plan)
    assert "fusedopt" not in page.traffic(page.Plan(simulation("gpt2"), (8,)))


def test_verdicts_follow_the_numbers() -> None:
    plan = page.Plan(simulation("llama3-70b", dtensor_rows()), (8, 16, 1024))
    text = page.verdicts(plan)
    assert "split8 + int8, from 8 GPUs on" in text and "fp32, from 16 GPUs on" in text, "141.1 GB are more than 141"
    tiny = page.Plan(plan.simulation, (8,), tokens=64)
    assert "ours, fp32, nowhere" in page.verdicts(tiny) and "at every number of GPUs" in page.verdicts(tiny)
    last = plan.simulation.step(TORCH, 1024)
    shares = [plan.simulation.share(way, 1024, plan.tokens) for way in WAYS]
    assert shares[2] == pytest.approx(last.wall / (last.wall + 8.766), rel=1e-3) and max(shares) == shares[2]


def test_the_page_has_every_block_and_its_bytes_are_up_to_date(tmp_path: Path) -> None:
    plan = page.Plan(Simulation("llama3-70b", "H200", read(ROWS)), WORLDS)
    text = page.PAGE.read_text(encoding="utf-8")
    assert all(
        text.count(f"<!-- {name}, by perf.scale: {end} -->") == 1 for name in page.BLOCKS for end in ("begin", "end")
    )
    assert page.memory(plan) in text and page.assumptions(plan) in text, "run python -m perf.scale"


def test_blocks_are_renewed_and_prose_stays(tmp_path: Path) -> None:
    plan, copy = page.Plan(simulation("gpt2"), (8, 16)), tmp_path / "scale.md"
    text = page.PAGE.read_text(encoding="utf-8")
    copy.write_text(text)
    page.write(copy, plan)
    assert page.steps(plan) in copy.read_text() and "Llama 3 70B with AdamW" not in copy.read_text()
    prose = [block.rpartition("end -->")[2] for block in text.split("<!-- ") if "end -->" in block]
    assert all(part in copy.read_text() for part in prose) and len(prose) == len(page.BLOCKS)
    save(plot.draw(plan), tmp_path / "scale.png")
    assert imread(tmp_path / "scale.png").std() > 0.05 and (tmp_path / "scale.png").stat().st_size < 80_000


def test_the_command_prints_what_is_chosen() -> None:
    before = page.PAGE.read_bytes()
    done = CliRunner().invoke(main, ["--model", "gpt2", "--world", "8", "--tokens", "4096"])
    assert done.exit_code == 0 and "of GPT-2 124M" in done.output and "reduce-scatters; 4,096 tokens" in done.output
    assert page.PAGE.read_bytes() == before
    assert CliRunner().invoke(main, ["--world", "0"]).exit_code == 2
