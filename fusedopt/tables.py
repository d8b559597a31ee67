"""The Triton side of a plan: chunk maps, kernel variants and launches of one device.

A step is one norm kernel per gradient dtype when a norm is wanted, one scalars kernel, one update kernel per variant
(two for two-pass rules). Segments are launched last chunk first, so that the update starts with what the norm pass
read last, which is still in L2.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import launch, table
from fusedopt_kernels.grad import coefficient, l1, l2, limit, maximize
from fusedopt_kernels.numerics import compute_type
from fusedopt_kernels.param import plain
from fusedopt_kernels.param.format import WeightFormat
from fusedopt_kernels.state import wide

from .groups import GroupOptions
from .numbers import Shared
from .rows import Rows, is_ragged, programs
from .rule import Rule
from .segment import Segment

Launch = tuple[launch.KernelSpec, int, tuple[Tensor, ...]]
"""(spec, grid, pointer arguments)."""

_grad_dtype = attrgetter("grad_dtype")


def weight_codec(form: WeightFormat | None, dtype: torch.dtype, random: bool = False) -> tuple[Any, ...]:
    """Device codec of weights of a dtype; None: plain ones."""
    return plain.codec(dtype) if form is None else form.codec(dtype, random)


def transforms(group: GroupOptions, scaled: bool) -> tuple[Any, ...]:
    """Gradient transforms of a group, in the order of a step; scaled: gradients have a coefficient."""
    chosen = (
        (coefficient, scaled),
        (limit, group.clips_value),
        (maximize, True),
        (l2, not (group.decoupled or group.rule.decay == "own")),
        (l1, group.l1),
    )
    return tuple(transform for transform, on in chosen if on)


class DeviceTables(Rows):
    """Tables and launches for the segments of one rule that live on one device.

    summed: this step's norm pass has been made already, see ``source.py``.
    """

    summed = False

    def __init__(self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], shared: Shared) -> None:
        self._by_use: dict[tuple[launch.NormUse, bool], list[Launch]] = {}
        self._totals: dict[tuple[int, bool], list[Launch]] = {}
        super().__init__(rule, segments, groups, shared)

    @property
    def launches(self) -> list[Launch]:
        """Every launch of a step under the present conditions, in order."""
        key = self.use, self.summed
        if key not in self._by_use:
            mode, kind = self.use.mode, self.use.kind
            before = self._norm_launches(kind, mode != table.OWN_NORM.value) if self._sums_partials else []
            self._by_use[key] = [*before, self._scalars_launch(), *self._update_launches()]
        return self._by_use[key]

    @property
    def _sums_partials(self) -> bool:
        """Whether the norm pass belongs to `run`; for a norm over several tables it goes ahead (`totals`)."""
        given = self.use.mode == table.GIVEN_NORM.value and self.use.own
        return given or self.use.mode == table.OWN_NORM.value

    def _norm_launches(self, kind: int, with_totals: bool) -> list[Launch]:
        out: list[Launch] = []
        for dtype, members in ({} if self.summed else self._by(_grad_dtype)).items():
            chunks = self._chunk_map(members, table.NORM_COUNT.value)
            if len(chunks):
                args = (self.rows.tensor, self.grads.tensor, chunks, self.partials)
                out.append((launch.norm_spec(dtype, kind), len(chunks), args))
        if with_totals:
            args = (self.rows.tensor, self.scalars, self.partials, self.header, self.counts)
            out.append((launch.totals_spec(kind), 1, args))
        return out

    def _scalars_launch(self) -> Launch:
        rule, n = self.rule, len(self.segments)
        counts = len(rule.hyper), rule.n_scalars, len(rule.scalar_slots)
        averaged = any(s.ema is not None for s in self.segments)
        spec = launch.scalars_spec(f"{rule.name}_scalars", rule.scalars, counts, self.use, averaged)
        numbers = [x.tensor for t in (self.hypers, self.conditions) for x in (t.values, t.addresses)]
        args = (self.rows.tensor, *numbers, self.scalars, self.partials, self.header, self.counts)
        return spec, 1 if self.use.with_norm else -(-n // launch.SCALARS_BLOCK), args

    def totals(self, kind: int) -> Tensor:
        """Launch the norm pass alone: (sum of squares or as ``kind`` says, whether an element is not finite)."""
        self._start(self._totals_launches(kind))
        return self.header[table.OWN_SQUARE.value : table.OWN_BAD.value + 1]

    def _totals_launches(self, kind: int) -> list[Launch]:
        key = kind, self.summed
        if key not in self._totals:
            self._totals[key] = self._norm_launches(kind, True)
        return self._totals[key]

    def _update_launches(self) -> list[Launch]:
        """What follows the scalars launch."""
        out: list[Launch] = []
        for key, members in self._by(self._variant).items():
            out.extend(self._variant_launches(key, members))
        return out

    def _variant_launches(self, key: tuple[Any, ...], members: Sequence[int]) -> list[Launch]:
        """The update of some segments of one variant."""
        specs = self._update_specs(key)
        pairs = self._pairs(members, table.MEASURE_COUNT.value)[::-1]
        most = [launch.persistent(spec, self.device) for spec in specs]
        chunks = self._constant(np.pad(pairs, ((0, max(most)), (0, 0)), constant_values=-1))  # where such programs end
        args = (self.rows.tensor, self.grads.tensor, chunks, self.scalars, self.partials)
        grids = [min(len(pairs), n or len(pairs)) for n in most]
        return [(spec, grid, args) for spec, grid in zip(specs, grids, strict=True)] if len(pairs) else []

    def _by(self, key: Callable[[Segment], Any]) -> dict[Any, list[int]]:
        found: dict[Any, list[int]] = {}
        for index, segment in enumerate(self.segments):
            found.setdefault(key(segment), []).append(index)
        return found

    def _variant(self, s: Segment) -> tuple[Any, ...]:
        """Everything that selects a compiled variant."""
        group = self.groups[s.group]
        return (
            group.variant,
            s.weight.dtype,
            s.grad_dtype,
            tuple(
                (t.dtype, form, key is not None)
                for t, form, key in zip_longest(s.slots, s.formats, s.keys[1 : 1 + len(s.slots)])
            ),
            (s.weight_format, s.keys[:1] not in ((), (None,))),
            (is_ragged(s), self._by_eight(s)),
            tuple(t.apply for t in transforms(group, self.use.with_norm or self.use.scaled)),
            (group.cautious, group.cautious_decay, s.mask is not None, s.ema is not None, self.change is not None),
        )

    def _by_eight(self, s: Segment) -> bool:
        """Whether one draw of random bits serves eight neighbours; the same for all where nothing is drawn."""
        if is_ragged(s):
            return False
        drawn = any(key is not None for key in s.keys) or any(form is not None and form.dithered for form in s.formats)
        return s.span is None or not drawn or (s.span.length == s.span.stride and s.span.offset % 8 == 0)

    def _update_specs(self, key: tuple[Any, ...]) -> list[launch.KernelSpec]:
        """The update kernel of a variant, after the measuring pass if its step needs one."""
        rule, variant = self.rule, self._update_variant(key)
        update = launch.update_spec(rule.name, rule.update, variant)
        if not (rule.n_norms or variant.switches[0]):
            return [update]
        measure = rule.measure if rule.n_norms else rule.update
        return [launch.update_spec(f"{rule.name}_measure", measure, variant, "measure"), update]

    def _update_variant(self, key: tuple[Any, ...]) -> launch.UpdateVariant:
        rule, (structure, dtype, grad, slots, (weights, random), (ragged, by_eight), applied, switches) = self.rule, key
        return launch.UpdateVariant(
            structure=structure,
            weight=weight_codec(weights, dtype, random),
            states=tuple(wide.codec(kept, noisy) if form is None else form.codec(noisy) for kept, form, noisy in slots),
            transforms=applied,
            grad=grad,
            compute=compute_type(dtype),
            n_scalars=rule.n_scalars,
            n_norms=rule.n_norms,
            exact=all(form is None for _, form, _ in slots),
            rowwise=ragged,
            by_eight=by_eight,
            switches=switches,
        )

    def _chunk_map(self, members: Sequence[int], counts: int) -> Tensor:
        """`_pairs` on the device, kept as long as the plan."""
        return self._constant(self._pairs(members, counts))

    def _pairs(self, members: Sequence[int], counts: int) -> np.ndarray:
        """(segment, chunk) of every program, int32, for the segments of one launch; counts: column of their chunks."""
        return programs(members, self.rows.array[np.array(members), counts])

    def prepare(self) -> int:
        """Compile what a step would launch; returns how many kernels were not ready."""
        return self._prepare(self.launches)

    def prepare_totals(self, kind: int) -> int:
        """The same for `totals`."""
        return self._prepare(self._totals_launches(kind))

    def _prepare(self, launches: Sequence[Launch]) -> int:
        with torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext():
            return sum(self.launcher.prepare(spec, args) for spec, _, args in launches)

    def run(self) -> None:
        """Launch the step on the current stream of the device."""
        self.hypers.renew()
        self.conditions.renew()
        self._start(self.launches)

    def _start(self, launches: Sequence[Launch]) -> None:
        run = self.launcher.run
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                for spec, grid, args in launches:
                    run(spec, grid, args)
        else:
            for spec, grid, args in launches:
                run(spec, grid, args)
