"""The compiled side: compiles a step's kernels for a GPU that need not be here, and counts on their machine code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from fusedopt.inspect import emulator, sass
from fusedopt.inspect.counts import RAGGED, Case, Inspection, Kernel
from fusedopt.inspect.errors import BadInput, CannotFollow
from fusedopt.inspect.memory import SECTOR
from fusedopt.inspect.registers import WARP
from fusedopt.inspect.subject import Configuration, Subject, build, kernel_name, record
from fusedopt_kernels import launch, table

TENSORS = (3, 24)
"""Numbers of tensors for which launches are counted: they must not depend on it."""


def inspect(configuration: Configuration, arch: str) -> Inspection:
    """Compile, walk and count.

    Raises:
        BadInput: the configuration, or the architecture refuses it.
        CannotFollow, BadAccess: see `emulator.walk`.
    """
    subject = build(configuration)
    records = record(subject)
    kernels = [inspect_kernel(subject, launched, arch) for launched in records]
    _check_complete(subject, kernels)
    launches = {str(n): len(record(build(configuration, copies_of_tail=n))) for n in TENSORS}
    return Inspection(arch, triton.__version__, launches, kernels, subject.resident())


def _check_complete(subject: Subject, kernels: Sequence[Kernel]) -> None:
    found: dict[str, set[str]] = {}
    for kernel in kernels:
        if kernel.cases:
            found.setdefault(kernel.name.removesuffix(f"_{RAGGED}"), set()).update(kernel.cases)
    if any(cases != set(subject.cases) for cases in found.values()):
        raise CannotFollow("no program works on one of the parameters")


def inspect_kernel(
    subject: Subject, launched: tuple[launch.KernelSpec, int, tuple[torch.Tensor, ...]], arch: str
) -> Kernel:
    """Compile one recorded launch; if it is one program per chunk, walk the program of each case."""
    spec, grid, arguments = launched
    compiled = compile_for(spec, arch)
    if "amdgcn" in compiled.asm:
        return _read_amd(spec, compiled)
    code = sass.disassemble(compiled.asm["cubin"])
    kernel = Kernel(
        kernel_name(spec), spec.num_warps, code.registers, code.stack, compiled.metadata.shared, len(code.instructions),
        code.count("LDL", "STL"), code.count("BAR"),
    )  # fmt: skip
    if "chunks" in spec.signature:
        _fill_scalars(spec, arguments)
        regions = subject.regions(arguments)
        addresses = [argument.data_ptr() for argument in arguments]
        walks = [emulator.walk(code, addresses, regions, program, spec.num_warps, grid) for program in range(grid)]
        for number, (name, p) in enumerate(zip(subject.cases, subject.params, strict=True)):
            if found := [walk for walk in walks if walk.traffic.case == number]:
                kernel.cases[name] = _case(found, p.numel())
    return kernel


def compile_for(spec: launch.KernelSpec, arch: str) -> Any:
    """Compile for ``"sm_90"`` or ``"gfx942"``; what the compiler refuses becomes a `BadInput`."""
    if arch.startswith("gfx"):
        target = GPUTarget("hip", arch, 64)
    else:
        target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    try:
        return launch.compile_for(spec, target)
    except Exception as error:  # Triton raises many types, and ptxas' refusals come as RuntimeError
        text = " ".join(str(error).split())
        raise BadInput(f"Triton {triton.__version__} cannot compile {spec.name} for {arch}: {text[-300:]}") from error


def _fill_scalars(spec: launch.KernelSpec, arguments: Sequence[torch.Tensor]) -> None:
    """Give the scalar rows, which a launch would have written before, numbers that switch nothing off."""
    names = [name for name, kind in spec.signature.items() if kind != "constexpr"]
    if "scalars" in names:
        rows = arguments[names.index("scalars")].view(-1, table.SCALAR_WIDTH.value)
        rows.fill_(1e-3)
        rows[:, table.SKIP.value] = 0.0


def _case(walks: Sequence[emulator.Walk], elements: int) -> Case:
    """The programs that worked on one parameter, one per chunk of it."""
    byte_counts: dict[str, dict[str, int]] = {}
    widths: dict[str, dict[str, dict[str, int]]] = {}
    sectors = 0
    for traffic in (walk.traffic for walk in walks):
        for (role, what), n in sorted(traffic.bytes.items()):
            by_role = byte_counts.setdefault(role, {})
            by_role[what] = by_role.get(what, 0) + n
            by_width = widths.setdefault(role, {}).setdefault(what, {})
            for width, accesses in sorted(traffic.widths[role, what].items()):
                by_width[str(width)] = by_width.get(str(width), 0) + accesses
        sectors += sum(traffic.sectors.values())
    return Case(
        elements=elements,
        bytes=byte_counts,
        widths=widths,
        sector_use=sum(sum(accesses.values()) for accesses in byte_counts.values()) / (SECTOR * sectors),
        instructions=sum(walk.instructions for walk in walks) * WARP,
        table_bytes=sum(walk.traffic.table["load"] for walk in walks),
        table_stored=sum(walk.traffic.table["store"] for walk in walks),
        table_loads=sum(walk.traffic.table_requests["load"] for walk in walks),
        spills=sum(walk.spills for walk in walks),
        shared=sum(walk.shared for walk in walks),
        barriers=sum(walk.barriers for walk in walks),
    )


def _read_amd(spec: launch.KernelSpec, compiled: Any) -> Kernel:
    """What the assembly of an AMD GPU says of itself; there is no emulator for it."""
    text = compiled.asm["amdgcn"]

    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        return int(found[1]) if found else 0

    widths: Counter[str] = Counter()
    for name in re.findall(r"^\s+(?:global|buffer|flat)_((?:load|store)_\w+)", text, re.MULTILINE):
        words = re.search(r"dword(?:x(\d))?$", name)
        bits = 32 * int(words[1] or 1) if words else 8 if "byte" in name else 16
        widths[f"{name.split('_')[0]} {bits}"] += 1
    return Kernel(
        name=kernel_name(spec),
        warps=spec.num_warps,
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        shared_bytes=compiled.metadata.shared,
        instructions=len(re.findall(r"^\s+(?:v|s|ds|global|buffer|flat|scratch)_\w+", text, re.MULTILINE)),
        spill_instructions=number("vgpr_spill_count") + number("sgpr_spill_count"),
        barrier_instructions=len(re.findall(r"^\s+s_barrier", text, re.MULTILINE)),
        static_widths=dict(sorted(widths.items())),
    )
