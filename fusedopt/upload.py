"""Small tables that the host writes and kernels read."""

import numpy as np
import torch


class DeviceTable:
    """A host array and its copy on the device.

    On a GPU an upload goes through pinned staging buffers, each reused only after its copy has finished, so nothing
    waits and nothing in flight is overwritten. While a CUDA graph is captured each upload gets a staging buffer of
    its own that is kept and never written again: a replay reads what was captured. On the CPU both are one memory.
    """

    STAGES = 4

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        host = torch.zeros(shape, dtype=dtype)
        self.array: np.ndarray = host.numpy()
        self.shared = device.type == "cpu"
        self.tensor = host if self.shared else torch.zeros(shape, dtype=dtype, device=device)
        self._stages: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        self._captured: list[torch.Tensor] = []
        self._next = 0
        self.uploads = 0

    def update(self, values: np.ndarray) -> None:
        """Upload values if they differ from what is there."""
        if not np.array_equal(self.array, values):
            self.array[...] = values
            self.upload()

    def upload(self) -> None:
        """Copy the host array to the device, in order on the current stream."""
        self.uploads += 1
        if self.shared:
            return
        host = torch.from_numpy(self.array)
        if torch.cuda.is_current_stream_capturing():
            self._captured.append(torch.empty_like(host, pin_memory=True).copy_(host))
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
