"""The second method: counts the bytes that the same kernels load and store in Triton's interpreter.

Works only where kernels are interpreted (TRITON_INTERPRET=1 before Triton was imported). Every load and store of an
interpreted kernel goes through two operations of the interpreter's builder; they are wrapped while a step runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from fusedopt.inspect.counts import Bytes
from fusedopt.inspect.memory import TABLE, Places
from fusedopt.inspect.subject import CASES, Configuration, Subject, build
from fusedopt_kernels import launch

Access = tuple[str, np.ndarray, int]
"""(load or store, addresses of the lanes that the mask leaves, bytes of each)."""


class CountingLauncher(launch.Launcher):
    """Runs kernels in the interpreter and writes down the accesses of those that work chunk by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.accesses: dict[str, list[Access]] = {}
        self.tables: list[torch.Tensor] = []

    def run(self, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
        self.tables.extend(args)
        if "chunks" not in spec.signature:
            super().run(spec, grid, args)
            return
        with listening(self.accesses.setdefault(spec.name, [])):
            super().run(spec, grid, args)


@contextmanager
def listening(accesses: list[Access]) -> Iterator[None]:
    """Append every load and store that interpreted kernels do meanwhile."""
    from triton.runtime import interpreter

    builder_class: Any = interpreter.InterpreterBuilder
    load, store = builder_class.create_masked_load, builder_class.create_masked_store

    def note(what: str, pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        lanes = np.broadcast_to(mask.data, pointers.data.shape)
        accesses.append((what, pointers.data[lanes].astype(np.uint64).ravel(), size))

    def counted_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        note("load", ptrs, mask)
        return load(builder, ptrs, mask, *rest)

    def counted_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        note("store", ptrs, mask)
        return store(builder, ptrs, value, mask, *rest)

    builder_class.create_masked_load, builder_class.create_masked_store = counted_load, counted_store
    try:
        yield
    finally:
        builder_class.create_masked_load, builder_class.create_masked_store = load, store


def count(configuration: Configuration) -> Bytes:
    """Bytes that one step loads and stores, by kernel, case and role."""
    return count_step(build(configuration))


def count_step(subject: Subject, launcher: CountingLauncher | None = None) -> Bytes:
    """The same for an optimizer that has a step to take."""
    launcher = launcher or CountingLauncher()
    subject.optimizer._launcher = launcher
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in `subject.record`
        subject.optimizer.step()
    places = Places(subject.regions(launcher.tables))
    result: Bytes = {}
    for kernel, accesses in launcher.accesses.items():
        cases = result.setdefault(kernel, {name: {} for name in CASES})
        for what, addresses, size in accesses:
            found, lanes = np.unique(places.locate(what, addresses, size), return_counts=True)
            for place, n in zip(found, lanes, strict=True):
                region = places.regions[place]
                if region.role != TABLE:
                    counted = cases[list(CASES)[region.case]].setdefault(region.role, {})
                    counted[what] = counted.get(what, 0) + int(n) * size
    return result
