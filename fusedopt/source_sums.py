"""Sums of single gradients, for a step whose norm pass backward makes (``source.py``)."""

from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import table
from fusedopt_kernels.source import source_spec

from .conditions import Conditions
from .eager import EagerStep
from .norm import Blocks, eager_blocks
from .plan import Plan
from .sparse import EagerRows, SparseTables
from .tables import DeviceTables, Launch

if TYPE_CHECKING:
    from .parts import Parts


class KernelSums:
    """Launches over single gradients of a part that runs kernels."""

    def __init__(self, part: DeviceTables, kind: int) -> None:
        self.part, self.kind = part, kind
        counts = part.rows.array[:, table.NORM_COUNT.value].tolist()
        rows = part.rows.tensor.unbind()
        self._of = [
            (source_spec(s.grad_dtype, kind), n, row) for s, n, row in zip(part.segments, counts, rows, strict=True)
        ]
        self._pass: list[Launch] | None = None

    def launch(self, index: int, address: int) -> list[Launch]:
        """Over the gradient of segment number ``index``; none if it is empty."""
        spec, programs, row = self._of[index]
        args: Any = (row, self.part.partials, address)
        return [(spec, programs, args)] if programs else []

    def add(self, index: int, grad: Tensor) -> None:
        """Sum up one gradient."""
        self.part._start(self.launch(index, grad.data_ptr()))

    def wrong(self, plan: Plan) -> list[int]:
        """Make the norm pass; returns the segments whose sums differ from it in a bit."""
        part = self.part
        kept = part.partials.clone()
        part.set_gradients(plan.grad_addresses)
        if self._pass is None:
            part.summed = False
            self._pass = part._norm_launches(self.kind, False)
            part.summed = True
        part._start(self._pass)
        same = (kept.view(torch.int64) == part.partials.view(torch.int64)) | (kept.isnan() & part.partials.isnan())
        differs = (~same).nonzero().flatten().cpu().numpy() // 2
        ends = np.cumsum(part.rows.array[:, table.NORM_COUNT.value])
        return sorted({int(i) for i in np.searchsorted(ends, differs, side="right")})


class EagerSums:
    """The same for a part that runs eager twins."""

    def __init__(self, part: EagerStep, kind: int) -> None:
        self.part, self.kind = part, kind
        self._lock = Lock()  # backward passes of several threads share the part's scratch
        part.blocks = [Blocks([], True)] * len(part.segments)

    def add(self, index: int, grad: Tensor) -> None:
        """Sum up one gradient."""
        with np.errstate(all="ignore"), self._lock:
            self.part.blocks[index] = eager_blocks([grad], self.part.workers, self.kind)[0]

    def wrong(self, plan: Plan) -> list[int]:
        """Make the norm pass; returns the segments whose sums differ from it in a bit."""
        part, kept = self.part, self.part.blocks
        part.blocks = eager_blocks([plan.grads[s.position] for s in part.segments], part.workers, self.kind)
        pairs = enumerate(zip(kept, part.blocks, strict=True))
        return [i for i, (a, b) in pairs if np.array(a.sums).tobytes() != np.array(b.sums).tobytes()]


def sums_of(plan: Plan, parts: "Parts") -> list[KernelSums | EagerSums]:
    """One for each part with dense gradients; a sparse one is not whole before it is coalesced."""
    kind = Conditions(plan.groups).kind
    inner = [getattr(part, "momentum", part) for part in (*parts.tables, *parts.eager)]  # the first pass of Muon
    dense = [part for part in inner if not isinstance(part, SparseTables | EagerRows)]
    return [EagerSums(part, kind) if isinstance(part, EagerStep) else KernelSums(part, kind) for part in dense]


def prepare(plan: Plan, parts: "Parts") -> int:
    """Compile what hooks would launch; returns how many kernels were not ready."""
    kernels = [sums for sums in sums_of(plan, parts) if isinstance(sums, KernelSums)]
    return sum(sums.part._prepare(sums.launch(i, 0)) for sums in kernels for i in range(len(sums.part.segments)))
