"""What the compiler makes of launch shapes, for GPUs that need not be here: occupancy, bytes in flight, instructions.

Each row of the table and architecture has a process of its own, this module as a program:
``python -m perf.tune.code KIND ARCH WHICH ONLY``. It prints one JSON object: candidate → fields, or why there are none.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from typing import Any

import torch

from fusedopt.inspect import compiled, emulator, sass
from fusedopt.inspect.memory import Memory
from fusedopt.inspect.registers import WARP
from fusedopt.inspect.subject import Subject, record
from fusedopt_kernels import launch, step, table
from perf.predict.hardware import HARDWARE, Hardware
from perf.results import Row, Writer
from perf.tune.trials import PRESENT, TRIALS, Candidate, applied, candidates

SECONDS = 240.0
"""What a process may take."""
REGISTERS, PARTITIONS, MOST_WARPS, MOST_PROGRAMS = 65536, 4, 64, 32
"""Of a multiprocessor: 32-bit registers, which its partitions share evenly; warps and programs that it holds."""
LATENCY = 1e-6
"""Seconds that a load takes while memory is busy, about."""


ALL = "all"
CHIPS = {HARDWARE[name].arch: HARDWARE[name] for name in ("A100", "H200", "B200")}
MAIN = "sm_90"
"""Architecture that all candidates are read for; of others only the present shapes are, unless they are asked for."""


def needed(chip: Hardware) -> float:
    """Bytes that a multiprocessor must have asked for to keep memory busy (Little's law)."""
    return chip.bandwidth * LATENCY / chip.multiprocessors


def picoseconds(chip: Hardware, bytes_per_param: float, instructions: float, in_flight: float) -> tuple[float, float]:
    """What memory and what issuing take for one element. Memory that is asked for less than it could bring waits."""
    memory = bytes_per_param / chip.bandwidth * max(1.0, needed(chip) / in_flight)
    return 1e12 * memory, 1e12 * instructions / chip.issue_rate


def rows(writer: Writer, kinds: Sequence[str], architectures: Sequence[str] = (), only: str = "") -> list[Row]:
    """Read the candidates of some rows of the table, two processes at a time."""
    usual = {arch: ALL if arch == MAIN else PRESENT for arch in CHIPS}
    wanted = dict.fromkeys(architectures, ALL) or usual
    asked = [(kind, arch, wanted[arch], only) for arch, kind in product(wanted, kinds)]
    found = []
    with ThreadPoolExecutor(2) as pool:
        for (kind, arch, *_), answer in zip(asked, pool.map(lambda x: _answer(*x), asked), strict=True):
            for name, fields in answer.items():
                about = {"device": None, "arch": arch, "format": TRIALS[kind].form.name, "row": kind, "name": name}
                found.append(writer.add("red" if "why" in fields else "tune", **about, **fields))
    return found


def _answer(*asked: str) -> dict[str, Row]:
    """What a process of this module prints, or why it prints nothing."""
    variables = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
    }
    variables.pop("TRITON_INTERPRET", None)  # nothing compiles under it
    command = [sys.executable, "-P", "-W", "ignore", "-m", "perf.tune.code", *asked]
    try:
        done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {PRESENT: {"why": f"took longer than {SECONDS:.0f} s"}}
    if done.returncode:
        return {PRESENT: {"why": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}}
    return json.loads(done.stdout.splitlines()[-1])


def every(kind: str, arch: str, which: str = ALL, only: str = "") -> Iterator[tuple[str, Row]]:
    """Name and fields of each candidate, or of the present one, that is other code."""
    for name, candidate in candidates(kind, only).items():
        if candidate.arena or which not in (ALL, name):
            continue
        try:
            yield name, {**candidate.fields(), **read(kind, candidate, arch)}
        except Exception as failure:  # of this candidate only
            yield name, {**candidate.fields(), "why": " ".join(str(failure).split())[:300] or type(failure).__name__}


