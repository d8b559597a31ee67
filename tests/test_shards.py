"""DTensor parameters: four processes step what one process steps whole, over every kind of mesh and placement.

Both get the same gradients, so that bits can be compared; what a collective adds up is compared in fp64 norms.
"""

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor, distributed, nn

import fusedopt
from fusedopt_kernels import numerics

STEPS = 3
SHAPES = ((128, 64), (65, 67), (3, 2), (40, 256), (257,), (36, 8, 16))


@pytest.mark.filterwarnings("ignore:.*")  # whatever processes of their own warn about is theirs
def test_four_ranks_step_what_one_steps_whole(tmp_path: Path) -> None:
    ranks.agree(__file__, tmp_path, 4)


def one_rank(store: str, rank: int, world: int) -> None:
    """What one of four processes checks."""
    warnings.simplefilter("ignore")
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    meshes = _meshes()
    adamw: Any = fusedopt.AdamW
    for name in ("every", "axes"):
        _steps(adamw, meshes, name, "eager", torch.float32, clip_grad_norm=0.5, ema_decay=0.9)
        _steps(adamw, meshes, name, "eager", torch.bfloat16, **_RANDOM, state_dtype="int8")
    _steps(adamw, meshes, "every", "eager", torch.float32, clip_grad_norm=0.1, clip_scope="tensor")
    _steps(adamw, meshes, "every", "eager", torch.float32, **_MEASURED)
    _steps(adamw, meshes, "rows", "eager", torch.float32, **_MEASURED, norm_group=meshes["self"])
    _steps(fusedopt.LAMB, meshes, "every", "eager", torch.float32, weight_decay=0.1)
    _steps(fusedopt.NovoGrad, meshes, "every", "eager", torch.float32, weight_decay=0.1)
    _steps(fusedopt.Lion, meshes, "rows", "eager", torch.float32, cautious=True)
    _steps(adamw, meshes, "rows", "eager", torch.bfloat16, master_weights="split8", state_dtype="int4")
    _steps(fusedopt.SGD, meshes, "every", "eager", torch.complex64, momentum=0.9, clip_grad_norm=0.5)
    _skips(meshes, "eager", rank)
    _partial_gradients(meshes, "eager")
    _masks(meshes, "eager")
    if numerics.INTERPRETED:  # dear: one placement of each kind, two steps
        _steps(adamw, meshes, "few", "triton", torch.float32, **_MEASURED, ema_decay=0.9)
        _steps(adamw, meshes, "few", "triton", torch.bfloat16, **_RANDOM, state_dtype="int8", clip_grad_norm=0.5)
        _steps(fusedopt.LAMB, meshes, "few", "triton", torch.float32, weight_decay=0.1)
    _refusals(meshes)
    ranks.finish()


_RANDOM: dict[str, Any] = {"master_weights": "split8", "state_rounding": "stochastic", "seed": 3}
_MEASURED: dict[str, Any] = {
    "clip_grad_norm": 0.5, "clip_norm_type": math.inf, "metrics": ("grad_norm", "param_norm", "update_norm"),
}  # fmt: skip


def _meshes() -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    own = init_device_mesh("cpu", (4, 1), mesh_dim_names=("all", "self"))["self"]
    line = init_device_mesh("cpu", (4,))
    return {"line": line, "square": square, "dp": square["dp"], "tp": square["tp"], "self": own}


