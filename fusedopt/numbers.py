"""Tables of numbers that kernels read when they run: floats that the host uploads, or tensors of the user's."""

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from fusedopt_kernels import launch, table

from .metrics import Metrics
from .ranks import Reach
from .upload import DeviceTable, capturing

KEPT = 64
"""Tables of hyper-parameters that an optimizer keeps for later plans; captured steps keep their own."""


class NumberTable:
    """Rows of float64 values and, beside them, addresses of tensors that override them.

    live: changes go to the device outside of CUDA graphs only, so that a replay reads what was uploaded last. Other
    tables are copied inside the graph that is captured, and a replay finds them as they were.
    """

    def __init__(self, rows: int, width: int, device: torch.device, live: bool = False) -> None:
        self.device, self.live = device, live
        self.values = DeviceTable((rows, width), torch.float64, device)
        self.addresses = DeviceTable((rows, width), torch.int64, device)
        self._tensors: dict[tuple[int, int], Tensor] = {}
        self._mirrors: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._stale: dict[str, DeviceTable] = {"values": self.values, "addresses": self.addresses}

    def set_row(self, row: int, numbers: dict[int, Any]) -> None:
        """Take numbers by column; `upload` brings them to the device."""
        for column, value in numbers.items():
            here = self._here((row, column), value)
            address = tagged_address(here) if isinstance(here, Tensor) else 0
            self.set_address(row, column, address)
            value = 0.0 if address else float(value)
            if self.values.array[row, column] != value:
                self.values.array[row, column] = value
                self._stale["values"] = self.values

    def set_address(self, row: int, column: int, address: int) -> None:
        """Take an address as it is."""
        if self.addresses.array[row, column] != address:
            self.addresses.array[row, column] = address
            self._stale["addresses"] = self.addresses

    def upload(self) -> None:
        """Copy what changed to the device.

        Raises:
            RuntimeError: a live table changed since its last upload, and a CUDA graph is being captured.
        """
        if self._stale and self.live and capturing():
            raise RuntimeError(
                "a hyper-parameter changed since the last step, and a CUDA graph that copied it to the device would do "
                "so at every replay: before the capture, with gradients in place, call refresh() on the optimizer"
            )
        for changed in self._stale.values():
            changed.upload()
        self._stale = {}

    def renew(self) -> None:
        """Copy tensors of other GPUs once more."""
        for value, mirror in self._mirrors.values():
            mirror.copy_(value, non_blocking=True)

    def _here(self, place: tuple[int, int], value: Any) -> Any:
        """A number that kernels can read: a tensor of another GPU gets a copy; one of the CPU is read now."""
        known = self._mirrors.get(place)
        if known is not None and known[0] is value:
            return known[1]
        self._mirrors.pop(place, None)
        self._tensors.pop(place, None)
        if not isinstance(value, Tensor):
            return value
        if value.device == self.device:
            self._tensors[place] = value  # its address is read as long as it stands here
            return value
        if value.device.type == "cpu":
            return float(value)
        self._mirrors[place] = (value, value.to(self.device))
        return self._mirrors[place][1]


class Shared:
    """What the parts of a plan share with those of other plans of one optimizer.

    launcher: starts kernels. metrics: what is to be measured. reach: ranks that sums go over. Live
    hyper-parameter tables outlast plans, for captured steps read them; so do running counts.
    """

    def __init__(self, launcher: launch.Launcher, metrics: Metrics) -> None:
        self.launcher, self.metrics = launcher, metrics
        self.offload: Any = None  # an `Offload`, where state is on the host
        self.reach = Reach()
        self._hypers: OrderedDict[Hashable, NumberTable] = OrderedDict()
        self.tallies: dict[torch.device, Tensor] = {}

    def hypers(self, rows: int, device: torch.device, key: Hashable) -> NumberTable:
        """The live table of hyper-parameters for parts of a key.

        Raises:
            RuntimeError: there is none yet, and a CUDA graph is being captured.
        """
        key = (rows, device, key)
        if key in self._hypers:
            self._hypers.move_to_end(key)
        else:
            if capturing():
                raise RuntimeError(
                    "hyper-parameters are not on the device yet, and a CUDA graph that copied them there would do it "
                    "again at every replay: step once before the capture"
                )
            self._hypers[key] = NumberTable(rows, table.HYPER_WIDTH.value, device, live=True)
            if len(self._hypers) > KEPT:
                self._hypers.popitem(last=False)
        return self._hypers[key]

    def tally(self, device: torch.device) -> Tensor:
        """Running counts, see ``table.py``."""
        if device not in self.tallies:
            self.tallies[device] = torch.zeros(table.TALLY_WIDTH.value, dtype=torch.float64, device=device)
        return self.tallies[device]


def tagged_address(number: Tensor) -> int:
    """Address of an fp32 or fp64 number, shifted left once; the low bit says fp64.

    Raises:
        TypeError: a tensor of another dtype.
    """
    if number.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"hyper-parameter tensors must be float32 or float64, got {number.dtype}")
    return number.data_ptr() << 1 | (number.dtype == torch.float64)
