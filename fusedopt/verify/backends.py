"""The three ways in which fusedopt computes a step here, and which of them this machine can run.

Triton fixes for a whole process whether kernels are compiled or interpreted, so both run in a process of their own
(`worker.py`); eager runs in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import subjects
from .oracle import Configuration
from .problem import Problem
from .subjects import Outcome

Cell = tuple[Configuration, str]
"""A configuration and a dtype's name: what one optimizer is built for."""

DTYPES, FORMATS = "dtypes", "formats"
"""Whose cells a worker runs: the library's rules in all dtypes, or in all formats (``kept.py``)."""

NAMES = ("eager", "interpreted", "compiled")

MIN_CELLS = 4
"""Cells that are worth the start of another worker (importing torch and Triton takes as long as a few cells)."""


class Failure(Exception):
    """A backend could not compute a cell; the text says why, in one line."""


@dataclass(frozen=True)
class Availability:
    """runs: whether a backend can run here. how: what it ran as, or why it did not, for the report."""

    runs: bool
    how: str


def available() -> dict[str, Availability]:
    """Every backend, with what a reader of the report needs to know about it."""
    import triton

    version = triton.__version__
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
        compiled = Availability(True, f"the kernels, compiled by Triton {version}, on a GPU ({gpu})")
    else:
        compiled = Availability(False, "compiled on a GPU: not run, no GPU here")
    return {
        "eager": Availability(True, f"the eager twins in torch {torch.__version__}, on the CPU"),
        "interpreted": Availability(True, f"the kernels in Triton {version}'s interpreter, on the CPU"),
        "compiled": compiled,
    }


def eager(problems: Sequence[Problem]) -> list[Outcome]:
    """Run a cell's problems on the eager backend, in this process."""
    return attempt("eager", "cpu", problems)


def attempt(backend: str, device: str, problems: Sequence[Problem]) -> list[Outcome]:
    """Run a cell's problems on fusedopt's class; any error becomes a `Failure` of the cell."""

    def work() -> list[Outcome]:
        make = subjects.fusedopt_subject(problems[0].configuration, backend)
        return [subjects.run(make, problem, device) for problem in problems]

    return guarded(work)


def guarded(work: Callable[[], list[Outcome]]) -> list[Outcome]:
    """The runs of a cell.

    Raises:
        Failure: whatever broke; the other cells are still worth verifying.
    """
    try:
        return work()
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise Failure(text) from error


class Worker:
    """A process that runs cells with the kernels interpreted or compiled, in order, ahead of whoever reads them."""

    def __init__(self, name: str, cells: Sequence[Sequence[str]], seeds: Sequence[int], source: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="fusedopt-verify-")
        self._log = open(Path(self._folder.name) / "log", "w+")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # The child must import the same fusedopt, also when this process found it through a changed sys.path.
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
        environment.pop("TRITON_INTERPRET", None)
        if name == "interpreted":
            environment["TRITON_INTERPRET"] = "1"
        job = {
            "device": "cpu" if name == "interpreted" else "cuda",
            "cells": list(cells),
            "source": source,
            "seeds": list(seeds),
            "folder": self._folder.name,
        }
        command = [sys.executable, "-P", "-m", "fusedopt.verify.worker", json.dumps(job)]
        self._process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=self._log, text=True)

    def outcomes(self) -> list[Outcome]:
        """The next cell's runs, one per seed.

        Raises:
            Failure: the cell raised an error, or the process has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Failure(f"the process ended with status {self._process.wait()}: {self._last_words()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failure(answer["error"])
        path = Path(answer["file"])
        with np.load(path) as arrays:
            result = unpack(answer["layout"], arrays)
        path.unlink()
        return result

    def close(self) -> None:
        """End the process and remove its files."""
        self._process.kill()
        self._process.communicate()
        self._log.close()
        self._folder.cleanup()

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        return lines[-1] if lines else "no message"


def workers(name: str, cells: Sequence[Cell], seeds: Sequence[int]) -> list[Worker]:
    """Processes that share the cells in turn: cell i is the next one of worker i modulo their number."""
    return sharing(name, [(config.rule, config.name, dtype) for config, dtype in cells], seeds)


def sharing(name: str, cells: Sequence[Sequence[str]], seeds: Sequence[int], source: str = DTYPES) -> list[Worker]:
    """Likewise for cells given by names alone. source: `DTYPES`, `FORMATS`, or where a user's rule is found."""
    cores = len(os.sched_getaffinity(0))
    count = 1 if name == "compiled" else max(1, min(cores, 4, len(cells) // MIN_CELLS))
    return [Worker(name, cells[first::count], seeds, source) for first in range(count)]


def pack(outcomes: list[Outcome]) -> tuple[list[Any], dict[str, np.ndarray]]:
    """Runs as arrays for a .npz file: a layout of keys that JSON can hold, and the arrays under these keys."""
    arrays: dict[str, np.ndarray] = {}

    def key(tensor: np.ndarray) -> str:
        name = f"a{len(arrays)}"
        arrays[name] = tensor
        return name

    layout = [
        [{slot: [key(tensor) for tensor in tensors] for slot, tensors in step.items()} for step in outcome]
        for outcome in outcomes
    ]
    return layout, arrays


def unpack(layout: list[Any], arrays: Any) -> list[Outcome]:
    """The inverse of `pack`."""
    return [
        [{slot: [arrays[key] for key in keys] for slot, keys in step.items()} for step in outcome] for outcome in layout
    ]
