"""Global memory as the emulator sees it: named regions with what may be known of their contents, and every access."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fusedopt.inspect.errors import BadAccess
from fusedopt.inspect.registers import WARP

SECTOR = 32
"""Bytes that the memory of NVIDIA GPUs moves at once."""

TABLE = "table"
"""Role of everything that is not as long as a parameter: tables, scalars, step counts."""


@dataclass(frozen=True)
class Region:
    """One tensor. role: ``"param"``, ``"grad"``, a state's key, or `TABLE`. case: index of the parameter it belongs to,
    -1 for tables.
    """

    role: str
    case: int
    start: int
    size: int

    @property
    def shared(self) -> bool:
        """Whether neighbouring threads read and write the same bytes, which count once: scales of groups."""
        return self.role.endswith("_scale")

    @staticmethod
    def of(role: str, case: int, tensor: torch.Tensor) -> Region:
        """The memory of a dense tensor."""
        return Region(role, case, tensor.data_ptr(), tensor.numel() * tensor.element_size())

    def contents(self) -> np.ndarray:
        """A copy of the bytes."""
        return np.frombuffer(ctypes.string_at(self.start, self.size), np.uint8)


@dataclass
class Traffic:
    """What one program did to data regions. Keys are ``(role, "load" | "store")``, widths and bits in bytes per thread.

    bytes: summed over threads; of scales distinct ones. sectors: distinct 32-byte sectors, summed over accesses of
    warps; bytes / (32·sectors) says how well an access uses what it moves. table: distinct table bytes; table_requests:
    accesses of warps to them.
    """

    case: int = -1
    bytes: Counter[tuple[str, str]] = field(default_factory=Counter)
    widths: dict[tuple[str, str], Counter[int]] = field(default_factory=dict)
    sectors: Counter[tuple[str, str]] = field(default_factory=Counter)
    table: Counter[str] = field(default_factory=Counter)
    table_requests: Counter[str] = field(default_factory=Counter)


class Places:
    """Regions by address."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = sorted((r for r in regions if r.size), key=lambda region: region.start)
        self.starts = np.array([r.start for r in self.regions], np.uint64)
        self.ends = np.array([r.start + r.size for r in self.regions], np.uint64)

    def locate(self, what: str, addresses: np.ndarray, width: int) -> np.ndarray:
        """Index of the region that each access of ``width`` bytes at a uint64 address falls into.

        Raises:
            BadAccess: outside every region, or not a multiple of the width.
        """
        if (addresses % np.uint64(width)).any():
            raise BadAccess(f"a {what} of {width} bytes is not aligned")
        places = np.searchsorted(self.starts, addresses, side="right") - 1
        if (places < 0).any() or (addresses + np.uint64(width) > self.ends[places]).any():
            raise BadAccess(f"a {what} of {width} bytes lies outside every tensor")
        return places


class Memory:
    """Places with contents, as far as they are known, and the traffic of one program."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self._places = Places(regions)
        self._contents = {r.start: r.contents() for r in self._places.regions if r.role == TABLE}
        self._touched: dict[tuple[str, int], np.ndarray] = {}
        self.traffic = Traffic()

    def access(self, what: str, addresses: np.ndarray, threads: np.ndarray, width: int) -> np.ndarray | None:
        """Record a load or store by ``threads`` (bool) at uint64 addresses. Loads from tables return the bytes of all
        threads, ``(threads, width)``; None if they are unknown.

        Raises:
            BadAccess: see `Places.locate`.
        """
        found = self._places.locate(what, addresses[threads], width)
        contents = np.zeros((len(addresses), width), np.uint8)
        known = True
        for place in np.unique(found):
            region = self._places.regions[place]
            here = threads.copy()
            here[threads] = found == place
            if region.role == TABLE:
                self._record_table(what, region, addresses, here, width)
                contents[here] = self._contents[region.start][_offsets(region, addresses[here], width)]
            else:
                self._record(what, region, addresses, here, width)
                known = False
        return contents if known and what == "load" else None

    def _record(self, what: str, region: Region, addresses: np.ndarray, here: np.ndarray, width: int) -> None:
        traffic, key, n = self.traffic, (region.role, what), int(here.sum())
        if traffic.case not in (-1, region.case):
            raise BadAccess("a program works on more than one parameter")
        traffic.case = region.case
        traffic.bytes[key] += self._new_bytes(what, region, addresses[here], width) if region.shared else n * width
        traffic.widths.setdefault(key, Counter())[width] += n
        warp = (np.flatnonzero(here) // WARP).astype(np.uint64)
        sector = addresses[here] // np.uint64(SECTOR)
        traffic.sectors[key] += len(np.unique(warp << np.uint64(59) | sector))  # addresses have at most 64 bits

    def _new_bytes(self, what: str, region: Region, addresses: np.ndarray, width: int) -> int:
        """How many bytes of a region are accessed for the first time."""
        touched = self._touched.setdefault((what, region.start), np.zeros(region.size, bool))
        before = int(touched.sum())
        touched[_offsets(region, addresses, width)] = True
        return int(touched.sum()) - before

    def _record_table(self, what: str, region: Region, addresses: np.ndarray, here: np.ndarray, width: int) -> None:
        self.traffic.table[what] += self._new_bytes(what, region, addresses[here], width)
        self.traffic.table_requests[what] += int(here.reshape(-1, WARP).any(axis=1).sum())


def _offsets(region: Region, addresses: np.ndarray, width: int) -> np.ndarray:
    """(accesses, width): which bytes of a region are accessed."""
    return (addresses - np.uint64(region.start)).astype(np.int64)[:, None] + np.arange(width)
