"""What the counts predict for a real model: the time that memory needs, and the time that issuing needs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from fusedopt.inspect.counts import Inspection, of_full_chunks

BANDWIDTH = 4.3e12
"""Bytes per second that a plain copy reaches on an H200, read and written together: measured."""

ISSUE_RATES = {"sm_90": 132 * 4 * 32 * 1.98e9}
"""Instructions per second, counted per lane: an H200's SMs × schedulers × lanes × boost clock. From its data sheet."""


@dataclass(frozen=True)
class Roofline:
    """params: elements of the model. bandwidth: bytes per second. Bytes and instructions are per parameter, over all
    kernels of a step, for aligned full chunks. seconds: the larger of the two times; a prediction, not a measurement.
    """

    params: float
    bandwidth: float
    bytes_per_param: float
    instructions_per_param: float
    memory_seconds: float
    issue_seconds: float | None
    predicted: bool = True

    @property
    def seconds(self) -> float:
        """Time of one step if the slower of memory and issue hides the other."""
        return max(self.memory_seconds, self.issue_seconds or 0.0)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers."""
        return {**asdict(self), "seconds": self.seconds}


def predict(inspection: Inspection, params: float, bandwidth: float) -> Roofline | None:
    """The roofline of a step; None where only code was read and nothing counted."""
    cases = [case for _, case in of_full_chunks(inspection)]
    if not cases:
        return None
    byte_count = sum(case.bytes_per_param for case in cases)
    instructions = sum(case.instructions_per_element for case in cases)
    rate = ISSUE_RATES.get(inspection.arch)
    return Roofline(
        params, bandwidth, byte_count, instructions, byte_count * params / bandwidth,
        None if rate is None else instructions * params / rate,
    )  # fmt: skip
