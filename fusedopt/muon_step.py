"""The step of Muon on one device: directions of all matrices, their orthogonalisation, all updates.

1. One scalars launch and one element-wise launch renew the momenta and write each direction, rounded to bf16, into
   one scratch buffer, where matrices of a group and shape lie side by side.
2. Newton–Schulz by batched products on each such batch, in place: 3 calls and 3 for each iteration, whatever the
   number of matrices. All batches share one workspace.
3. One scalars and one element-wise launch: p ← p − (lr·ratio·o + lr·weight_decay·p), rounded once.

Steps 1 and 3 are the engine's own kernels or eager twins around the two rules of ``rules/muon.py``. Beside the
momenta 2 bytes an element stay allocated, and a workspace of at most 2 to 6 bytes an element of the largest batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fusedopt_kernels import launch, table
from fusedopt_kernels.param import scratch

from .conditions import Conditions
from .derived import AFTER, BEFORE, DerivedGroups, DerivedSegment, check_segments, values, with_group
from .groups import GroupOptions
from .metrics import Report
from .numbers import Shared
from .rule import Rule
from .segment import Segment
from .tables import DeviceTables

BATCH = 1 << 27
"""Elements of one batch at most: a larger one takes more memory and no less time."""


@dataclass(frozen=True)
class Batch:
    """Matrices of one group and shape. x: (count, rows, columns) with rows ≤ columns: directions, and the result.

    spare: like x; gram, poly: (count, rows, rows); norms: (count, 1, 1). All bf16.
    """

    group: int
    x: Tensor
    spare: Tensor
    gram: Tensor
    poly: Tensor
    norms: Tensor


def orthogonalise(batch: Batch, coefficients: Sequence[float], steps: int, eps: float) -> None:
    """Newton–Schulz: x ← x/max(‖x‖, eps), then ``steps`` times x ← a·x + (b·A + c·A²)·x with A = x·xᵀ.

    Every result is rounded to bf16, as in torch.optim.Muon; nothing is allocated.

    Raises:
        ValueError: 100 steps or more, or not three coefficients.
    """
    if steps >= 100:
        raise ValueError("Number of steps must be less than 100 for computational efficiency")
    if len(coefficients) != 3:
        raise ValueError("Coefficients must be a tuple of exactly 3 values")
    a, b, c = coefficients
    gram, poly = batch.gram, batch.poly
    torch.linalg.vector_norm(batch.x, dim=(1, 2), keepdim=True, out=batch.norms)
    # begin where an even number of swaps ends in batch.x
    x, other = (batch.spare, batch.x) if steps % 2 else (batch.x, batch.spare)
    torch.div(batch.x, batch.norms.clamp_(min=eps), out=x)
    for _ in range(steps):
        torch.bmm(x, x.mT, out=gram)
        torch.baddbmm(gram, gram, gram, beta=b, alpha=c, out=poly)
        torch.baddbmm(x, poly, x, beta=a, out=other)
        x, other = other, x


def lr_ratio(adjust_lr_fn: str | None, shape: Sequence[int]) -> float:
    """What torch.optim.Muon multiplies lr with for a matrix of this shape."""
    rows, columns = shape
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns)) if columns else 1.0


class Directions:
    """What both backends share: scratch memory, batches, and the groups and segments of the two element-wise passes.

    first: segments of pass 1, which writes ``views``, one direction per segment; second: those of pass 3.
    """

    def __init__(self, rules: tuple[Rule, Rule], segments: Sequence[Segment], groups: Sequence[GroupOptions]) -> None:
        check_segments("Muon", segments)
        if any(s.param.dim() != 2 for s in segments):
            raise ValueError("Muon only updates 2D parameters; a framework may have flattened them after construction")
        self.groups = groups
        self.before = DerivedGroups(rules[0], groups, lambda group, _: values(group, BEFORE))
        self.after = DerivedGroups(rules[1], groups, _with_ratio)
        self.views: list[Tensor] = [torch.empty(0)] * len(segments)
        self.batches = self._batches(segments)
        self.first = [with_group(s, self.before.index(s.group)) for s in segments]
        for s in self.first:
            s.mask = s.residual = s.weight_format = None
            s.keys = (None, *s.keys[1:])
        self.second = [
            DerivedSegment(s, self.after.index(s.group, tuple(s.param.shape)), i, view)
            for i, (s, view) in enumerate(zip(segments, self.views, strict=True))
        ]

    def _batches(self, segments: Sequence[Segment]) -> list[Batch]:
        """Lay out the scratch memory and fill ``views``."""
        members: dict[tuple[int, int, int], list[int]] = {}
        for i, s in enumerate(segments):
            rows, columns = s.weight.shape
            members.setdefault((s.group, rows, columns), []).append(i)
        shares: list[tuple[int, int, int, list[int]]] = []
        for (group, rows, columns), all_of in members.items():
            count = max(1, BATCH // max(1, rows * columns))
            shares += [(group, rows, columns, all_of[i : i + count]) for i in range(0, len(all_of), count)]
        device = segments[0].weight.device
        needs = [_needs(rows, columns, len(few)) for _, rows, columns, few in shares]
        memory = torch.empty(sum(n[0] for n in needs), dtype=torch.bfloat16, device=device)
        workspace = torch.empty(max(map(sum, needs)), dtype=torch.bfloat16, device=device)
        batches = []
        for (group, rows, columns, few), need, part in zip(
            shares, needs, memory.split([need[0] for need in needs]), strict=True
        ):
            x = _matrices(part, len(few), rows, columns)
            for i, view in zip(few, x, strict=True):
                self.views[i] = view
            if rows * columns:
                batches.append(_batch(group, x, workspace.split([*need, len(workspace) - sum(need)])))
        return batches

    def renew(self, changed: Sequence[int]) -> tuple[list[int], list[int]]:
        """Take the plan's current groups; returns which groups of pass 1 and of pass 3 changed."""
        return self.before.renew(changed), self.after.renew(changed)

    def orthogonalise(self) -> None:
        """Pass 2."""
        for batch in self.batches:
            group = self.groups[batch.group]
            orthogonalise(batch, group.hyper("ns_coefficients"), group.hyper("ns_steps"), group.hyper("eps"))


