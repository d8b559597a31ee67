"""What a steady step over DTensors does on the host: counted, in one process whose process group only pretends."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_steady import Operators
from torch import distributed, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import fusedopt
from fusedopt.ranks import _route
from fusedopt.upload import DeviceTable
from fusedopt_kernels import launch


@pytest.fixture
def mesh() -> Iterator[Any]:
    """Four ranks, of which this is the second; collectives do nothing."""
    from torch.distributed.device_mesh import init_device_mesh

    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield init_device_mesh("cpu", (4,))
    distributed.destroy_process_group()


class Sharded:
    """Parameters that are shared out, gradients as FSDP2 gives them: new DTensors in each step, unaligned ones."""

    def __init__(self, mesh: Any, count: int, rows: int, **options: Any) -> None:
        from torch.distributed.tensor import DTensor, Shard

        self.make = lambda local: DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=torch.Size((4 * len(local), 3)), stride=(3, 1)
        )
        self.params = [nn.Parameter(self.make(torch.ones(rows, 3))) for _ in range(count)]
        whole = torch.ones(count * rows * 3 + 1)[1:]
        self.local = [part.view(rows, 3) for part in whole.split(3 * rows)]
        self.optimizer: Any = fusedopt.AdamW(self.params, backend="triton", **options)
        self.optimizer._launcher = self.recorder = launch.Recorder()

    def backward(self) -> None:
        for p, local in zip(self.params, self.local, strict=True):
            p.grad = self.make(local)

    def seen(self, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
        """(operators, whether one was given a DTensor, bytes allocated, launches, uploads) of a third step."""
        uploads: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(DeviceTable, "upload", lambda table: uploads.append(table.array.nbytes))
            operators = Operators()
            for _ in range(2):
                self.backward()
                with operators:
                    self.optimizer.step()
            self.backward()
            for kept in (self.recorder.record, uploads, operators.names):
                kept.clear()
            operators.allocated = 0
            with operators:
                self.optimizer.step()
        return operators.names, operators.allocated, len(self.recorder.record), sum(uploads)


def test_warmup_prepares_what_a_step_launches(mesh: Any) -> None:
    """Norms over ranks take kernels of their own, and so do shards that start off a multiple of eight elements."""
    options: dict[str, Any] = {"clip_grad_norm": 1.0, "state_rounding": "stochastic", "state_dtype": "bfloat16"}
    model = Sharded(mesh, 3, 7, **options)
    model.optimizer.warmup()
    model.backward()
    ready = model.recorder.compiles
    model.optimizer.step()
    assert model.recorder.compiles == ready > 0
    launched = {spec for spec, _, _ in model.recorder.record}
    assert launched <= {spec for _, spec in model.recorder._ready}


def test_a_norm_joins_all_dims_of_a_mesh_that_is_a_part_of_the_job(mesh: Any) -> None:
    """Of pipeline stages, say; where a mesh has all ranks, their own group is one all-reduce."""
    from torch.distributed.device_mesh import init_device_mesh

    assert _route([mesh]) == (mesh.get_group(),)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    assert _route([mesh, square]) == (mesh.get_group(),) and _route([square]) == (distributed.group.WORLD,)
    assert _route([square["dp"], square["tp"]]) is None
    distributed.destroy_process_group()
    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=8)
    stages = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pp", "dp", "tp"))
    stage: Any = stages["dp", "tp"]
    assert _route([stage]) == (stage.get_group(0), stage.get_group(1))


CASES: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 2),
    "clipped": ({"clip_grad_norm": 1.0, "ema_decay": 0.9}, 4),
    "alone": ({"clip_grad_norm": 1.0, "clip_scope": "tensor"}, 3),
}
"""Options, and launches of a step: a norm over several ranks takes one more, before its all-reduce."""


@pytest.mark.parametrize("case", CASES)
def test_no_dispatch_and_no_allocation_per_parameter(case: str, mesh: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options, launches = CASES[case]
    found = [Sharded(mesh, count, rows, **options).seen(monkeypatch) for count, rows in ((10, 4), (300, 4), (10, 4000))]
    names, allocated, n, uploaded = found[0]
    assert [x[0] for x in found] == [names] * 3, "operators per parameter"
    assert n == launches and uploaded == 0
    if case != "alone":  # whose own norms are put together by torch
        assert allocated == 0
        few = Counter({"_record_function_enter_new": 1, "_record_function_exit": 1})
        assert names - few <= Counter({"slice": 1, "allreduce_": 1, "copy_": 1} if options else {})
