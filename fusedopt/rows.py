"""The tables that kernels read on one device: segment rows, gradient addresses, hyper-parameters, conditions.

Built once per plan; a steady step uploads gradient addresses if they moved and hyper-parameters if they changed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import launch, table
from fusedopt_kernels.numerics import REAL_TYPE

from .conditions import Conditions
from .groups import GroupOptions
from .plan import Segment
from .rule import Rule
from .upload import DeviceTable, capturing, reserve


class Rows:
    """Tables of some segments that live on one device and follow one rule."""

    def __init__(
        self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], launcher: launch.Launcher
    ) -> None:
        self.rule, self.segments, self.groups, self.launcher = rule, segments, groups, launcher
        self.device = segments[0].weight.device
        self.positions = np.array([s.position for s in segments])
        self.base_flags = np.array([self._base_flags(s) for s in segments], dtype=np.int64)
        self.fixed_misaligned = np.array([not _aligned(s) for s in segments])
        n, ng = len(segments), 1 + len(groups)  # row 0 of the hyper-parameters is the step's own
        self.rows = DeviceTable((n, table.ROW_WIDTH.value), torch.int64, self.device)
        self.grads = DeviceTable((n,), torch.int64, self.device)
        self.hypers = DeviceTable((ng, table.HYPER_WIDTH.value), torch.float64, self.device)
        self.addresses = DeviceTable((ng, table.HYPER_WIDTH.value), torch.int64, self.device)
        self.scalars = torch.zeros(n * table.SCALAR_WIDTH.value, dtype=torch.float64, device=self.device)
        self._constants: list[DeviceTable] = []
        self._last_addresses: list[int] = []
        self._misaligned: np.ndarray | None = None  # None: the rows were never uploaded
        self._mirrors: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._conditions: Any = None
        self._fill_rows()
        self._fill_header()
        self.set_conditions(Conditions(groups, False, {}))
        if self.device.type == "cuda" and not capturing():
            tables = (self.rows, self.grads, self.hypers, self.addresses, *self._constants)
            reserve(sum(t.array.nbytes + 8 for t in tables))

    def _base_flags(self, segment: Segment) -> int:
        group = self.groups[segment.group]
        flags = table.MAXIMIZE.value if group.maximize else 0
        flags |= table.DECOUPLED.value if group.decoupled else 0
        flags |= table.OWN_DECAY.value if self.rule.decay == "own" else 0
        flags |= table.CLIP_ALONE.value if group.clips_alone else 0
        flags |= table.LR_INDEPENDENT.value if group.independent else 0
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
            row[table.PARAM.value], row[table.NUMEL.value], row[table.GROUP.value] = s.weight.data_ptr(), n, 1 + s.group
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

    def _fill_header(self) -> None:
        counts = self.rows.array[:, table.NORM_COUNT.value]
        multi = np.flatnonzero(counts > 1)
        self.counts = self._constant(np.array([len(self.segments), len(multi), *multi], dtype=np.int64))
        header = [0.0] * table.HEADER_WIDTH.value
        wide_grad = any(REAL_TYPE.get(d, d) == torch.float64 for d in (s.grad_dtype for s in self.segments))
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
            self._set_row(1 + index, self.groups[index].numbers)
        self.hypers.upload()
        self.addresses.upload()

    def set_conditions(self, conditions: Conditions) -> None:
        """Take what holds for this step as a whole; uploads only what changed."""
        signature = conditions.signature
        if signature != self._conditions:
            self._conditions = signature
            self.norm_mode, self.scaled = conditions.norm_mode, conditions.scaled
            if self.rule.grad_norm and self.norm_mode in (table.NO_NORM.value, table.GIVEN_NORM.value):
                self.norm_mode = table.OWN_NORM.value if self.norm_mode == table.NO_NORM.value else self.norm_mode
            self._set_row(0, conditions.numbers)
            self.hypers.upload()
            self.addresses.upload()

    def _set_row(self, row: int, numbers: dict[int, Any]) -> None:
        for column, value in numbers.items():
            address = _hyper_address(self._here(row, column, value))
            self.addresses.array[row, column] = address
            self.hypers.array[row, column] = 0.0 if address else float(value)

    def _here(self, row: int, column: int, value: Any) -> Any:
        """A number that kernels can read: a tensor of another GPU gets a copy, renewed at every step."""
        self._mirrors.pop((row, column), None)
        if not isinstance(value, Tensor) or value.device == self.device:
            return value
        if value.device.type == "cpu":
            return float(value)
        self._mirrors[row, column] = (value, value.to(self.device))
        return self._mirrors[row, column][1]


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
