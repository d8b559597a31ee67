"""What is counted, as records that travel between processes as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

RAGGED = "ragged"
"""The case of rows that are no whole groups of quantised state, and what their kernels' names end in."""


@dataclass
class Case:
    """One program on one kind of chunk. Byte counts are totals over its elements.

    bytes: role → ``{"load": n, "store": n}``. widths: role → access → ``{bytes per thread: accesses}``.
    sector_use: bytes over those of all 32-byte sectors that accesses of warps touched. instructions: issued, summed
    over warps and multiplied by the warp's width. table_bytes, table_stored: distinct ones read from and written to
    tables; table_loads: accesses of warps to read them. spills, shared, barriers: executed instructions of these kinds,
    summed over warps.
    """

    elements: int
    bytes: dict[str, dict[str, int]]
    widths: dict[str, dict[str, dict[str, int]]]
    sector_use: float
    instructions: int
    table_bytes: int
    table_stored: int
    table_loads: int
    spills: int
    shared: int
    barriers: int

    def total(self, what: str) -> int:
        """Bytes loaded or stored, all roles together."""
        return sum(accesses.get(what, 0) for accesses in self.bytes.values())

    @property
    def bytes_per_param(self) -> float:
        """Loaded and stored, without tables."""
        return (self.total("load") + self.total("store")) / self.elements

    @property
    def instructions_per_element(self) -> float:
        """Issued per element; a warp's instruction counts once for each of its lanes."""
        return self.instructions / self.elements


@dataclass
class Kernel:
    """One launch of a step. registers, stack: per thread; shared_bytes: per program. spill_instructions: in the code,
    executed or not. static_widths: bits of the accesses in the code, where nothing better is known (AMD).
    cases: empty for kernels that work on segments and not on elements, and where only the code was read.
    """

    name: str
    warps: int
    registers: int
    stack: int
    shared_bytes: int
    instructions: int
    spill_instructions: int
    barrier_instructions: int
    cases: dict[str, Case] = field(default_factory=dict)
    static_widths: dict[str, int] = field(default_factory=dict)


@dataclass
class Inspection:
    """A step's kernels. launches: number of tensors → launches of one step. resident: role → bytes per parameter."""

    arch: str
    triton: str
    launches: dict[str, int]
    kernels: list[Kernel]
    resident: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain dictionaries."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Inspection:
        """The inverse of `as_json`."""
        kernels = []
        for kernel in data["kernels"]:
            cases = {name: Case(**case) for name, case in kernel["cases"].items()}
            kernels.append(Kernel(**{**kernel, "cases": cases}))
        return Inspection(**{**data, "kernels": kernels})


def of_full_chunks(inspection: Inspection) -> list[tuple[str, Case]]:
    """Name and case of an aligned full chunk of every kernel that has one."""
    return [(kernel.name, kernel.cases["full"]) for kernel in inspection.kernels if "full" in kernel.cases]


Bytes = dict[str, dict[str, dict[str, dict[str, int]]]]
"""Kernel → case → role → access → bytes: what two methods must agree on."""


def bytes_of(inspection: Inspection) -> Bytes:
    """The byte counts of an inspection."""
    return {k.name: {name: case.bytes for name, case in k.cases.items()} for k in inspection.kernels if k.cases}


def differences(first: tuple[str, Bytes], second: tuple[str, Bytes]) -> list[str]:
    """One line per count in which two named methods differ; empty when they agree in every byte."""
    (one, a), (other, b) = first, second
    flat_a, flat_b = dict(_flatten(a)), dict(_flatten(b))
    return [
        f"{' '.join(key)}: {flat_a.get(key, 0)} bytes {one}, {flat_b.get(key, 0)} {other}"
        for key in sorted(flat_a.keys() | flat_b.keys())
        if flat_a.get(key, 0) != flat_b.get(key, 0)
    ]


def _flatten(counts: Bytes) -> Iterator[tuple[tuple[str, ...], int]]:
    for kernel, cases in counts.items():
        for case, roles in cases.items():
            for role, accesses in roles.items():
                for what, n in accesses.items():
                    yield (kernel, case, role, what), n
