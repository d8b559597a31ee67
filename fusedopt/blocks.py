"""Blocks of a segment on the CPU: where a twin's numbers come from and go to, and which thread works on them.

A block of 131,072 fp32 numbers is 512 KiB: operands stay in the last-level cache, and a call's fixed cost, under a
microsecond, disappears beside the 40 that it computes. Blocks are shared out to Python threads, as many as torch would
use: NumPy lets go of the interpreter lock while it computes, and unlike threads that split every operation between
them these never wait for each other. Which thread takes a block changes no bit of any result.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 131072
"""Elements per block; a multiple of every state codec's group. It also fixes the order of sums over a segment."""
GRAIN = 32768
"""torch computes up to this many elements in the thread that calls it; with more it starts threads of its own."""
MAX_THREADS = 8
"""Each holds the interpreter lock for about 1 % of its time."""


def as_array(t: Tensor) -> Any:
    """What operations take: a NumPy view of CPU memory, elsewhere the tensor itself."""
    return t.numpy() if t.device.type == "cpu" else t


def as_tensor(array: Any) -> Tensor:
    """Inverse of `as_array`."""
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else array


class Lane:
    """Scratch blocks of one thread. They are made once; `begin` takes all of them back."""

    def __init__(self, block: int, device: torch.device) -> None:
        self.block, self.device = block, device
        self._blocks: dict[torch.dtype, list[Any]] = {}
        self._taken: dict[torch.dtype, int] = {}

    def begin(self) -> None:
        """Start on another block; nothing taken before is in use any more."""
        self._taken.clear()

    def take(self, dtype: torch.dtype, n: int) -> Any:
        """A scratch array of n ≤ block numbers."""
        blocks, index = self._blocks.setdefault(dtype, []), self._taken.get(dtype, 0)
        if index == len(blocks):
            blocks.append(as_array(torch.empty(self.block, dtype=dtype, device=self.device)))
        self._taken[dtype] = index + 1
        return blocks[index][:n]

    @property
    def size(self) -> int:
        """Number of scratch blocks made so far."""
        return sum(map(len, self._blocks.values()))


class Task(NamedTuple):
    """Elements low … high of the segment or gradient number ``index``."""

    index: int
    low: int
    high: int


def tasks_of(lengths: Sequence[int], units: Sequence[int] = ()) -> list[Task]:
    """The blocks of some segments, in order; units: blocks of each end at multiples of this many elements."""
    tasks = []
    for i, n in enumerate(lengths):
        unit = units[i] if units else 1
        block = max(1, BLOCK // unit) * unit
        tasks.extend(Task(i, low, min(low + block, n)) for low in range(0, n, block))
    return tasks


def longest(tasks: Sequence[Task]) -> int:
    """Elements of the largest block."""
    return max((task.high - task.low for task in tasks), default=1)


class Workers:
    """Shares blocks out to threads and keeps their scratch from step to step."""

    def __init__(self, longest: int, device: torch.device, block: int = 0) -> None:
        self.block, self.device = max(min(BLOCK, longest), block), device
        self.lanes = [Lane(self.block, device)]

    def run(self, work: Callable[[Task, Lane], None], tasks: Sequence[Task]) -> None:
        """Do all tasks. Blocks too small to be worth a thread stay in this one."""
        large = deque(t for t in tasks if t.high - t.low >= GRAIN)
        threads = min(torch.get_num_threads(), MAX_THREADS, sum(t.high - t.low for t in large) // BLOCK)
        if threads < 2 or self.device.type != "cpu":
            _drain(work, deque(tasks), self.lanes[0], torch.is_inference_mode_enabled())
            return
        while len(self.lanes) < threads:
            self.lanes.append(Lane(self.block, self.device))
        small = deque(t for t in tasks if t.high - t.low < GRAIN)
        inference = torch.is_inference_mode_enabled()
        with ThreadPoolExecutor(threads - 1) as pool:
            others = [pool.submit(_drain, work, large, lane, inference) for lane in self.lanes[1:threads]]
            _drain(work, small, self.lanes[0], inference)
            _drain(work, large, self.lanes[0], inference)
            for other in others:
                other.result()


def _drain(work: Callable[[Task, Lane], None], tasks: deque[Task], lane: Lane, inference: bool) -> None:
    """Take tasks until there are none. Autograd's modes and NumPy's warnings are set per thread."""
    with np.errstate(all="ignore"), torch.inference_mode(inference), torch.no_grad():
        while True:
            try:
                task = tasks.popleft()
            except IndexError:
                return
            lane.begin()
            work(task, lane)
