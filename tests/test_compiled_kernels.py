"""Off-line compilation without a GPU: every variant for sm_90, one row per axis for the other targets."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lamb_like import LambLike
from table import DTYPES, FORMATS, RULES, private

from fusedopt.inspect import sass
from fusedopt_kernels import launch

pytestmark = pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose

ARCHITECTURES = {"sm_80": ("cuda", 80, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}


def specs(cls: Any, dtype: torch.dtype, switches: dict[str, Any], options: dict[str, Any]) -> list[launch.KernelSpec]:
    """Kernels that one step would launch."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    p.grad = torch.zeros_like(p)
    optimizer = cls([p], **options, backend="triton")
    if switches:
        private(optimizer, **switches)
    optimizer._launcher = recorder = launch.Recorder()
    optimizer.step()
    return [spec for spec, _, _ in recorder.record]


def axes() -> Iterator[tuple[str, list[launch.KernelSpec]]]:
    """One configuration per axis of the engine."""
    adamw = RULES[7]
    yield "plain", specs(adamw.cls, torch.float32, {}, adamw.options)
    for name, switches in FORMATS.items():
        dtype = torch.bfloat16 if "split16" in name else torch.float32
        yield name, specs(adamw.cls, dtype, switches, adamw.options)
    yield "fp64", specs(adamw.cls, torch.float64, {}, adamw.options)
    yield "two-pass", specs(LambLike, torch.float32, {}, {})


def target(architecture: tuple[Any, ...]) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget(*architecture)


@pytest.mark.compiled
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_axis_compiles_for_other_targets(name: str) -> None:
    done: set[launch.KernelSpec] = set()
    for _, kernels in axes():
        for spec in kernels:
            if spec not in done:
                done.add(spec)
                binary = launch.compile_for(spec, target(ARCHITECTURES[name])).asm
                assert binary["hsaco" if name == "gfx942" else "cubin"]
    assert len(done) >= 9


REGISTERS = {"norm": 112, "adam": 80, "adamw": 80, "sgd": 64, "lamb_like": 112, "lamb_like_measure": 128}
"""Most registers per thread a streaming kernel may take: 65,536 ÷ 128 threads ÷ registers programs fit on one SM.

Compiled on Triton 3.6 and 3.9: fp32 AdamW 54–55, bf16 62, fp64 96; the table allows what fp64 and AMSGrad take.
"""


@pytest.mark.compiled
def test_sm_90_variants_do_not_spill_and_streaming_kernels_need_no_barriers() -> None:
    every = [kernels for _, kernels in axes()]
    every += [specs(row.cls, dtype, {}, row.options) for row in RULES for dtype in DTYPES]
    for spec in dict.fromkeys(spec for kernels in every for spec in kernels):
        code = sass.disassemble(launch.compile_for(spec, target(("cuda", 90, 32))).asm["cubin"])
        assert code.stack == 0 and code.count("LDL", "STL") == 0, (spec.name, spec.items)
        if spec.name in REGISTERS:
            assert code.registers <= REGISTERS[spec.name], (spec.name, code.registers)
        if spec.name in ("adam", "adamw", "sgd"):
            assert code.count("BAR") == 0, spec.name
