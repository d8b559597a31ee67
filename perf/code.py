"""What the machine code of our kernels says, without a GPU: rows of kinds code and compile.

Each format and architecture has a process of its own: this module as a program, ``python -m perf.code TASK FORMAT
ARCH``, where TASK is ``count`` or ``compile``. It prints one JSON object.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

from fusedopt.inspect.counts import Case, Inspection, Kernel, of_full_chunks
from perf.contenders.ours import FUSEDOPT, OPTIONS
from perf.results import Row, Writer
from perf.work import ADAMW, FORMATS, MAX_NORM, WORKS, Work

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
COMPILED = ("amp", "sm_90")
"""Work and architecture whose compile time is taken: the step with the most in it."""
SECONDS = 150.0
"""What a process may take."""
ROUNDED = 0.005
"""Traffic in `perf.contenders.ours` has two digits behind the point."""


def rows(writer: Writer, architectures: Sequence[str] = ARCHITECTURES, formats: Sequence[str] = tuple(FORMATS)) -> None:
    """Count every format on every architecture, two at a time; then time compiling, one by one."""
    pairs = list(product(architectures, formats))
    with ThreadPoolExecutor(2) as pool:
        answers = pool.map(lambda pair: _answer("count", pair[1], pair[0]), pairs)
        for (arch, form), answer in zip(pairs, answers, strict=True):
            if why := answer.get("why"):
                writer.add("red", contender=FUSEDOPT.name, format=form, arch=arch, why=why)
                continue
            for work, counted in answer.items():
                add(writer, form, work, Inspection.from_json(counted))
    for form in formats:
        compile_row(writer, form)


def add(writer: Writer, form: str, work: str, inspection: Inspection) -> None:
    """Rows of one step, and a red one if it does not move what `perf.contenders.ours` says."""
    about: Row = {
        "format": form, "work": work, "arch": inspection.arch, "triton": inspection.triton,
        "launches": max(inspection.launches.values()),
    }  # fmt: skip
    for kernel in inspection.kernels:
        for chunk, case in kernel.cases.items():
            writer.add("code", **about, **of_kernel(kernel), chunk=chunk, **of_case(case))
        if not kernel.cases:
            writer.add("code", **about, **of_kernel(kernel))
    if why := disagreement(form, work, inspection):
        writer.add("red", contender=FUSEDOPT.name, format=form, work=work, arch=inspection.arch, why=why)


def disagreement(form: str, work: str, inspection: Inspection) -> str | None:
    """What is wrong with the bytes or launches of a step; None if nothing is."""
    counted = sum(case.bytes_per_param for _, case in of_full_chunks(inspection))
    told = FUSEDOPT.traffic(form, work)
    if told is None or abs(told[0] - counted) > ROUNDED:
        return f"its code moves {counted:.4f} bytes per parameter, perf/contenders/ours.py says {told and told[0]}"
    if len(set(inspection.launches.values())) > 1:
        return f"launches depend on the number of tensors: {inspection.launches}"
    return None


def of_kernel(kernel: Kernel) -> Row:
    """Fields that hold for a kernel's code as a whole."""
    return {
        "kernel": kernel.name, "warps": kernel.warps, "registers": kernel.registers, "stack": kernel.stack,
        "spills": kernel.spill_instructions, "shared_bytes": kernel.shared_bytes,
        "barriers": kernel.barrier_instructions, "code_instructions": kernel.instructions,
    }  # fmt: skip


def of_case(case: Case) -> Row:
    """Fields of one kind of chunk, executed by one program; bytes and instructions are per parameter."""
    bits = {8 * int(width) for kinds in case.widths.values() for counts in kinds.values() for width in counts}
    return {
        "loaded": round(case.total("load") / case.elements, 4), "stored": round(case.total("store") / case.elements, 4),
        "bytes": round(case.bytes_per_param, 4), "instructions": round(case.instructions_per_element, 2),
        "widths": sorted(bits, reverse=True), "sector_use": round(case.sector_use, 3),
        "spills_executed": case.spills, "barriers_executed": case.barriers,
    }  # fmt: skip


def compile_row(writer: Writer, form: str) -> None:
    """Seconds of compiling a step's kernels, with an empty cache and with a full one, each in a process of its own."""
    work, arch = COMPILED
    with tempfile.TemporaryDirectory(prefix="fusedopt-cache-") as cache:
        cold, warm = (_answer("compile", form, arch, TRITON_CACHE_DIR=cache) for _ in range(2))
    about = {"format": form, "work": work, "arch": arch}
    if why := cold.get("why") or warm.get("why"):
        writer.add("red", contender=FUSEDOPT.name, **about, why=why)
    else:
        writer.add("compile", **about, kernels=cold["kernels"], cold_s=cold["seconds"], warm_s=warm["seconds"])


def _answer(task: str, form: str, arch: str, **environment: str) -> dict[str, Any]:
    """What a process of this module prints; only ``"why"`` if it prints nothing."""
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    variables.pop("TRITON_INTERPRET", None)  # nothing compiles under it
    variables["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    command = [sys.executable, "-P", "-m", "perf.code", task, form, arch]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            return {"why": f"{task} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1][:300]}"}
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return {"why": f"{task} took longer than {SECONDS:.0f} s"}
    except (OSError, ValueError, IndexError) as error:
        return {"why": f"{task}: {type(error).__name__}: {error}"}


def count(form: str, arch: str) -> dict[str, Any]:
    """Work → `Inspection` as JSON. What the works share is compiled once: Triton's cache has it then."""
    from fusedopt.inspect.compiled import inspect

    return {work.name: inspect(configuration(form, work), arch).as_json() for work in WORKS.values()}


def compiling(form: str, arch: str) -> dict[str, Any]:
    """Number of a step's kernels, and the seconds that it takes to compile them one after the other."""
    from fusedopt.inspect import compiled, subject

    specs = [spec for spec, _, _ in subject.record(subject.build(configuration(form, WORKS[COMPILED[0]])))]
    begin = time.perf_counter()
    for spec in specs:
        compiled.compile_for(spec, arch)
    return {"kernels": len(specs), "seconds": round(time.perf_counter() - begin, 3)}


def configuration(form: str, work: Work) -> Any:
    """What `perf.contenders.ours` measures, as `fusedopt inspect` takes it."""
    from fusedopt.inspect.subject import Configuration

    clip = {"clip_grad_norm": MAX_NORM} if work.clip else {}
    dtype = str(FORMATS[form].dtype).removeprefix("torch.")
    return Configuration("adamw", {**ADAMW, **OPTIONS[form], **clip}, dtype, dtype, work.scaled)


if __name__ == "__main__":
    print(json.dumps({"count": count, "compile": compiling}[sys.argv[1]](*sys.argv[2:])))
