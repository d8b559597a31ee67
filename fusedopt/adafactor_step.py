"""The step of Adafactor on one device, with kernels: matrices by factored moments, vectors by an ordinary rule.

Launches: scalars, sums, moments, means, measure, numbers and apply for matrices, three for vectors. All but scalars
and numbers come once for each variant: dtypes, and for matrices the shape of tiles, of which large ones share one.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from triton import next_power_of_2

from fusedopt_kernels import factored, launch, table, tiles
from fusedopt_kernels.numerics import compute_type, triton_type
from fusedopt_kernels.state import wide

from .derived import DerivedGroups, check_segments, values, with_group
from .groups import GroupOptions
from .numbers import Shared
from .rows import programs
from .rule import Rule
from .segment import Segment
from .tables import DeviceTables, Launch

TILE = 4096
"""Elements of a tile: 16 for each thread of 8 warps. Twice as many spill in fp64 and leave one program to an SM."""
COLUMNS = 64
"""Columns of a tile in a large matrix; as many rows, so that fewest sums of either are kept."""
BLOCK = 1024
"""Row or column averages of one program."""


def of_dtype(
    rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions]
) -> tuple[DerivedGroups, list[Segment]]:
    """Groups by dtype, whose ε₁ has its default for that dtype, and the segments in them."""
    derived = DerivedGroups(rule, groups, _with_eps)
    return derived, [with_group(s, derived.index(s.group, s.param.dtype)) for s in segments]


def _with_eps(group: GroupOptions, dtype: torch.dtype) -> dict[str, Any]:
    """What is divided by stays above zero."""
    tiny = torch.finfo(compute_type(dtype)).tiny
    eps1, eps2 = group.hyper("eps")
    eps1 = torch.finfo(dtype).eps if eps1 is None else eps1
    return {**values(group), "eps": (max(eps1, tiny), eps2), "floor": max(eps1 * eps1, tiny)}


def split(segments: Sequence[Segment], groups: Sequence[GroupOptions]) -> tuple[list[Segment], list[Segment]]:
    """(matrices, vectors and scalars); see `check_segments` for what is refused."""
    check_segments("Adafactor", segments)
    return [s for s in segments if s.param.dim() > 1], [s for s in segments if s.param.dim() <= 1]


def stack_of(shape: Sequence[int]) -> tuple[int, int, int]:
    """(matrices, rows, columns) of a shape of at least two dimensions."""
    *many, rows, columns = shape
    return int(np.prod(many, dtype=np.int64)), rows, columns


def tile_of(matrices: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Tile of a stack: powers of two, `TILE` elements at most, whole small matrices."""
    many, high, wide = (next_power_of_2(max(1, n)) for n in (matrices, rows, columns))
    wide = min(wide, max(COLUMNS, TILE // high))
    high = min(high, TILE // wide)
    return min(many, TILE // (wide * high)), high, wide


def small(p: torch.Tensor) -> tuple[int, ...]:
    """Shape of a small parameter that takes the kernels of another: one tile, or two below each other."""
    if p.dim() < 2:
        return (1,) * p.dim()
    stack = stack_of(p.shape)
    many, high, wide = tile_of(*stack)
    return many, high * 2 if stack[1] > high else high, wide


class VectorTables(DeviceTables):
    """Tables and launches for vectors and scalars, by an ordinary rule of two passes."""

    def __init__(self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], shared: Shared) -> None:
        self.derived, moved = of_dtype(rule, segments, groups)
        super().__init__(rule, moved, self.derived.list, shared)

    def set_hypers(self, indices: Sequence[int]) -> None:
        """Take the current hyper-parameters of some groups of the plan."""
        super().set_hypers(self.derived.renew(indices))


class FactoredTables(VectorTables):
    """Tables and launches for stacks of matrices."""

    def _fill_rows(self) -> None:
        super()._fill_rows()
        self.stacks = [stack_of(s.weight.shape) for s in self.segments]
        self.tiles = [tile_of(*stack) for stack in self.stacks]
        end = 0
        for row, (many, lines, columns), tile in zip(self.rows.array, self.stacks, self.tiles, strict=True):
            down, across = -(-lines // tile[1]), -(-columns // tile[2])
            count = -(-many // tile[0]) * down * across
            row[tiles.MATRICES.value : tiles.ACROSS.value + 1] = many, lines, columns, down, across
            row[table.MEASURE_COUNT.value] = count
            sizes = across * many * lines, down * many * columns, many, 2 * count
            offsets = tiles.ROW_SUMS, tiles.COLUMN_SUMS, tiles.MEANS, table.MEASURE_START
            for column, size in zip(offsets, sizes, strict=True):
                row[column.value], end = end, end + size
        self.work = torch.empty(max(1, end), dtype=torch.float64, device=self.device)
        # rows of a tile begin at multiples of 16 bytes only if the matrix is as wide
        self.fixed_misaligned |= np.array([columns % 8 != 0 for *_, columns in self.stacks])

    def _update_launches(self) -> list[Launch]:
        parts = self.rows.array[:, table.MEASURE_COUNT.value]
        row = self.rows.array
        lines = row[:, tiles.MATRICES.value] * row[:, tiles.HEIGHT.value]
        columns = row[:, tiles.MATRICES.value] * row[:, tiles.WIDTH.value]
        tall = np.where(row[:, tiles.DOWN.value] > 1, row[:, tiles.MATRICES.value], 0)
        place = {id(s): i for i, s in enumerate(self.segments)}
        by_tile = self._by(lambda s: (self.tiles[place[id(s)]], self._variant(s)))
        by_slots = self._by(lambda s: tuple(slot.dtype for slot in s.slots))
        out = [self._launch(self._tile_spec("sums", *key), few, parts) for key, few in by_tile.items()]
        blocks = -(-lines // BLOCK) + -(-columns // BLOCK)
        for dtypes, few in by_slots.items():
            out.append(self._launch(self._line_spec("moments", dtypes), few, blocks))
            out.append(self._launch(self._line_spec("means", dtypes), few, tall))
        # the other way round, so that what was read last is still in L2
        out += [self._launch(self._tile_spec("measure", *key), few, parts, True) for key, few in by_tile.items()]
        for compute, few in self._by(lambda s: compute_type(s.weight.dtype)).items():
            out.append(self._launch(self._numbers_spec(compute), few, np.ones_like(parts)))
        out += [self._launch(self._tile_spec("apply", *key), few, parts) for key, few in by_tile.items()]
        return [found for found in out if found is not None]

    def _launch(
        self, spec: launch.KernelSpec, members: Sequence[int], counts: np.ndarray, last_first: bool = False
    ) -> Launch | None:
        """``counts`` programs for each of some segments, in order; None without any."""
        index = np.array([i for i in members if self.segments[i].numel], dtype=np.int64)
        pairs = programs(index, counts[index])
        if not len(pairs):
            return None
        chunks = self._constant((pairs[::-1] if last_first else pairs).copy())
        return spec, len(pairs), (self.rows.tensor, self.grads.tensor, chunks, self.scalars, self.work)

    def _tile_spec(self, name: str, tile: tuple[int, int, int], key: tuple[Any, ...]) -> launch.KernelSpec:
        v = self._update_variant(key)
        items: dict[str, Any] = {
            "TILE": tile,
            "RULE": self.rule.measure,
            "N_SCALARS": self.rule.n_scalars,
            "WEIGHT": v.weight,
            "STATES": v.states,
            "TRANSFORMS": v.transforms,
            "GRAD": triton_type(v.grad),
            "COMPUTE": triton_type(v.compute),
            "EXACT": True,
            "SWITCHES": v.switches,
            "SOURCES": launch.sources(v.weight, *v.states, v.transforms),
        }
        fn: Any = getattr(factored, f"{name}_kernel")
        return launch.KernelSpec(
            f"{self.rule.name}_{name}", fn, tuple((k, x) for k, x in items.items() if k in fn.arg_names), num_warps=8
        )

    def _line_spec(self, name: str, dtypes: tuple[torch.dtype, ...]) -> launch.KernelSpec:
        states = tuple(wide.codec(dtype) for dtype in dtypes)
        items = (("STATES", states), ("BLOCK", BLOCK), ("SOURCES", launch.sources(*states)))
        return launch.KernelSpec(f"{self.rule.name}_{name}", getattr(factored, f"{name}_kernel"), items)

    def _numbers_spec(self, compute: torch.dtype) -> launch.KernelSpec:
        items: tuple[tuple[str, Any], ...] = (
            ("RULE", self.rule.update),
            ("N_SCALARS", self.rule.n_scalars),
            ("COMPUTE", triton_type(compute)),
            ("EXACT", True),
        )
        return launch.KernelSpec(f"{self.rule.name}_numbers", factored.numbers_kernel, items)


def parts(
    rules: tuple[Rule, Rule], rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions],
    shared: Shared,
) -> list[VectorTables]:  # fmt: skip
    """The parts of the step; rules: that of matrices, that of vectors."""
    kinds = zip((FactoredTables, VectorTables), rules, split(segments, groups), strict=True)
    return [kind(inner, few, groups, shared) for kind, inner, few in kinds if few]
