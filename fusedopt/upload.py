"""Small tables that the host writes and kernels read."""

import numpy as np
import torch

_reserve = torch.empty(0, dtype=torch.uint8, device="cpu")
"""Pinned memory for the next capture: pinning memory while a stream is captured fails before torch 2.12."""


def capturing() -> bool:
    """Whether work on the current stream goes into a CUDA graph."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def reserve(size: int) -> None:
    """Keep ``size`` bytes of pinned memory ready for a capture."""
    global _reserve
    if _reserve.numel() < size:
        _reserve = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)


def _take(host: torch.Tensor) -> torch.Tensor:
    """Pinned memory of the host tensor's shape, from the reserve while it lasts."""
    global _reserve
    size = -(-host.nbytes // 8) * 8
    if _reserve.numel() < size:
        return torch.empty_like(host, pin_memory=True)
    taken, _reserve = _reserve[: host.nbytes], _reserve[size:]
    return taken.view(host.dtype).view(host.shape)


class DeviceTable:
    """A host array and its copy on the device.

    On a GPU an upload goes through pinned staging buffers, each reused only after its copy has finished, so nothing
    waits and nothing in flight is overwritten. While a CUDA graph is captured each upload gets a staging buffer of
    its own that is kept and never written again: a replay reads what was captured. On the CPU both are one memory.
    """

    STAGES = 4

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        host = torch.zeros(shape, dtype=dtype, device="cpu")  # whatever the default device is
        self.array: np.ndarray = host.numpy()
        self.shared = device.type == "cpu"
        self.tensor = host if self.shared else torch.zeros(shape, dtype=dtype, device=device)
        self._stages: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._captured: list[torch.Tensor] = []
        self._next = 0
        self.uploads = 0

    @classmethod
    def of(cls, values: np.ndarray, device: torch.device) -> "DeviceTable":
        """Values that do not change, uploaded."""
        constant = cls(values.shape, torch.from_numpy(values).dtype, device)
        constant.array[...] = values
        constant.upload()
        return constant

    def update(self, values: np.ndarray) -> None:
        """Upload values if they differ from what is there."""
        if (self.array != values).any():
            self.array[...] = values
            self.upload()

    def upload(self) -> None:
        """Copy the host array to the device, in order on the current stream."""
        self.uploads += 1
        if self.shared:
            return
        host = torch.from_numpy(self.array)
        if capturing():
            self._captured.append(_take(host).copy_(host))
            self.tensor.copy_(self._captured[-1], non_blocking=True)
            return
        if len(self._stages) < self.STAGES:
            self._stages.append((torch.empty_like(host, pin_memory=True), torch.cuda.Event()))
        stage, event = self._stages[self._next % len(self._stages)]
        self._next += 1
        event.synchronize()  # returns at once unless the copy of STAGES uploads ago is still running
        stage.copy_(host)
        self.tensor.copy_(stage, non_blocking=True)
        event.record(torch.cuda.current_stream(self.tensor.device))