def _placements(meshes: dict[str, Any], name: str) -> list[Any]:
    """(mesh, placements) to go round: None for a plain tensor."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    line, square = meshes["line"], meshes["square"]
    rows = [
        (line, [Shard(0)]), (square, [Replicate(), Shard(0)]), None, (square, [Shard(0), Replicate()]),
        (line, [Replicate()]), (square, [Shard(0), Shard(0)]), (square, [_StridedShard(0, split_factor=2), Shard(0)]),
    ]  # fmt: skip
    if name == "rows":
        return rows
    if name == "few":
        return [rows[1], (square, [Shard(0), Shard(1)]), None]
    if name == "axes":  # meshes of different ranks in one optimizer
        return [(meshes["dp"], [Shard(0)]), (meshes["tp"], [Shard(0)]), None, (meshes["tp"], [Replicate()])]
    return [*rows, (square, [Shard(0), Shard(1)]), (line, [Shard(1)]), (square, [Shard(1), Replicate()])]


def _place(whole: Tensor, where: Any) -> Tensor:
    from torch.distributed.tensor import distribute_tensor

    return whole.clone() if where is None else distribute_tensor(whole.clone(), *where, src_data_rank=None)


def _fits(shape: tuple[int, ...], where: Any, quantised: bool) -> bool:
    """Leave out what has no such dim, what FSDP2 refuses (uneven rows under two meshes), groups that would be cut."""
    kinds = {(type(p).__name__, p.dim) for p in where[1] if hasattr(p, "dim")} if where else set()
    if any(d >= len(shape) for _, d in kinds) or (("_StridedShard", 0) in kinds and shape[0] % 4):
        return False
    cut = ("Shard", 1) in kinds and quantised and math.prod(shape) >= 4096
    return not cut or (len(shape) == 2 and shape[1] % 256 == 0)


class _Pair:
    """The same parameters whole and placed, each with an optimizer."""

    def __init__(self, cls: Any, where: list[Any], backend: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        quantised = "state_dtype" in options
        shapes = SHAPES[::2] if backend == "triton" else SHAPES
        self.places = [(s, w) for w in where for s in shapes if _fits(s, w, quantised)]
        self.whole = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape, _ in self.places]
        self.placed = [nn.Parameter(_place(p.detach(), w)) for p, (_, w) in zip(self.whole, self.places, strict=True)]
        self.one, self.many = (  # eager's bits are the kernels', and come sooner
            cls([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, backend=name, **options)
            for params, name in ((self.whole, "eager"), (self.placed, backend))
        )
        self.case = f"{cls.__name__}, {backend}, {dtype}, {options}"

    def give(self, seed: int) -> None:
        """New gradients, the same for both."""
        generator = torch.Generator().manual_seed(seed)
        for p, q, (shape, where) in zip(self.whole, self.placed, self.places, strict=True):
            grad = torch.randn(shape, generator=generator, dtype=p.dtype)
            p.grad, q.grad = grad, _place(grad, where)

    def check(self) -> None:
        """Bits of parameters and state."""
        for i, (p, q) in enumerate(zip(self.whole, self.placed, strict=True)):
            what = f"parameter {i} at {self.places[i]}: {self.case}"
            assert torch.equal(_bits(_full(q)), _bits(p)), what
            one, many = self.one.state[p], self.many.state[q]
            assert one.keys() == many.keys(), what
            for key in one:
                spread = hasattr(q, "placements") and one[key].dim() > 0
                assert hasattr(many[key], "placements") == spread, f"{key} of {what}"
                assert many[key].shape == one[key].shape, f"{key} of {what}"
                assert torch.equal(_bits(_full(many[key])), _bits(one[key])), f"{key} of {what}"


def _full(t: Any) -> Tensor:
    if not hasattr(t, "placements"):
        return t.detach()
    t = t.detach()
    return t.to(torch.int32).full_tensor().to(t.dtype) if t.dtype == torch.int16 else t.full_tensor()


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def _steps(cls: Any, meshes: dict[str, Any], name: str, backend: str, dtype: torch.dtype, **options: Any) -> None:
    pair = _Pair(cls, _placements(meshes, name), backend, dtype, options)
    for step in range(2 if backend == "triton" else STEPS):
        pair.give(step)
        pair.one.step()
        pair.many.step()
        _same_metrics(pair)
    pair.check()


def _same_metrics(pair: _Pair) -> None:
    for per in ("model", "tensor"):
        one, many = pair.one.metrics(per), pair.many.metrics(per)
        assert one.keys() == many.keys()
        for key, value in one.items():  # sums of fp64 numbers in another order
            torch.testing.assert_close(many[key], value, rtol=1e-12, atol=0.0, msg=f"{key}: {pair.case}")


def _skips(meshes: dict[str, Any], backend: str, rank: int) -> None:
    """One rank's NaN, or its scaler's flag, skips the step on all; libraries lose NaN in a maximum."""
    for name, kind in (("rows", math.inf), ("axes", math.inf), ("rows", 2.0)):
        options = {"skip_norm_above": 1e6, "clip_norm_type": kind}
        pair = _Pair(fusedopt.AdamW, _placements(meshes, name), backend, torch.float32, options)
        pair.give(0)
        if rank == 2 or (rank == 3 and name == "axes"):  # which has the same shard there
            local: Any = pair.placed[0].grad
            local._local_tensor[:1] = math.nan
        before = [_full(p).clone() for p in pair.placed]
        pair.many.step()
        assert all(torch.equal(_full(p), was) for p, was in zip(pair.placed, before, strict=True)), backend
        assert pair.many.metrics()["skipped_steps"] == 1 and pair.many.metrics()["grad_norm"].isnan()
        pair.give(1)
        pair.many.grad_scale, pair.many.found_inf = torch.tensor(2.0), torch.tensor(float(rank == 1))
        pair.many.step()
        assert all(torch.equal(_full(p), was) for p, was in zip(pair.placed, before, strict=True)), backend
        pair.many.found_inf = torch.tensor(0.0)
        pair.many.step()
        assert not torch.equal(_full(pair.placed[0]), before[0])


def _partial_gradients(meshes: dict[str, Any], backend: str) -> None:
    """Gradients of which every rank holds a summand are added up, those placed otherwise moved."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    where = [(meshes["line"], [Replicate()]), (meshes["square"], [Replicate(), Shard(0)])]
    pair = _Pair(fusedopt.AdamW, where, backend, torch.float32, {"clip_grad_norm": 0.5})
    for seed in range(3):
        pair.give(seed)
        for p, q, (_, (mesh, _)) in zip(pair.whole, pair.placed, pair.places, strict=True):
            assert p.grad is not None
            if seed == 0:  # placed as the parameters at first
                continue
            if mesh.ndim == 1:  # a quarter each, exactly
                q.grad = DTensor.from_local(p.grad / 4, mesh, [Partial()], run_check=False)
            else:
                q.grad = _place(p.grad, (mesh, [Shard(0), Replicate()]))
        pair.one.step()
        pair.many.step()
    pair.check()


