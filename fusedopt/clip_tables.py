"""The Triton side of `clip_grad_norm_`: tables and launches for gradients of one device, kept from call to call.

There is no optimizer to hold the tables. Each thread keeps those of the last few lists of gradients and finds them
again by what the tensors look like; a steady call uploads gradient addresses if they moved, and launches.
"""

import threading
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import launch, table
from fusedopt_kernels.scale import combine_spec, scale_spec

from .clip_parts import EagerPart, Part, numbers
from .parts import runs_kernels
from .rows import programs, segment_counts
from .upload import DeviceTable, capturing, reserve

BACKEND = "auto"
LAUNCHER = launch.Launcher()
KEPT = 8
"""Lists of gradients whose tables are kept, per thread."""

_norm_spec = cache(launch.norm_spec)
_address = torch._C.TensorBase.data_ptr


class KernelPart(Part):
    """Three launches for gradients of one dtype, two more for each further dtype."""

    def __init__(self, grads: Sequence[Tensor]) -> None:
        super().__init__(grads)
        self.dtypes = [g.dtype for g in grads]
        self.numels = np.array([numbers(g) for g in grads], dtype=np.int64)
        self.nbytes = np.array([g.numel() * g.element_size() for g in grads], dtype=np.int64)
        self.chunks = -(-self.numels // table.NORM_CHUNK)
        self.rows = DeviceTable((self.n, table.ROW_WIDTH.value), torch.int64, self.device)
        self.grads = DeviceTable((self.n,), torch.int64, self.device)
        self.limit = DeviceTable((1,), torch.float64, self.device)
        self.scalars = torch.zeros(self.n * table.SCALAR_WIDTH.value, dtype=torch.float64, device=self.device)
        total = int(self.chunks.sum())
        self.partials = torch.zeros(max(1, 2 * total), dtype=torch.float64, device=self.device)
        rows = self.rows.array
        rows[:, table.NUMEL.value] = self.numels
        rows[:, table.NORM_START.value] = np.cumsum(self.chunks) - self.chunks
        rows[:, table.NORM_COUNT.value] = self.chunks
        self._made: dict[str, tuple[Any, Any]] = {}
        self._constants: dict[str, list[DeviceTable]] = {}
        self._addresses: list[int] = []
        self._aligned: np.ndarray | None = None  # None: the rows were never uploaded
        self._turns: tuple[int, ...] | None = None
        if self.device.type == "cuda" and not capturing():
            constants = 8 * total + 8 * (4 + self.n)  # a chunk map, and what is counted
            reserve(2 * (sum(t.array.nbytes + 8 for t in (self.rows, self.grads, self.limit)) + constants))

    def norm(self, grads: Sequence[Tensor], kind: int, wide: bool) -> Tensor:
        out = torch.empty((), dtype=torch.float64 if wide else torch.float32, device=self.device)
        return self._combined(grads, (self.n,), combine_spec(kind, True, wide), out)

    def sums(self, grads: Sequence[Tensor], sizes: tuple[int, ...], kind: int) -> Tensor:
        out = torch.empty(len(sizes), dtype=torch.float64, device=self.device)
        return self._combined(grads, sizes, combine_spec(kind, False, True), out)

    def _combined(
        self, grads: Sequence[Tensor], sizes: tuple[int, ...], spec: launch.KernelSpec, out: Tensor
    ) -> Tensor:
        held = self.walkable(grads)  # copies live until everything is launched
        self._take(held)
        kind, rows = spec.constants["KIND"], self.rows.tensor
        counts = self._kept(("counts", sizes), self._counts)
        passes = [
            (_norm_spec(dtype, kind), len(chunks), (rows, self.grads.tensor, chunks, self.partials))
            for dtype, chunks in self._kept(("norm", None), self._chunk_maps)
        ]
        self._start([*passes, (spec, len(sizes), (rows, self.scalars, self.partials, counts, out))])
        return out

    def multiply(self, grads: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
        self._take(grads)
        self.limit.update(np.array([max_norm]))
        wide, rows = norm.dtype == torch.float64, self.rows.tensor
        passes = [
            (scale_spec(dtype, wide), len(chunks), (rows, self.grads.tensor, chunks, norm, self.limit.tensor))
            for dtype, chunks in self._kept(("scale", self._turns), self._chunk_maps)
        ]
        self._start(passes)

    def _start(self, launches: Sequence[tuple[launch.KernelSpec, int, tuple[Tensor, ...]]]) -> None:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            for spec, grid, args in launches:
                LAUNCHER.run(spec, grid, args)

    def _take(self, grads: Sequence[Tensor]) -> None:
        """Take where the gradients are now; rows change only when an alignment does."""
        addresses = list(map(_address, grads))
        if addresses == self._addresses:
            return
        self._addresses = addresses
        starts = np.fromiter(addresses, np.int64, self.n)
        aligned = (starts & 15) == 0
        if self._aligned is None or (aligned != self._aligned).any():
            self._aligned = aligned
            self.rows.array[:, table.FLAGS.value] = np.where(aligned, table.ALIGNED.value, 0)
            self.rows.upload()
        self.grads.update(starts)
        starts = np.where(self.nbytes > 0, starts, 0)
        self._turns = _turns(starts, starts + self.nbytes)

    # --------------------------------------------------------------------------------------------- constant tables
    def _kept(self, key: tuple[str, Any], make: Any) -> Any:
        """Tables for a use, made anew when what they depend on changes."""
        use, detail = key
        known = self._made.get(use)
        if known is None or known[0] != detail:
            self._constants[use] = []
            known = self._made[use] = detail, make(use, detail)
        return known[1]

    def _constant(self, use: str, values: np.ndarray) -> Tensor:
        """Values on the device; what they are copied from is kept, for a captured copy reads it at every replay."""
        self._constants[use].append(DeviceTable.of(values, self.device))
        return self._constants[use][-1].tensor

    def _counts(self, use: str, sizes: tuple[int, ...]) -> Tensor:
        """What `combine_kernel` reads of each set of gradients."""
        heads: list[int] = []
        counts: list[int] = []
        first = 0
        for size in sizes:
            heads += [first, 2 * len(sizes) + len(counts)]
            counts += segment_counts(self.chunks[first : first + size]).tolist()
            first += size
        return self._constant(use, np.array(heads + counts, dtype=np.int64))

    def _chunk_maps(self, use: str, turns: tuple[int, ...] | None) -> list[tuple[torch.dtype, Tensor]]:
        """Dtype and programs of every launch: (segment, chunk); products start with what the norm pass read last."""
        left_out = set(self.relaid) if use == "scale" else ()
        members: dict[tuple[torch.dtype, int], list[int]] = {}
        for i, key in enumerate(zip(self.dtypes, turns or (0,) * self.n, strict=True)):
            if self.numels[i] and i not in left_out:
                members.setdefault(key, []).append(i)
        maps = []
        for (dtype, _), indices in members.items():
            pairs = programs(indices, self.chunks[np.array(indices)])
            maps.append((dtype, self._constant(use, pairs if use == "norm" else pairs[::-1].copy())))
        return maps if use == "norm" else maps[::-1]


def _turns(starts: np.ndarray, ends: np.ndarray) -> tuple[int, ...] | None:
    """For tensors that share memory (one listed twice): in which of several launches each is multiplied."""
    order = np.argsort(starts, kind="stable")
    if (starts[order][1:] >= np.maximum.accumulate(ends[order])[:-1]).all():
        return None
    turns, done = [0] * len(starts), []
    for i in order.tolist():
        turn = next((turn for turn, end in enumerate(done) if end <= starts[i]), len(done))
        done[turn:] = [ends[i], *done[turn + 1 :]]
        turns[i] = turn
    return tuple(turns)


# ---------------------------------------------------------------------------------------------------- what is kept
class _Store(threading.local):
    def __init__(self) -> None:
        self.parts: list[tuple[Any, Part]] = []


_store = _Store()
_captured: list[Part] = []
"""What CUDA graphs read when they are replayed; never written again."""


def find(grads: Sequence[Tensor]) -> Part | None:
    """The part that is kept for gradients that look like these."""
    if capturing():
        return None
    key, kept = _key(grads[0].device), _store.parts
    for index, (other, part) in enumerate(kept):
        if other == key and part.fits(grads):
            if index:
                kept.insert(0, kept.pop(index))
            return part
    return None


def part_of(grads: Sequence[Tensor]) -> Part:
    """The part for gradients of one device, kept or new.

    Raises:
        RuntimeError: a CUDA graph is being captured, and it could not hold what is done to these gradients.
    """
    part = find(grads)
    if part is None:
        kernels = runs_kernels(grads[0].device, BACKEND, LAUNCHER)
        part = KernelPart(grads) if kernels else EagerPart(grads)
        if capturing():
            if not kernels:
                raise RuntimeError(
                    f"gradients on {grads[0].device} cannot be clipped while a CUDA graph is captured: a replay would "
                    "not read them; clip them outside of the capture"
                )
            _captured.append(part)
        else:
            _store.parts.insert(0, (_key(grads[0].device), part))
            del _store.parts[KEPT:]
    return part


def _key(device: torch.device) -> tuple[Any, ...]:
    """What a part belongs to besides the look of its tensors: work on another stream must not share its tables."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return device, stream, torch.is_inference_mode_enabled(), BACKEND, LAUNCHER
