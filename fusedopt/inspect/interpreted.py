"""The second method: counts the bytes that the same kernels load and store in Triton's interpreter.

Works only where kernels are interpreted (TRITON_INTERPRET=1 before Triton was imported); `listener.py` hears them.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from fusedopt.inspect.counts import Bytes
from fusedopt.inspect.listener import Listener, listening
from fusedopt.inspect.memory import TABLE, Places
from fusedopt.inspect.subject import Configuration, Subject, begin, build, kernel_name
from fusedopt_kernels import launch


class CountingLauncher(launch.Launcher):
    """Runs kernels in the interpreter and writes down the accesses of those that work chunk by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.listeners: dict[str, Listener] = {}
        self.tables: list[torch.Tensor] = []

    def run(self, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
        self.tables.extend(args)
        if "chunks" not in spec.signature:
            super().run(spec, grid, args)
            return
        with listening(self.listeners.setdefault(kernel_name(spec), Listener())):
            super().run(spec, grid, args)


def count(configuration: Configuration) -> Bytes:
    """Bytes that one step loads and stores, by kernel, case and role."""
    return count_step(build(configuration))


def count_step(subject: Subject, launcher: CountingLauncher | None = None) -> Bytes:
    """The same for an optimizer that has a step to take."""
    launcher = launcher or CountingLauncher()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `subject.record`
        begin(subject, launcher)
        launcher.listeners.clear()
        launcher.tables.clear()
        subject.optimizer.step()
    places = Places(subject.regions(launcher.tables))
    result: Bytes = {}
    for kernel, listener in launcher.listeners.items():
        cases = result.setdefault(kernel, {})
        for what, addresses, size in listener.counted():
            located = places.locate(what, addresses, size)
            for place in np.unique(located):
                region, here = places.regions[place], addresses[located == place]
                if region.role != TABLE:
                    counted = cases.setdefault(subject.cases[region.case], {}).setdefault(region.role, {})
                    lanes = len(np.unique(here)) if region.shared else len(here)
                    counted[what] = counted.get(what, 0) + lanes * size
    return result