def read(kind: str, candidate: Candidate, arch: str) -> Row:
    """Compile the update of an optimizer in a candidate's shape and walk through it."""
    with applied(kind, candidate):
        subject = _subject(kind, candidate.chunk)
        launched = next(x for x in record(subject) if x[0].fn is step.update_kernel)
    kernel, chip = compiled.inspect_kernel(subject, launched, arch), CHIPS[arch]
    full, tail, shape = kernel.cases["full"], kernel.cases["tail"], candidate.shape
    fit = occupancy(kernel.registers, shape.warps)
    programs = min(fit, shape.programs or fit)
    flight = in_flight(subject, launched, arch) * programs
    memory, issue = picoseconds(chip, full.bytes_per_param, full.instructions_per_element, flight)
    return {
        "registers": kernel.registers, "stack": kernel.stack, "spills": kernel.spill_instructions,
        "barriers": full.barriers, "tail_barriers": tail.barriers, "programs_per_sm": programs,
        "in_flight": flight, "needed": round(needed(chip)), "bytes": round(full.bytes_per_param, 3),
        "instructions": round(full.instructions_per_element, 2),
        "tail_instructions": round(tail.instructions_per_element, 2) if tail.elements < candidate.chunk else None,
        "memory_ps": round(memory, 3), "issue_ps": round(issue, 3),
    }  # fmt: skip


def _subject(kind: str, chunk: int) -> Subject:
    """An optimizer over one parameter of whole chunks and one of a part of a chunk."""
    params = []
    for rows in (max(chunk, table.CHUNK) // 64, 65):
        p = torch.nn.Parameter(torch.full((rows, 64), 0.02, dtype=TRIALS[kind].form.dtype))
        p.grad = torch.full_like(p, 0.01)
        params.append(p)
    return Subject(TRIALS[kind].build(params), params, ("full", "tail"))


def occupancy(registers: int, warps: int) -> int:
    """Programs that fit on a multiprocessor; warps get registers by 8 a thread."""
    fit = REGISTERS // PARTITIONS // (WARP * (-(-registers // 8) * 8)) * PARTITIONS
    return min(MOST_PROGRAMS, min(fit, MOST_WARPS) // warps)


_REGISTER = re.compile(r"(?<!U)R(\d+)")


class _Waiting(emulator.Program):
    """Follows what the program has asked memory for and not used yet, tables apart. most: bytes.

    A warp issues in order: it waits where it first names a register that is on its way, and by then has what it asked
    for before.
    """

    most = 0

    def step(self, index: int) -> None:
        ins, pending = self.code.instructions[index], self.__dict__.setdefault("pending", [])
        named = {int(n) for n in _REGISTER.findall(ins.text)}
        for i in reversed(range(len(pending))):
            if pending[i][0] & named:
                del pending[: i + 1]
                break
        before = self._loaded
        super().step(index)
        if ins.opcode == "LDG" and (size := self._loaded - before):
            first = ins.operands[0].value
            words = max((int(m) // 32 for m in ins.modifiers if m in ("64", "128", "256")), default=1)
            pending.append((set(range(first, first + words)), size))
            self.most = max(self.most, sum(size for _, size in pending))

    @property
    def _loaded(self) -> int:
        return sum(n for (_, what), n in self.memory.traffic.bytes.items() if what == "load")


def in_flight(subject: Subject, launched: tuple[launch.KernelSpec, int, Any], arch: str) -> int:
    """Most bytes that a program waits for at once in a full chunk. Chunks are launched last first."""
    spec, grid, arguments = launched
    code = sass.disassemble(compiled.compile_for(spec, arch).asm["cubin"])
    memory = Memory(subject.regions(arguments))
    program = _Waiting(code, [a.data_ptr() for a in arguments], memory, grid - 1, spec.num_warps, grid)
    program.run()
    return program.most


if __name__ == "__main__":
    print(json.dumps(dict(every(*sys.argv[1:5]))))
