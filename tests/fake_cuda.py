"""A GPU's face over the CPU: what perf/ asks of `torch.cuda`, so that its path can be walked where there is none."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from perf.measure import Bench


class Event:
    """Host time."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: "Event") -> float:
        return 1e3 * (other.at - self.at) or 1e-6  # the clock may not tick in an empty step


class Stream:
    def wait_stream(self, other: "Stream") -> None:
        pass


class Graph:
    """Knows nothing of what was captured; counts replays."""

    replays = 0

    def replay(self) -> None:
        Graph.replays += 1


class OnCpu(TorchFunctionMode):
    """Whoever asks for "cuda" gets the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: _cpu(v) if k == "device" else v for k, v in (kwargs or {}).items()}
        if getattr(func, "__name__", "") == "to":
            args = tuple(map(_cpu, args))
        return func(*args, **kwargs)


def _cpu(value: Any) -> Any:
    return torch.device("cpu") if str(value).startswith("cuda") else value


@contextlib.contextmanager
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, "cuda" is the CPU with 10 MB of memory and 1 KiB of L2."""
    nothing = contextlib.nullcontext
    fakes = {
        "is_available": lambda: True, "synchronize": lambda: None, "Event": Event, "Stream": Stream,
        "current_stream": Stream, "stream": lambda s: nothing(), "CUDAGraph": Graph, "graph": lambda g: nothing(),
        "_sleep": lambda cycles: time.sleep(cycles * 1e-10), "mem_get_info": lambda: (10**7, 10**7),
        "memory_allocated": lambda: 1000, "max_memory_allocated": lambda: 3000,
        "reset_peak_memory_stats": lambda: None, "empty_cache": lambda: None,
        "get_device_properties": lambda i: SimpleNamespace(
            L2_cache_size=1024, name="Imitation", multi_processor_count=1, total_memory=10**9
        ),
        "get_device_name": lambda: "Imitation",
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator(_cpu(device)))
    with OnCpu():
        yield


@contextlib.contextmanager
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> Iterator["Bench"]:
    """What measures on it, in few rounds; rows say that this GPU made them."""
    from perf import results
    from perf.measure import Bench

    with on_cpu(monkeypatch):
        results.machine.cache_clear()
        results.stamp.cache_clear()
        found = Bench.on(results.Writer(tmp_path / "r.jsonl"), "cuda")
        found.memory, found.rounds = 1e8, rounds
        yield found
    results.machine.cache_clear()
    results.stamp.cache_clear()
