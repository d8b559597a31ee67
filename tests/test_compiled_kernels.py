"""Off-line compilation without a GPU: every variant for sm_90, one row per axis for the other targets."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from compiled_code import barriers, resources
from lamb_like import LambLike
from table import DTYPES, FORMATS, RULES, SPARSE_RULES, RuleRow, dtype_for, private, shape_for

import fusedopt
from fusedopt.inspect import sass
from fusedopt_kernels import launch
from fusedopt_kernels.norm import norm_kernel
from fusedopt_kernels.step import update_kernel

pytestmark = pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose

OPTIONS: dict[str, dict[str, Any]] = {
    "cautious": {"cautious": True, "cautious_decay": True},
    "clipped": {"clip_grad_norm": 1.0, "clip_scope": "tensor", "clip_grad_value": 1.0, "l1": 0.1},
    "spikes and decay": {"skip_norm_above": 1.0, "decay_mode": "independent"},
    "measured": {"clip_grad_norm": 1.0, "clip_norm_type": float("inf"), "ema_decay": 0.9, "metrics": ("update_norm",)},
}
SGD = next(row for row in RULES if row.options.get("momentum"))
LOW_PRECISION: dict[str, tuple[RuleRow, tuple[int, int], dict[str, Any]]] = {
    "split8 and int8": (RULES[7], (64, 64), {"master_weights": "split8", "state_dtype": "int8"}),
    "kahan, float8_e5m2 and fp16": (RULES[7], (64, 64), {
        "master_weights": "kahan", "state_dtype": {"exp_avg": "float8_e5m2", "exp_avg_sq": "float16"},
    }),
    "ragged rows": (SGD, (64, 100), {"master_weights": "split8", "state_dtype": "int8"}),
}  # fmt: skip
"""Formats of weights and state together."""
ARCHITECTURES = {"sm_80": ("cuda", 80, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64)}


def specs(
    cls: Any, dtype: torch.dtype, switches: dict[str, Any], options: dict[str, Any],
    masked: bool = False, sparse: bool = False, shape: tuple[int, ...] = (3,),
) -> list[launch.KernelSpec]:  # fmt: skip
    """Kernels that one step would launch."""
    p = torch.nn.Parameter(torch.zeros(shape_for(switches, shape), dtype=dtype))
    p.grad = torch.ones_like(p).to_sparse() if sparse else torch.zeros_like(p)
    optimizer = cls([p], **options, backend="triton")
    if masked:
        optimizer.set_update_mask(p, torch.ones_like(p, dtype=torch.bool))
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
        yield name, specs(adamw.cls, dtype_for(switches), switches, adamw.options)
    for name, options in OPTIONS.items():
        yield name, specs(adamw.cls, torch.float32, {}, {**adamw.options, **options})
    for name, (row, shape, options) in LOW_PRECISION.items():
        yield name, specs(row.cls, torch.bfloat16, {}, {**row.options, **options}, shape=shape)
    yield "masked", specs(adamw.cls, torch.float32, {}, adamw.options, masked=True)
    yield "sparse", specs(SPARSE_RULES[0].cls, torch.float32, {}, {}, sparse=True)
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


REGISTERS = 112
"""Most registers per thread of a kernel that walks elements: 65,536 ÷ 128 threads ÷ registers programs fit on one SM.

Compiled on Triton 3.6 and 3.9: fp32 AdamW 54–55, bf16 62, fp64 96, no rule's update above 80 in fp32. The scalars
kernel (one small program) and a measuring pass, which keeps fp64 sums, may take more.
"""


STACK = 16
"""Bytes of stack allowed where fp64 sums are kept: a measuring pass (LAMB in bf16 takes 8) and the scalars kernel."""


def compile_for_sm_90(spec: launch.KernelSpec) -> dict[str, Any]:
    return launch.compile_for(spec, target(("cuda", 90, 32))).asm


def check(kernels: list[launch.KernelSpec], waits: bool) -> None:
    """No spills, registers within the limit, and no barriers in an update without reductions."""
    for spec in dict.fromkeys(kernels):
        asm = compile_for_sm_90(spec)
        registers, stack = resources(asm["cubin"])
        loop = spec.fn is update_kernel or spec.fn is norm_kernel
        assert stack <= (0 if loop else STACK), (spec.name, stack, spec.items)
        if spec.fn is update_kernel:
            assert registers <= REGISTERS, (spec.name, registers)
            assert waits or barriers(asm) == 0, spec.name


@pytest.mark.compiled
def test_sm_90_axes_do_not_spill() -> None:
    check([spec for _, kernels in axes() for spec in kernels], True)


@pytest.mark.compiled
def test_what_is_checked_without_disassembling_is_what_the_code_says() -> None:
    """Of a rule without barriers, and of one with them."""
    found = []
    for cls in (RULES[7].cls, fusedopt.LAMB):
        for spec in specs(cls, torch.bfloat16, {"clip_grad_norm": 1.0}, {}):
            asm = compile_for_sm_90(spec)
            code = sass.disassemble(asm["cubin"])
            assert resources(asm["cubin"]) == (code.registers, code.stack)
            assert barriers(asm) == code.count("BAR")
            found.append(barriers(asm) > 0)
    assert set(found) == {False, True}


@pytest.mark.compiled
@pytest.mark.parametrize("row", RULES, ids=str)
def test_sm_90_rules_do_not_spill_and_need_no_barriers(row: RuleRow) -> None:
    every = [specs(row.cls, dtype, {}, row.options) for dtype in DTYPES]
    check([spec for kernels in every for spec in kernels], row.cls.rule.n_norms > 0)
