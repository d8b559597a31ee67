"""GPUs that times are predicted for. From data sheets, but for the bandwidth of the H200."""

from typing import NamedTuple

COPY = 4.3 / 4.8
"""What a copy reached of an H200's nominal bandwidth; assumed of the others."""


class Hardware(NamedTuple):
    """bandwidth: bytes per second of a plain copy, read and written together. clock: boost, in Hz. memory: bytes."""

    arch: str
    multiprocessors: int
    clock: float
    memory: float
    bandwidth: float
    source: str

    @property
    def issue_rate(self) -> float:
        """Instructions per second, counted once for each lane: four schedulers of 32 lanes."""
        return self.multiprocessors * 4 * 32 * self.clock


HARDWARE = {
    "H200": Hardware("sm_90", 132, 1.98e9, 141e9, 4.3e12, "SXM5; bandwidth of a copy measured, nominal 4.8e12"),
    "H100": Hardware("sm_90", 132, 1.98e9, 80e9, COPY * 3.35e12, "SXM5 data sheet, nominal bandwidth 3.35e12"),
    "A100": Hardware("sm_80", 108, 1.41e9, 80e9, COPY * 2.039e12, "SXM4 80 GB data sheet, nominal bandwidth 2.039e12"),
    "B200": Hardware("sm_100", 148, 1.98e9, 180e9, COPY * 8e12, "HGX data sheet, nominal bandwidth 8e12; "
                     "multiprocessors and clock are not in it, but as third parties list them"),
}  # fmt: skip
"""By what the GPU's name contains."""


def of(name: str) -> Hardware | None:
    """The GPU of this name, if it is one of them."""
    return next((hardware for key, hardware in HARDWARE.items() if key in name), None)
