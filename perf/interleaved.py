"""Times of several things in one run: one after the other, round after round, so that a busy machine hits all alike."""

import gc
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import triton


@dataclass(frozen=True)
class Times:
    """Seconds of every round, by case."""

    seconds: dict[str, list[float]]

    def best(self, name: str) -> float:
        """Shortest time: what the machine can do when nothing else runs."""
        return min(self.seconds[name])

    def median(self, name: str) -> float:
        """Median time of all rounds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> tuple[float, float]:
        """(ratio of the shortest times, median over the rounds of the ratio within a round)."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return self.best(name) / self.best(base), statistics.median(a / b for a, b in pairs)


def measure(
    cases: dict[str, Callable[[], object]], rounds: int, prepare: Callable[[str], object] | None = None
) -> Times:
    """Call every case once per round, ``prepare(case)`` before it outside the time taken. Two rounds warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    names = list(cases)
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds + 2):
            for name in names[index % len(names) :] + names[: index % len(names)]:
                if prepare is not None:
                    prepare(name)
                start = time.perf_counter()
                cases[name]()
                took = time.perf_counter() - start
                if index >= 2:
                    seconds[name].append(took)
    finally:
        gc.enable()
    return Times(seconds)


def machine() -> str:
    """Processor, cores, threads of torch, and versions, in one line."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    cores = torch.multiprocessing.cpu_count()
    return (
        f"{model}, {cores} cores, {torch.get_num_threads()} threads; Python {platform.python_version()}, "
        f"torch {torch.__version__}, numpy {numpy.__version__}, triton {triton.__version__}"
    )
