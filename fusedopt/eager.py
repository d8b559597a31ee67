"""The whole step in plain PyTorch, composed from the same parts as the kernels.

CPU tensors are a real use (tests, offload), so a segment is walked block by block and its temporaries stay in cache:
a block of 65,536 fp32 numbers is 256 KiB, of which two cores take half each.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fusedopt_kernels.numerics import compute_type
from fusedopt_kernels.param import split16

from . import layout
from .norm import clip_coefficient, eager_norm
from .plan import GroupOptions, Segment
from .rule import Rule
from .tables import transforms
from .values import Pool, Values

BLOCK = 65536
"""Elements per block; a multiple of every state codec's group."""


class EagerStep:
    """Runs the segments of one device with eager twins."""

    def __init__(self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions]) -> None:
        self.rule, self.segments, self.groups = rule, segments, groups
        options = groups[segments[0].group].options
        self.max_norm = float(options.get("max_norm", float("inf")))
        self.skip_nonfinite = bool(options.get("skip_nonfinite", False))
        self.with_norm = "max_norm" in options or "skip_nonfinite" in options
        self._pools: dict[tuple[torch.dtype, torch.device], Pool] = {}
        self._flat = [_flat_tensors(s) for s in segments]
        self._scalars: dict[tuple[int, float], tuple[tuple[float, ...], tuple[float, ...]]] = {}

    def set_hypers(self, indices: Sequence[int]) -> None:
        """Hyper-parameters are read when scalars are computed; nothing to upload."""

    def run(self, grads: list[Tensor]) -> None:
        """One step over all segments; ``grads`` are those of the whole plan, by segment position."""
        clip = 1.0
        if self.with_norm:
            norm, finite = eager_norm([grads[s.position] for s in self.segments])
            if not finite and self.skip_nonfinite:
                return
            clip = clip_coefficient(norm, self.max_norm)
        self._scalars.clear()
        for segment, tensors in zip(self.segments, self._flat, strict=True):
            self._segment(segment, tensors, layout.flat(grads[segment.position]), clip)

    def _scalars_of(self, segment: Segment) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """((l2, decay), rule scalars) of a segment, after counting this step."""
        t = 1.0
        if segment.counter is not None:
            t = float(segment.counter) + 1.0
            segment.counter.fill_(t)
        key = (segment.group, t)
        known = self._scalars.get(key)
        if known is None:
            group = self.groups[segment.group]
            hyper = tuple(float(h) for h in group.hypers)
            own = self.rule.decay == "own"
            decay = (
                0.0 if group.decoupled or own else hyper[1],
                hyper[0] * hyper[1] if group.decoupled else 0.0,
            )
            known = self._scalars[key] = (decay, self.rule.scalars_eager(hyper, t))
        return known

    def _segment(self, segment: Segment, tensors: list[Tensor], grad: Tensor, clip: float) -> None:
        rule, group = self.rule, self.groups[segment.group]
        (l2, decay), s = self._scalars_of(segment)
        compute = compute_type(segment.weight.dtype)
        if compute == torch.float32:
            l2, decay, clip, *s = torch.tensor([l2, decay, clip, *s], dtype=torch.float64).float().tolist()
        e = (clip, l2, decay)
        flags = int(group.maximize) << 1
        steps = [t.apply_eager for t in transforms(self.with_norm, group.decoupled, rule.decay == "own")]
        pool = self._pool(compute, segment.weight.device)
        blocks = list(zip(*(t.split(BLOCK) for t in (grad, *tensors)), strict=True))
        if grad.numel() == 0:
            return
        s = (*s, *self._norms(segment, blocks, pool, steps, e, flags, tuple(s)))
        for block in blocks:
            g, p, state = self._inputs(segment, block, pool, steps, e, flags)
            descent, state = rule.update_eager(g, p, state, s, group.variant)
            if decay != 0.0:
                descent = descent + decay * p
            _store(segment, block, p - descent, state)
            del g, p, state, descent

    def _norms(self, segment: Segment, blocks: Any, pool: Pool, steps: Any, e: Any, flags: int, s: Any) -> Any:
        """First pass of a two-pass rule: L2 norms over the whole segment, summed in fp64."""
        rule = self.rule
        if not rule.n_norms:
            return ()
        assert rule.measure_eager is not None
        sums = [0.0] * rule.n_norms
        for block in blocks:
            g, p, state = self._inputs(segment, block, pool, steps, e, flags)
            values = rule.measure_eager(g, p, state, s, self.groups[segment.group].variant)
            for i, x in enumerate(values):
                sums[i] += float(x.data.double().square().sum())
            del g, p, state, values, x
        norms = torch.tensor(sums, dtype=torch.float64).sqrt()
        return tuple(norms.to(pool.dtype).tolist())

    def _inputs(self, segment: Segment, block: Any, pool: Pool, steps: Any, e: Any, flags: int) -> Any:
        """Transformed gradient, parameter and state values of one block."""
        pool.set_length(block[0].numel())
        g = pool.load(block[0])
        if segment.residual is None:
            p = pool.load(block[1])
        else:
            p = pool.load(split16.join_eager(block[1], block[-1]))
        state = tuple(pool.load(t) for t in block[2 : 2 + len(segment.slots)])
        for apply in steps:
            g = apply(g, p, flags, e)
        return g, p, state

    def _pool(self, dtype: torch.dtype, device: torch.device) -> Pool:
        key = (dtype, device)
        if key not in self._pools:
            self._pools[key] = Pool(dtype, device, BLOCK)
        return self._pools[key]


def _flat_tensors(segment: Segment) -> list[Tensor]:
    """Parameter, state slots and residual of a segment as flat views."""
    tensors = [segment.weight, *segment.slots]
    if segment.residual is not None:
        tensors.append(segment.residual)
    return [layout.flat(t) for t in tensors]


def _store(segment: Segment, block: Any, p: Values, state: Any) -> None:
    for tensor, value in zip(block[2 : 2 + len(segment.slots)], state, strict=True):
        tensor.copy_(value.data)
    if segment.residual is None:
        block[1].copy_(p.data)
    else:
        split16.split_eager(p.data, block[1], block[-1])
