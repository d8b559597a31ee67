"""Rows of results: one JSON object a line, each complete in itself, appended as soon as it is known.

Every row has ``kind`` and ``machine``, ``commit``, ``dirty``. Kinds, and what they add:

    measured   case, part, tensors, elements, format, work, graph, contender, device ("cuda", "cpu"),
               device_ms, host_us, wall_ms (each {"p20", "median", "p80"}); ratio and ratio_wall: our time to theirs in
               the same round, likewise (ratio: of device times); rounds, launches (null if unknown), bytes (per
               parameter), bytes_from ("counted", "derived"), gb_s, ceiling_gb_s, share, held_bytes, peak_bytes, error
    copy       device, gb_s: measured bandwidth of a plain copy, read and written together
    host       case, tensors, format, work, contender, device ("cpu"), host_us: Python time of a step with launches
               stubbed, on as many tiny tensors as the case has; ratio: as in measured; rounds, launches (ours),
               allocations: tensors that a step allocates
    sharded    host time beside plain tensors over DTensors, and collectives of a step: `perf.scale.sharded`
    code       format, work, arch, triton, launches (of the step), kernel; of its machine code: warps, registers, stack,
               spills, shared_bytes, barriers, code_instructions; and for each chunk ("full", "unaligned", "tail",
               "ragged"; no such row field for kernels that walk no elements) per parameter: loaded, stored, bytes,
               instructions, and widths (of accesses, in bits), sector_use, spills_executed, barriers_executed
    compile    format, work, arch, kernels (of a step), cold_s, warm_s: seconds of compiling them, without and with a
               cache
    predicted  as measured, with single numbers that a bandwidth model says of hardware ("H200"); predicted: true;
               inputs: what they rest on
    first      case, format, work, contender, cold_s, warm_s: making the optimizer and the first step in a new process,
               without and with filled caches of compiled code; import_s
    train      contender, format, batch, sequence, tokens_per_s, step_ms, optimizer_share, launches, peak_bytes, ratio
    tune       row (of the table of launch shapes), name (of the shape tried), case, format, device_ms, ratio
    missing    contender, install: a package that is not here
    red        contender, format, work, why: not measured, because the result was wrong or it failed; wrong: true if it
               failed the check that is common to all cases
    stage      name, ok (null: not present, or no time left), seconds, line, tail (unless ok): tests and tools that ran
               beside the measurements
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
RESULTS = Path(__file__).parent / "results"
IDENTITY = (
    "kind", "device", "hardware", "case", "part", "tensors", "format", "work", "graph", "contender", "arch", "kernel",
    "name", "chunk",
)  # fmt: skip
"""Fields that say what a row is about."""


class Writer:
    """Appends rows to a file and lets each be read at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        path.parent.mkdir(parents=True, exist_ok=True)

    def add(self, kind: str, **fields: Any) -> Row:
        """One row, stamped."""
        row = {"kind": kind, **fields, **stamp()}
        with self.path.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self.rows.append(row)
        return row


def rounded(value: float, digits: int = 5) -> float:
    """To so many significant digits: more are noise, and fill files."""
    return float(f"{value:.{digits}g}")


def in_a_line(failure: BaseException) -> str:
    """What went wrong, short enough for a row."""
    return f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"


def read(path: Path) -> list[Row]:
    """Rows of a file.

    Raises:
        ValueError: a line is no row; the last one may be torn by a kill and is then left out.
    """
    rows: list[Row] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["kind"]
        except (json.JSONDecodeError, KeyError, TypeError):
            if number == len(lines):
                break
            raise ValueError(f"{path}:{number} is no row of results") from None
        rows.append(row)
    return rows


def latest(rows: Iterable[Row]) -> dict[tuple[Any, ...], Row]:
    """The newest row about each thing."""
    return {identity(row): row for row in rows}


def identity(row: Row) -> tuple[Any, ...]:
    """What a row is about."""
    return tuple(row.get(name) for name in IDENTITY)


CODE = ("--", ":(top)", ":(top,exclude)perf/results", ":(top,exclude)perf/REPORT.md")
"""What a run depends on: it begins by deleting what it is going to write."""


@cache
def stamp() -> Row:
    """Machine, versions and commit of this process."""
    commit = os.environ.get("FUSEDOPT_COMMIT") or _git("rev-parse", "--short", "HEAD")  # a copied tree has no git
    return {"machine": machine(), "commit": commit, "dirty": bool(_git("status", "--short", *CODE))}


@cache
def machine() -> dict[str, Any]:
    """Processor, GPU with driver, and versions."""
    found: dict[str, Any] = {
        "cpu": _processor(),
        "cores": torch.multiprocessing.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "sms": properties.multi_processor_count,
            "memory": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    return _output("git", "-C", str(Path(__file__).parent), *arguments)


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