def _masks(meshes: dict[str, Any], backend: str) -> None:
    pair = _Pair(fusedopt.AdamW, _placements(meshes, "rows"), backend, torch.float32, {})
    for p, q in zip(pair.whole, pair.placed, strict=True):
        mask = torch.arange(p.numel()).reshape(p.shape) % 3 > 0
        pair.one.set_update_mask(p, mask)
        pair.many.set_update_mask(q, mask)
    pair.give(0)
    pair.one.step()
    pair.many.step()
    pair.check()


def _refusals(meshes: dict[str, Any]) -> None:
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    line = meshes["line"]
    cut = nn.Parameter(_place(torch.zeros(64, 128), (line, [Shard(1)])))
    cut.grad = _place(torch.ones(64, 128), (line, [Shard(1)]))
    rows = nn.Parameter(_place(torch.zeros(64, 128), (line, [Shard(0)])))
    rows.grad = _place(torch.ones(64, 128), (line, [Shard(0)]))
    pieces = (meshes["square"], [_StridedShard(0, split_factor=2), Shard(0)])
    odd = nn.Parameter(_place(torch.zeros(6, 8), pieces))
    odd.grad = _place(torch.ones(6, 8), pieces)
    cases: list[tuple[Any, Any, dict[str, Any], str]] = [
        (fusedopt.AdamW, [odd], {"state_dtype": "bfloat16", "state_rounding": "stochastic"}, "break into pieces"),
        (fusedopt.AdamW, [cut], {"state_dtype": "int8"}, "would cut: shard it along dim 0"),
        (fusedopt.Muon, [rows], {}, "works on whole matrices"),
        (fusedopt.Adafactor, [rows], {}, "works on whole matrices"),
        (fusedopt.AdamW, [rows], {"offload_state": True}, "offload_state does not take DTensor"),
    ]
    for cls, params, options, text in cases:
        optimizer = cls(params, **options)
        with pytest.raises((RuntimeError, NotImplementedError), match=text):
            optimizer.step()
        assert not optimizer.state
    optimizer = fusedopt.AdamW([rows])
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0] = {key: getattr(value, "_local_tensor", value) for key, value in saved["state"][0].items()}
    with pytest.raises(RuntimeError, match="is not the whole of a parameter"):
        optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="outside the graph"):
        torch.compile(fusedopt.AdamW([rows]).step, fullgraph=True, backend="eager")()


if __name__ == "__main__":
    torch.set_num_threads(1)
    one_rank(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
