"""Clocks, and calls that take turns."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]


class Sample(NamedTuple):
    """Seconds. device: from the first kernel to the last. host: until the call returned. wall: until all was done."""

    device: float
    host: float
    wall: float


class Clock(Protocol):
    """What times a call."""

    def sample(self, call: Call) -> Sample:
        """Carry it out, once or twice."""
        ...


class HostClock:
    """For work that is done when the call returns."""

    def sample(self, call: Call) -> Sample:
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
        return Sample(seconds, seconds, seconds)


class CudaClock:
    """For work on the current GPU. A call is made twice: by itself, for host and wall time, and behind a kernel that
    keeps the GPU busy while Python enqueues, for device time. Before each the L2 cache is overwritten.
    """

    SPIN = 20_000_000
    """Cycles whose time is taken first, to know how long a cycle is."""
    LONGEST = 0.5
    """Seconds that the GPU is kept busy at most: what takes longer are launches, of which about 1,000 are queued."""

    def __init__(self) -> None:
        self.cache_bytes = int(getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 2**26)
        self._flush = torch.empty(2 * self.cache_bytes, dtype=torch.uint8, device="cuda")
        spins = [self._elapsed(lambda: torch.cuda._sleep(self.SPIN)) for _ in range(6)]
        self._cycle = min(spins) / self.SPIN  # a GPU that was idle counts slowly at first

    def sample(self, call: Call) -> Sample:
        self._flush.zero_()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        wall = time.perf_counter() - start
        self._flush.zero_()
        torch.cuda._sleep(int(min(1.5 * host + 5e-5, self.LONGEST) / self._cycle))
        return Sample(self._elapsed(call), host, wall)

    def _elapsed(self, call: Call) -> float:
        """Seconds between events around a call, behind whatever was enqueued before."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


class CallFailed(RuntimeError):
    """Its argument is the name of the call; its cause, what that raised."""


class Times(NamedTuple):
    """Samples of every round, by name."""

    samples: dict[str, list[Sample]]

    def spread(self, name: str, what: str) -> dict[str, float]:
        """20th percentile, median and 80th percentile of one of a `Sample`'s times, in seconds."""
        return spread([getattr(s, what) for s in self.samples[name]])

    def best(self, name: str, what: str) -> float:
        """The shortest: what the machine can do when nothing else runs."""
        return min(getattr(s, what) for s in self.samples[name])

    def ratio(self, name: str, base: str, what: str) -> dict[str, float]:
        """The same of the ratio within a round."""
        pairs = zip(self.samples[name], self.samples[base], strict=True)
        return spread([getattr(a, what) / getattr(b, what) for a, b in pairs])


def spread(values: Sequence[float]) -> dict[str, float]:
    """20th percentile, median and 80th percentile."""
    ranked = sorted(values)
    fifths = statistics.quantiles(ranked, n=5, method="inclusive") if len(ranked) > 1 else ranked
    return {"p20": fifths[0], "median": statistics.median(ranked), "p80": fifths[-1]}


def turns(calls: Mapping[str, Call], clock: Clock, rounds: int, seconds: float, warm: int = 2) -> Times:
    """Every call once a round, each round beginning with another: ``rounds`` of them, or what ``seconds`` allow, at
    least three. ``warm`` rounds go before.

    Raises:
        CallFailed: one of them raised.
    """
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        begin = time.perf_counter()
        for index in range(rounds + warm):
            shift = index % len(names)
            for name in names[shift:] + names[:shift]:
                try:
                    sample = clock.sample(calls[name])
                except Exception as failure:
                    raise CallFailed(name) from failure
                if index >= warm:
                    samples[name].append(sample)
            if index >= warm + 2 and time.perf_counter() - begin > seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return Times(samples)
