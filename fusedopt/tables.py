"""The Triton side of a plan: device tables, chunk maps and kernel variants of one device.

Built once per plan; a steady step uploads gradient addresses if they moved, hyper-parameters if they changed, and
launches: one norm kernel per gradient dtype when a norm is wanted, one scalars kernel, one update kernel per
variant (two for two-pass rules). Segments are launched last chunk first, so that the update starts with what the
norm pass read last, which is still in L2.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import launch, table
from fusedopt_kernels.grad import coefficient, l2, maximize
from fusedopt_kernels.numerics import REAL_TYPE, compute_type
from fusedopt_kernels.param import plain, split16
from fusedopt_kernels.state import wide

from .groups import GroupOptions
from .plan import Segment
from .rule import Rule
from .upload import DeviceTable, capturing, reserve

Launch = tuple[launch.KernelSpec, int, tuple[Tensor, ...]]
"""(spec, grid, pointer arguments)."""

WEIGHTS: dict[str | None, Any] = {None: plain, "split16": split16}
"""Weight formats by name."""


def transforms(with_norm: bool, decoupled: bool, own: bool) -> tuple[Any, ...]:
    """Gradient transforms of a variant, in the order of a step."""
    clip = (coefficient,) if with_norm else ()
    return (*clip, maximize, *(() if decoupled or own else (l2,)))


class DeviceTables:
    """Tables and launches for the segments that live on one device."""

    def __init__(
        self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], launcher: launch.Launcher
    ) -> None:
        self.rule, self.segments, self.groups, self.launcher = rule, segments, groups, launcher
        self.device = segments[0].weight.device
        options = groups[segments[0].group].options
        self.with_norm = rule.grad_norm or "max_norm" in options or "skip_nonfinite" in options
        self.positions = np.array([s.position for s in segments])
        self.base_flags = np.array([self._base_flags(s) for s in segments], dtype=np.int64)
        self.fixed_misaligned = np.array([not _aligned(s) for s in segments])
        n, ng = len(segments), len(groups)
        self.rows = DeviceTable((n, table.ROW_WIDTH.value), torch.int64, self.device)
        self.grads = DeviceTable((n,), torch.int64, self.device)
        self.hypers = DeviceTable((ng, table.HYPER_WIDTH.value), torch.float64, self.device)
        self.addresses = DeviceTable((ng, table.HYPER_WIDTH.value), torch.int64, self.device)
        self.scalars = torch.zeros(n * table.SCALAR_WIDTH.value, dtype=torch.float64, device=self.device)
        self._constants: list[DeviceTable] = []
        self._last_addresses: list[int] = []
        self._misaligned: np.ndarray | None = None  # None: the rows were never uploaded
        self._mirrors: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._fill_rows()
        self._fill_header(options)
        self.launches = self._launches()
        if self.device.type == "cuda" and not capturing():
            tables = (self.rows, self.grads, self.hypers, self.addresses, *self._constants)
            reserve(sum(t.array.nbytes + 8 for t in tables))

    # ------------------------------------------------------------------------------------------------- tables
    def _base_flags(self, segment: Segment) -> int:
        group = self.groups[segment.group]
        flags = table.MAXIMIZE.value if group.maximize else 0
        flags |= table.DECOUPLED.value if group.decoupled else 0
        flags |= table.OWN_DECAY.value if self.rule.decay == "own" else 0
        if segment.counter is not None and segment.counter.dtype == torch.float64:
            flags |= table.STEP_IS_FP64.value
        return flags

    def _fill_rows(self) -> None:
        rows = self.rows.array
        rows[:] = 0
        chunks = 0
        partials = 0
        for row, s in zip(rows, self.segments, strict=True):
            n, length = s.numel, _row_length(s.weight)
            row[table.PARAM.value], row[table.NUMEL.value], row[table.GROUP.value] = s.weight.data_ptr(), n, s.group
            row[table.STEP.value] = 0 if s.counter is None else s.counter.data_ptr()
            row[table.RESIDUAL.value] = 0 if s.residual is None else s.residual.data_ptr()
            row[table.ROW_LENGTH.value] = row[table.GLOBAL_STRIDE.value] = length
            row[table.NORM_START.value], row[table.NORM_COUNT.value] = partials, -(-n // table.NORM_CHUNK)
            row[table.MEASURE_START.value], row[table.MEASURE_COUNT.value] = chunks, -(-n // table.CHUNK)
            row[table.MASK.value] = 0 if s.mask is None else s.mask.data_ptr()
            for j, slot in enumerate(s.slots):
                row[table.SLOTS.value + 2 * j] = slot.data_ptr()
            for j, number in enumerate(s.numbers):
                row[table.LAST.value - j] = _tagged(number)
            partials += -(-n // table.NORM_CHUNK)
            chunks += -(-n // table.CHUNK)
        self.n_chunks, self.n_partials = chunks, partials

    def _fill_header(self, options: dict[str, Any]) -> None:
        counts = self.rows.array[:, table.NORM_COUNT.value]
        multi = np.flatnonzero(counts > 1)
        self.counts = self._constant(np.array([len(self.segments), len(multi), *multi], dtype=np.int64))
        header = [0.0] * table.HEADER_WIDTH.value
        header[table.MAX_NORM.value] = float(options.get("max_norm", float("inf")))
        header[table.SKIP_NONFINITE.value] = float(bool(options.get("skip_nonfinite", False)))
        wide_grad = any(REAL_TYPE.get(d, d) == torch.float64 for d in map(_grad_dtype, self.segments))
        header[table.NORM_IS_FP64.value] = float(wide_grad)
        self.header = self._constant(np.array(header))
        partials = max(1, 2 * self.n_partials, self.n_chunks * max(1, self.rule.n_norms))
        self.partials = torch.zeros(partials, dtype=torch.float64, device=self.device)

    def _constant(self, values: np.ndarray) -> Tensor:
        """Values on the device."""
        constant = DeviceTable(values.shape, torch.from_numpy(values).dtype, self.device)
        constant.array[...] = values
        constant.upload()
        self._constants.append(constant)
        return constant.tensor

    def set_gradients(self, addresses: list[int]) -> None:
        """Take this step's gradient addresses; rows change only when an alignment does."""
        if addresses == self._last_addresses:
            return
        self._last_addresses = addresses
        grads = np.fromiter(addresses, np.int64, len(addresses))
        if len(grads) != len(self.positions):
            grads = grads[self.positions]
        misaligned = (grads & 15).astype(bool)
        misaligned |= self.fixed_misaligned
        if self._misaligned is None or (misaligned != self._misaligned).any():
            self._misaligned = misaligned
            self.rows.array[:, table.FLAGS.value] = np.where(misaligned, 0, table.ALIGNED.value) | self.base_flags
            self.rows.upload()
        self.grads.update(grads)

    def set_hypers(self, indices: Sequence[int]) -> None:
        """Take the current hyper-parameters of some groups; tensors are read on the device at each step."""
        for index in indices:
            for column, value in enumerate(self.groups[index].hypers):
                address = _hyper_address(self._here(index, column, value))
                self.addresses.array[index, column] = address
                self.hypers.array[index, column] = 0.0 if address else float(value)
        self.hypers.upload()
        self.addresses.upload()

    def _here(self, group: int, column: int, value: Any) -> Any:
        """A hyper-parameter that kernels can read: a tensor of another GPU gets a copy, renewed at every step."""
        self._mirrors.pop((group, column), None)
        if not isinstance(value, Tensor) or value.device == self.device:
            return value
        if value.device.type == "cpu":
            return float(value)
        self._mirrors[group, column] = (value, value.to(self.device))
        return self._mirrors[group, column][1]

    # ------------------------------------------------------------------------------------------------ launches
    def _launches(self) -> list[Launch]:
        """Every launch of a step, in order."""
        rows, grads = self.rows.tensor, self.grads.tensor
        out: list[Launch] = []
        if self.with_norm:
            for dtype, members in self._by(_grad_dtype).items():
                chunks = self._chunk_map(members, table.NORM_CHUNK, False)
                if len(chunks):
                    out.append((launch.norm_spec(dtype), len(chunks), (rows, grads, chunks, self.partials)))
        rule, n = self.rule, len(self.segments)
        counts = len(rule.hyper), rule.n_scalars, len(rule.scalar_slots)
        spec = launch.scalars_spec(f"{rule.name}_scalars", rule.scalars, counts, self.with_norm, rule.grad_norm)
        grid = 1 if self.with_norm else -(-n // launch.SCALARS_BLOCK)
        hypers, addresses = self.hypers.tensor, self.addresses.tensor
        args = (rows, hypers, addresses, self.scalars, self.partials, self.header, self.counts)
        out.append((spec, grid, args))
        for key, members in self._by(self._variant).items():
            chunks = self._chunk_map(members, table.CHUNK, True)
            if len(chunks):
                args = (rows, grads, chunks, self.scalars, self.partials)
                out.extend((spec, len(chunks), args) for spec in self._update_specs(key))
        return out

    def _by(self, key: Callable[[Segment], Any]) -> dict[Any, list[int]]:
        found: dict[Any, list[int]] = {}
        for index, segment in enumerate(self.segments):
            found.setdefault(key(segment), []).append(index)
        return found

    def _variant(self, s: Segment) -> tuple[Any, ...]:
        """Everything that selects a compiled variant."""
        group = self.groups[s.group]
        return (
            group.variant,
            s.weight.dtype,
            _grad_dtype(s),
            tuple(slot.dtype for slot in s.slots),
            group.options.get("weights"),
            group.decoupled,
            (group.cautious, group.cautious_decay, s.mask is not None),
        )

    def _update_specs(self, key: tuple[Any, ...]) -> list[launch.KernelSpec]:
        """The update kernel of a variant, after the measuring pass if its step needs one."""
        rule, variant = self.rule, self._update_variant(key)
        update = launch.update_spec(rule.name, rule.update, variant)
        if not (rule.n_norms or variant.switches[0]):
            return [update]
        measure = rule.measure if rule.n_norms else rule.update
        return [launch.update_spec(f"{rule.name}_measure", measure, variant, "measure"), update]

    def _update_variant(self, key: tuple[Any, ...]) -> launch.UpdateVariant:
        rule, (structure, dtype, grad, slots, weights, decoupled, switches) = self.rule, key
        return launch.UpdateVariant(
            structure=structure,
            weight=WEIGHTS[weights].codec(dtype),
            states=tuple(wide.codec(slot) for slot in slots),
            transforms=tuple(t.apply for t in transforms(self.with_norm, decoupled, rule.decay == "own")),
            grad=grad,
            compute=compute_type(dtype),
            n_scalars=rule.n_scalars,
            n_norms=rule.n_norms,
            switches=switches,
        )

    def _chunk_map(self, members: Sequence[int], chunk: int, last_first: bool) -> Tensor:
        """`_pairs` on the device, kept as long as the plan."""
        pairs = self._pairs(members, chunk)
        return self._constant((pairs[::-1] if last_first else pairs).copy())

    def _pairs(self, members: Sequence[int], chunk: int) -> np.ndarray:
        """(segment, chunk) of every program, int32, for the segments of one launch."""
        index = np.array(members)
        counts = -(-self.rows.array[index, table.NUMEL.value] // chunk)
        segment = np.repeat(index, counts)
        first = np.repeat(np.cumsum(counts) - counts, counts)
        return np.stack([segment, np.arange(len(segment)) - first], axis=1).astype(np.int32)

    def prepare(self) -> int:
        """Compile what a step would launch; returns how many kernels were not ready."""
        prepare = self.launcher.prepare
        if self.device.type != "cuda":
            return sum(prepare(spec, args) for spec, _, args in self.launches)
        with torch.cuda.device(self.device):
            return sum(prepare(spec, args) for spec, _, args in self.launches)

    def run(self) -> None:
        """Launch the step on the current stream of the device."""
        for value, mirror in self._mirrors.values():
            mirror.copy_(value, non_blocking=True)
        self._start(self.launches)

    def _start(self, launches: Sequence[Launch]) -> None:
        run = self.launcher.run
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                for spec, grid, args in launches:
                    run(spec, grid, args)
        else:
            for spec, grid, args in launches:
                run(spec, grid, args)


def _grad_dtype(s: Segment) -> torch.dtype:
    grad = s.param.grad
    assert grad is not None
    return grad.dtype


def _aligned(s: Segment) -> bool:
    """Every address but the gradient's is a multiple of 16."""
    tensors = [s.weight, *s.slots, s.residual, s.mask]
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def _row_length(t: Tensor) -> int:
    """Stored numbers in one row along dim 0 (all of them for 0-dim and 1-dim tensors)."""
    n = t.numel() * (2 if t.is_complex() else 1)
    return n // t.shape[0] if t.dim() > 1 and t.shape[0] else n


def _hyper_address(value: Any) -> int:
    """Tagged address of a hyper-parameter tensor that kernels read; 0 for what is uploaded as a float."""
    if not isinstance(value, Tensor):
        return 0
    if value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"hyper-parameter tensors must be float32 or float64, got {value.dtype}")
    return _tagged(value)


def _tagged(number: Tensor) -> int:
    """Address of an fp32 or fp64 number, shifted left once; the low bit says fp64."""
    return number.data_ptr() << 1 | (number.dtype == torch.float64)
