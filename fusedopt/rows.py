"""The tables that kernels read on one device: segment rows, gradient addresses, hyper-parameters, conditions.

Built once per plan; a steady step uploads gradient addresses if they moved and hyper-parameters if they changed.
"""

from collections.abc import Sequence
from itertools import zip_longest

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import launch, table
from fusedopt_kernels.numerics import REAL_TYPE

from .conditions import Conditions
from .groups import GroupOptions
from .metrics import Report
from .numbers import NumberTable, Shared, tagged_address
from .rule import Rule
from .segment import Segment
from .upload import DeviceTable


class Rows:
    """Tables of some segments that live on one device and follow one rule.

    measures: its update changes parameters, whose norms may be wanted.
    """

    measures = True

    def __init__(self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], shared: Shared) -> None:
        self.rule, self.segments, self.groups, self.launcher = rule, segments, groups, shared.launcher
        self.device = segments[0].weight.device
        self.positions = np.array([s.position for s in segments])
        self.base_flags = np.array([self._base_flags(s) for s in segments], dtype=np.int64)
        self.fixed_misaligned = np.array([not _aligned(s) for s in segments])
        n, ng = len(segments), 1 + len(groups)  # row 0 of the hyper-parameters is the step's own
        self.rows = DeviceTable((n, table.ROW_WIDTH.value), torch.int64, self.device)
        self.grads = DeviceTable((n,), torch.int64, self.device)
        self.hypers = shared.hypers(ng, self.device, (rule, *(group.origin for group in groups)))
        self.conditions = NumberTable(1, table.CONDITIONS_WIDTH.value, self.device)
        self.scalars = torch.zeros(n * table.SCALAR_WIDTH.value, dtype=torch.float64, device=self.device)
        self._constants: list[DeviceTable] = []
        self._last_addresses: list[int] = []
        self._misaligned: np.ndarray | None = None  # None: the rows were never uploaded
        self._conditions: Conditions | None = None
        # (sum of squares of weights, of their change) by chunk
        self.change: Tensor | None = torch.empty(0) if self.measures and shared.metrics.change else None
        self.use = launch.NormUse()
        self._fill_rows()
        self._fill_header()

    @property
    def staging(self) -> int:
        """Bytes of pinned memory that uploads of all tables take, once made; some are uploaded twice in a step."""
        tables = (self.rows, self.grads, self.conditions.values, self.conditions.addresses, *self._constants)
        return 2 * sum(t.array.nbytes + 8 for t in tables)

    def _base_flags(self, segment: Segment) -> int:
        group = self.groups[segment.group]
        flags = table.MAXIMIZE.value if group.maximize else 0
        flags |= table.DECOUPLED.value if group.decoupled else 0
        flags |= table.OWN_DECAY.value if self.rule.decay == "own" else 0
        flags |= table.CLIP_ALONE.value if group.clips_alone else 0
        flags |= table.LR_INDEPENDENT.value if group.independent else 0
        flags |= table.COUNTED.value if segment.counted else 0
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
            programs = -(-(n // length * filled(length) if is_ragged(s) else n) // table.CHUNK)
            blocks = self._norm_blocks(s)
            length, stride, offset = s.span or (length, length, 0)
            row[table.PARAM.value], row[table.NUMEL.value], row[table.GROUP.value] = s.weight.data_ptr(), n, 1 + s.group
            row[table.STEP.value] = 0 if s.counter is None else s.counter.data_ptr()
            row[table.RESIDUAL.value] = 0 if s.residual is None else s.residual.data_ptr()
            row[table.ROW_LENGTH.value], row[table.GLOBAL_STRIDE.value] = length, stride
            row[table.GLOBAL_OFFSET.value], row[table.WHOLE_NUMEL.value] = offset, s.whole_numel
            row[table.WEIGHT_KEY.value], *keys = (key or 0 for key in s.keys or (0,))
            row[table.KEYS.value : table.KEYS.value + len(keys)] = keys
            row[table.NORM_START.value], row[table.NORM_COUNT.value] = partials, blocks
            row[table.MEASURE_START.value], row[table.MEASURE_COUNT.value] = chunks, programs
            row[table.MASK.value] = 0 if s.mask is None else s.mask.data_ptr()
            if s.ema is not None and s.ema_step is not None:
                row[table.EMA.value], row[table.EMA_STEP.value] = s.ema.data_ptr(), tagged_address(s.ema_step)
            for j, (slot, scale) in enumerate(zip_longest(s.slots, s.scales)):
                row[table.SLOTS.value + 2 * j] = slot.data_ptr()
                row[table.SLOTS.value + 2 * j + 1] = 0 if scale is None else scale.data_ptr()
            for j, number in enumerate(s.numbers):
                row[table.LAST.value - j] = tagged_address(number)
            partials += blocks
            chunks += programs
        self.n_chunks, self.n_partials = chunks, partials
        if self.change is not None:
            self.change = torch.full((max(1, chunks), 2), torch.nan, dtype=torch.float64, device=self.device)
            first = rows[:, table.MEASURE_START.value]
            rows[:, table.CHANGE.value] = self.change.data_ptr() + 2 * self.change.itemsize * first

    def _norm_blocks(self, s: Segment) -> int:
        """Partials of a gradient's norm."""
        return -(-s.numel // table.NORM_CHUNK)

    def _fill_header(self) -> None:
        self.counts = self._constant(segment_counts(self.rows.array[:, table.NORM_COUNT.value]))
        header = [0.0] * table.HEADER_WIDTH.value
        wide_grad = any(REAL_TYPE.get(d, d) == torch.float64 for d in self._grad_dtypes())
        header[table.NORM_IS_FP64.value] = float(wide_grad)
        self.header = self._constant(np.array(header))
        partials = max(1, 2 * self.n_partials, self.n_chunks * max(1, self.rule.n_norms))
        self.partials = torch.zeros(partials, dtype=torch.float64, device=self.device)

    def _grad_dtypes(self) -> set[torch.dtype]:
        return {s.grad_dtype for s in self.segments if s.param.grad is not None}

    def _constant(self, values: np.ndarray) -> Tensor:
        """Values on the device."""
        self._constants.append(DeviceTable.of(values, self.device))
        return self._constants[-1].tensor

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
            self.hypers.set_row(1 + index, self.groups[index].numbers)
        self.hypers.upload()

    def set_agreed(self, conditions: Conditions) -> None:
        """Take what the groups agree on."""
        self.hypers.set_row(0, conditions.agreed)
        self.hypers.upload()

    def set_conditions(self, conditions: Conditions) -> None:
        """Take what holds for this step as a whole; uploads only what changed."""
        if conditions is not self._conditions:
            self._conditions = conditions
            self.use = conditions.use(self.rule, any(self.groups[s.group].clips_alone for s in self.segments))
            self.set_agreed(conditions)
            self.conditions.set_row(0, conditions.numbers)
            self.conditions.upload()

    def report(self) -> Report:
        """What the last step measured."""
        scalars = self.scalars.view(-1, table.SCALAR_WIDTH.value).clone()
        with_norm = self._conditions is not None and self._conditions.norm_mode != table.NO_NORM.value
        change = None if self.change is None else self._by_segment(self.change[: self.n_chunks])
        return Report(
            [s.param for s in self.segments],
            self.header[table.NORM.value].clone() if with_norm else None,
            self.use.kind,
            scalars[:, table.GRADIENT_NORM.value] if self.use.own else None,
            scalars[:, table.CLIP.value] if with_norm else None,
            change,
        )

    def _by_segment(self, chunks: Tensor, counts: int = table.MEASURE_COUNT.value) -> Tensor:
        """Sums over the chunks of each segment, along dim 0; counts: column of their number."""
        lengths = self.rows.tensor[:, counts]
        # unsafe: its checks would wait for the device
        return torch.segment_reduce(chunks, "sum", lengths=lengths, axis=0, initial=0.0, unsafe=True)

    def count_steps(self, tally: Tensor) -> None:
        """Keep running counts there."""
        self.conditions.set_address(0, table.TALLY.value, tally.data_ptr())
        self.conditions.upload()


def segment_counts(chunks: np.ndarray) -> np.ndarray:
    """What `total_norm` reads of segments of so many chunks: their number, that of several chunks, and which."""
    many = np.flatnonzero(chunks > 1)
    return np.array([len(chunks), len(many), *many], dtype=np.int64)


def programs(members: "Sequence[int] | np.ndarray", counts: np.ndarray) -> np.ndarray:
    """(segment, chunk) of every program of a launch, int32; counts: programs of each member."""
    first = np.repeat(np.cumsum(counts) - counts, counts)
    return np.stack([np.repeat(np.asarray(members), counts), np.arange(len(first)) - first], axis=1).astype(np.int32)


def _aligned(s: Segment) -> bool:
    """Every address but the gradient's is a multiple of 16, and every row one of a group, where there are groups."""
    tensors = [s.weight, *s.slots, *s.scales, s.residual, s.mask, s.ema]
    return not is_ragged(s) and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def is_ragged(s: Segment) -> bool:
    """Whether state is quantised in groups that rows do not divide into."""
    return any(form is not None for form in s.formats) and _row_length(s.weight) % table.SCALE_GROUP != 0


def filled(length: int) -> int:
    """Length of a row filled up to whole groups."""
    return -(-length // table.SCALE_GROUP) * table.SCALE_GROUP


def _row_length(t: Tensor) -> int:
    """Stored numbers in one row along dim 0 (all of them for 0-dim and 1-dim tensors)."""
    n = t.numel() * (2 if t.is_complex() else 1)
    return n // t.shape[0] if t.dim() > 1 and t.shape[0] else n
