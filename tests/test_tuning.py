"""`fusedopt_kernels.tuning`: every rule and format has a row of the table, and persistent programs change no bit."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from table import DTYPES, FORMATS, RULES, dtype_for, private, shape_for

import fusedopt
from fusedopt_kernels import launch, table, tuning

LONG = ((3, table.CHUNK), (5,), (260, 64), (65, 64), (0,))
"""Seven chunks, whole and not; of the second the state is never quantised."""


def update_specs(optimizer: Any, p: torch.Tensor) -> list[launch.KernelSpec]:
    p.grad = torch.zeros_like(p)
    optimizer._launcher = recorder = launch.Recorder()
    optimizer.step()
    return [spec for spec, _, _ in recorder.record if "WEIGHT" in spec.constants]


@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose
def test_every_row_of_the_table_is_used_and_every_rule_and_format_has_one() -> None:
    used = set()
    switched = [(dtype_for(switches), switches) for switches in FORMATS.values()]
    for dtype, switches in [*((dtype, {}) for dtype in DTYPES), *switched]:
        for row in RULES if not switches else RULES[7:8]:
            p = torch.nn.Parameter(torch.zeros(shape_for(switches), dtype=dtype))
            for spec in update_specs(private(row.cls([p], **row.options, backend="triton"), **switches), p):
                c = spec.constants
                kind = tuning.kind([c["GRAD"], c["WEIGHT"][2], *(codec[2] for codec in c["STATES"])])
                assert spec.num_warps == tuning.SHAPES[kind].warps
                used.add(kind)
    assert used == set(tuning.SHAPES)


class Grids(launch.Launcher):
    """Keeps how many programs kernels had."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def run(self, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
        self.seen.append((spec.name, grid))
        super().run(spec, grid, args)


def stepped(
    make: Callable[..., Any], dtype: torch.dtype, device: str
) -> tuple[list[torch.Tensor], list[tuple[str, int]]]:
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in LONG]
    optimizer = make(params, backend="triton")
    optimizer._launcher = grids = Grids()
    for _ in range(2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).to(device, dtype)
        optimizer.step()
    state = [t for p in params for t in optimizer.state[p].values()]
    return [*(p.detach() for p in params), *state, *optimizer.metrics().values()], grids.seen


MEASURED = {"clip_grad_norm": 1.0, "metrics": ("update_norm",)}
PERSISTENT: dict[str, tuple[Any, torch.dtype, dict[str, Any]]] = {
    "fp32": (fusedopt.AdamW, torch.float32, MEASURED),
    "int8": (fusedopt.AdamW, torch.bfloat16, {"master_weights": "split8", "state_dtype": "int8"}),
    "two passes": (fusedopt.LAMB, torch.float32, {}),
}


@pytest.mark.parametrize("name", PERSISTENT)
def test_persistent_programs_give_the_same_bits(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cls, dtype, options = PERSISTENT[name]
    plain, grids = stepped(lambda *a, **k: cls(*a, **options, **k), dtype, device)
    monkeypatch.setattr(tuning, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(tuning, "SHAPES", {k: dataclasses.replace(s, programs=2) for k, s in tuning.SHAPES.items()})
    few, persistent = stepped(lambda *a, **k: cls(*a, **options, **k), dtype, device)
    update = cls.rule.name
    assert (update, 7 - (name == "int8")) in grids and (update, 2) in persistent
    assert persistent == [(kernel, min(n, 2) if kernel == update else n) for kernel, n in grids]
    for a, b in zip(plain, few, strict=True):
        assert torch.equal(a, b) and not a.isnan().any()
