"""How a twin reaches the numbers of a segment: as blocks of the compute type, whatever format they are kept in."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedopt_kernels.numerics import compute_type
from fusedopt_kernels.param.format import WeightFormat
from fusedopt_kernels.rng import dither_eager, random16_eager, random16_range, stochastic_eager
from fusedopt_kernels.state.format import StateFormat
from fusedopt_kernels.table import SCALE_GROUP as GROUP

from . import layout
from .blocks import GRAIN, Lane, as_array, as_tensor
from .encoded import row_of
from .formats import LOW

if TYPE_CHECKING:
    from .segment import Segment


class Noise:
    """The random bits that round a tensor, which go by the index in the whole parameter."""

    def __init__(self, key: int, s: "Segment") -> None:
        self.key, self.device, self.step = key, s.weight.device, 0
        length = s.weight.shape[1:].numel() if s.weight.dim() else 1
        self.length, self.stride, self.offset = s.span or (length, length, 0)
        self.rows = None if s.rows is None else s.rows.cpu().numpy()

    def bits(self, low: int, high: int) -> Tensor:
        """Of elements low … high: int32 below 2¹⁶."""
        if self.rows is None and self.length == self.stride:
            bits = random16_range(self.key, self.offset + low, high - low, self.step)
        else:
            bits = random16_eager(self.key, self._index(low, high), self.step).astype(np.int32)
        return torch.from_numpy(bits).to(self.device)

    def _index(self, low: int, high: int) -> np.ndarray:
        local = np.arange(low, high)
        if self.rows is None and self.length == self.stride:
            return local + self.offset
        row = local // self.length
        return (row if self.rows is None else self.rows[row]) * self.stride + local % self.length + self.offset


class Dither(Noise):
    """The same for formats that are dithered (`rng.dither`)."""

    def bits(self, low: int, high: int) -> Tensor:
        return torch.from_numpy(dither_eager(self._index(low, high), self.step)).to(self.device)


class Port:
    """One tensor of a segment, as numbers of the compute type: its own memory if it has that type, else a copy.

    noise: what it is rounded with, None to nearest; its step must be set before `store`. unit: elements that belong
    together: blocks end at multiples of it.
    """

    unit = 1
    noise: Noise | None = None

    def __init__(self, tensor: Tensor, compute: torch.dtype, noise: Noise | None = None) -> None:
        self.tensor, self.compute, self.noise = layout.flat(tensor), compute, noise
        self.array = as_array(self.tensor) if self.tensor.dtype == compute else None

    def load(self, low: int, high: int, lane: Lane) -> Any:
        """Elements low … high as an array of the compute type; writing to it and `store` change the tensor."""
        if self.array is not None:
            return self.array[low:high]
        array = lane.take(self.compute, high - low)
        for part, out in self._pieces(low, high, array):
            self._read(part, out)
        return array

    def store(self, low: int, high: int, array: Any) -> None:
        """Write back what `load` gave, rounding once; the array's numbers are lost."""
        if self.array is None:
            for part, x in self._pieces(low, high, array):
                self._write(part, x, None if self.noise is None else self.noise.bits(part.start, part.stop))

    def _read(self, part: slice, out: Tensor) -> None:
        out.copy_(self.tensor[part])

    def _write(self, part: slice, x: Tensor, noise: Tensor | None) -> None:
        self.tensor[part].copy_(x if noise is None else stochastic_eager(x, noise, self.tensor.dtype))

    def _pieces(self, low: int, high: int, array: Any) -> Iterator[tuple[slice, Tensor]]:
        whole = as_tensor(array)
        grain = max(1, GRAIN // self.unit) * self.unit
        for start in range(low, high, grain):
            stop = min(start + grain, high)
            yield slice(start, stop), whole[start - low : stop - low]


class WeightPort(Port):
    """A weight in a format of its own."""

    def __init__(self, weight: Tensor, residual: Tensor | None, form: WeightFormat, noise: Noise | None) -> None:
        super().__init__(weight, torch.float32, noise)
        self.form, self.array = form, None
        self.residual = None if residual is None else layout.flat(residual)

    def _beside(self, part: slice) -> Tensor | None:
        return None if self.residual is None else self.residual[part]

    def _read(self, part: slice, out: Tensor) -> None:
        self.form.load(self.tensor[part], self._beside(part), out)

    def _write(self, part: slice, x: Tensor, noise: Tensor | None) -> None:
        self.form.store(x, self.tensor[part], self._beside(part), noise)


class CodedPort(Port):
    """Quantised state. Rows that are no multiple of a group are taken whole and filled up."""

    def __init__(self, codes: Tensor, scales: Tensor, form: StateFormat, weight: Tensor, noise: Noise | None) -> None:
        super().__init__(codes, torch.float32, noise)
        self.form, self.scales = form, layout.flat(scales)
        _, self.length, self.groups = row_of(weight.shape)
        self.unit = self.length if self.length % GROUP else GROUP

    def _places(self, part: slice) -> tuple[slice, slice]:
        """Codes and scales of some elements."""
        if self.unit == GROUP:
            first, last = part.start // GROUP, part.stop // GROUP
        else:
            first, last = (x // self.length * self.groups for x in (part.start, part.stop))
        packed = self.form.packed
        return slice(first * GROUP // packed, last * GROUP // packed), slice(first, last)

    def _filled(self, x: Tensor) -> Tensor:
        """Elements in whole groups, (groups, GROUP)."""
        if self.unit != GROUP:
            x = F.pad(x.view(-1, self.length), (0, self.groups * GROUP - self.length))
        return x.reshape(-1, GROUP)

    def _cut(self, x: Tensor) -> Tensor:
        """Inverse of `_filled`, as one row."""
        return x.reshape(-1) if self.unit == GROUP else x.reshape(-1, self.groups * GROUP)[:, : self.length].reshape(-1)

    def _read(self, part: slice, out: Tensor) -> None:
        codes, scales = self._places(part)
        whole = self._filled(self.tensor[part]) if self.form.packed == 1 else self.tensor[codes]
        out.copy_(self._cut(self.form.load(whole.view(-1, GROUP // self.form.packed), self.scales[scales])))

    def _write(self, part: slice, x: Tensor, noise: Tensor | None) -> None:
        codes, scales = self._places(part)
        made, self.scales[scales] = self.form.store(self._filled(x), None if noise is None else self._filled(noise))
        if self.form.packed == 1:
            self.tensor[part] = self._cut(made)
        else:
            self.tensor[codes] = made.reshape(-1)


def weight_port(s: "Segment") -> Port:
    """The weight's numbers, in whatever format."""
    if s.weight_format is None:
        return Port(s.weight, compute_type(s.weight.dtype))
    return WeightPort(s.weight, s.residual, s.weight_format, _noise(s, 0))


def slot_port(s: "Segment", i: int) -> Port:
    """The numbers of slot i, in whatever format."""
    scales, form = s.scales[i], s.formats[i]
    noise = _noise(s, 1 + i) if form is not None or s.slots[i].dtype in LOW else None
    if form is None or scales is None:
        return Port(s.slots[i], compute_type(s.weight.dtype), noise)
    if noise is None and form.dithered:
        noise = Dither(0, s)
    return CodedPort(s.slots[i], scales, form, s.weight, noise)


def _noise(s: "Segment", i: int) -> Noise | None:
    """What rounds the weight (0) or slot number i − 1."""
    key = s.keys[i] if i < len(s.keys) else None
    return None if key is None else Noise(key, s)