def _padded(n: int) -> int:
    """Numbers to the next multiple of 128 bytes."""
    return -(-n // 64) * 64


def _needs(rows: int, columns: int, count: int) -> tuple[int, int, int, int]:
    """Numbers that matrices take, and each of two Gram matrices, and the norms. The first is needed twice."""
    square = _padded(count * min(rows, columns) ** 2)
    return count * _padded(rows * columns), square, square, _padded(count)


def _matrices(memory: Tensor, count: int, rows: int, columns: int) -> Tensor:
    """(count, rows, columns), each matrix at a multiple of 128 bytes."""
    return memory.view(count, _padded(rows * columns))[:, : rows * columns].view(count, rows, columns)


def _batch(group: int, x: Tensor, workspace: Sequence[Tensor]) -> Batch:
    count, rows, columns = x.shape
    spare = _matrices(workspace[0], count, rows, columns)
    m = min(rows, columns)
    gram, poly = (part[: count * m * m].view(count, m, m) for part in workspace[1:3])
    if rows > columns:
        x, spare = x.mT, spare.mT
    return Batch(group, x, spare, gram, poly, workspace[3][:count].view(count, 1, 1))


def _with_ratio(group: GroupOptions, shape: tuple[int, int]) -> dict[str, Any]:
    """A group of pass 3."""
    return {**values(group, AFTER), "ratio": lr_ratio(group.hyper("adjust_lr_fn"), shape)}


class MuonTables:
    """The step with kernels; see the module's text."""

    def __init__(
        self, rules: tuple[Rule, Rule], rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions],
        shared: Shared,
    ) -> None:  # fmt: skip
        self.work = Directions(rules, segments, groups)
        for s, view in zip(self.work.first, self.work.views, strict=True):
            s.residual = view
        self.momentum = _DirectionTables(rules[0], self.work.first, self.work.before.list, shared)
        self.apply = DeviceTables(rules[1], self.work.second, self.work.after.list, shared)
        self.apply.set_gradients([view.data_ptr() for view in self.work.views])
        self.device = self.momentum.device
        skipped = self.momentum.header[table.SKIPPED.value]
        self._after = {on: Conditions((), {table.FOUND_INF.value: skipped} if on else {}) for on in (False, True)}

    def set_hypers(self, indices: Sequence[int]) -> None:
        """Take the current hyper-parameters of some groups."""
        for tables, places in zip((self.momentum, self.apply), self.work.renew(indices), strict=True):
            tables.set_hypers(places)

    def set_gradients(self, addresses: list[int]) -> None:
        """Take this step's gradient addresses."""
        self.momentum.set_gradients(addresses)

    def set_conditions(self, conditions: Conditions) -> None:
        """Take what holds for this step as a whole; pass 3 is skipped when pass 1 was."""
        self.momentum.set_conditions(conditions)
        self.apply.set_conditions(self._after[self.momentum.use.with_norm or self.momentum.use.scaled])

    @property
    def staging(self) -> int:
        """Bytes of pinned memory that uploads of all tables take."""
        return self.momentum.staging + self.apply.staging

    def set_agreed(self, conditions: Conditions) -> None:
        """Take what the groups agree on."""
        self.momentum.set_agreed(conditions)

    def count_steps(self, tally: Tensor) -> None:
        """Keep running counts there."""
        self.momentum.count_steps(tally)

    def report(self) -> Report:
        """What the last step measured."""
        return self.momentum.report()._replace(change=self.apply.report().change)

    @property
    def header(self) -> Tensor:
        """Results of the step."""
        return self.momentum.header

    def totals(self, kind: int) -> Tensor:
        """Sums over the gradients, see `DeviceTables.totals`."""
        return self.momentum.totals(kind)

    def prepare_totals(self, kind: int) -> int:
        """The same for `totals`."""
        return self.momentum.prepare_totals(kind)

    def prepare(self) -> int:
        """Compile what a step would launch; returns how many kernels were not ready."""
        return self.momentum.prepare() + self.apply.prepare()

    def run(self) -> None:
        """The step, on the current stream of the device."""
        self.momentum.run()
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                self.work.orthogonalise()
        else:
            self.work.orthogonalise()
        self.apply.run()


class _DirectionTables(DeviceTables):
    """Tables of pass 1: what would be the new parameter goes to scratch memory."""

    measures = False

    def _update_variant(self, key: tuple[Any, ...]) -> launch.UpdateVariant:
        return replace(super()._update_variant(key), weight=scratch.codec())
