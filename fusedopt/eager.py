"""The whole step in plain PyTorch, composed from the same parts as the kernels.

CPU tensors are a real use (tests, offload), so a segment is walked block by block and its temporaries stay in cache.
A block is so short that torch runs each operation on one thread; blocks, which are independent, are shared out to
threads instead, each with a scratch pool of its own. That needs one hand-over per segment, not one per operation.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from fusedopt_kernels.numerics import compute_type
from fusedopt_kernels.param import split16

from . import layout
from .groups import GroupOptions
from .norm import clip_coefficient, eager_norm
from .plan import Segment
from .rule import Rule
from .tables import transforms
from .values import Pool

BLOCK = 32768
"""Elements per block: torch's grain size for one thread, and a multiple of every state codec's group."""

_threads: ThreadPoolExecutor | None = None


def _helpers(n: int) -> ThreadPoolExecutor:
    """Threads beside the calling one; made anew after a fork, where the parent's do not exist."""
    global _threads, _owner
    if _threads is None or _owner != (os.getpid(), n):
        _threads, _owner = ThreadPoolExecutor(n, thread_name_prefix="fusedopt"), (os.getpid(), n)
    return _threads


_owner = (0, 0)


class EagerStep:
    """Runs the segments of one device with eager twins."""

    def __init__(self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions]) -> None:
        self.rule, self.segments, self.groups = rule, segments, groups
        options = groups[segments[0].group].options
        self.max_norm = float(options.get("max_norm", float("inf")))
        self.skip_nonfinite = bool(options.get("skip_nonfinite", False))
        self.with_norm = "max_norm" in options or "skip_nonfinite" in options
        self._pools: dict[tuple[torch.dtype, torch.device, int], Pool] = {}
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
        try:
            for segment, tensors in zip(self.segments, self._flat, strict=True):
                self._segment(segment, tensors, layout.flat(grads[segment.position]), clip)
        except BaseException:
            self._pools.clear()  # the traceback holds values that would give their buffers back later
            raise

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
        blocks = list(zip(*(t.split(BLOCK) for t in (grad, *tensors)), strict=True))
        if grad.numel() == 0:
            return
        pool = self._pool(compute, segment.weight.device, 0)
        s = (*s, *self._norms(segment, blocks, pool, steps, e, flags, tuple(s)))

        def work(part: Sequence[Any], index: int) -> None:
            pool = self._pool(compute, segment.weight.device, index)
            with torch.no_grad():
                for block in part:
                    self._block(segment, block, pool, steps, e, flags, s)

        n = min(torch.get_num_threads(), len(blocks)) if segment.weight.device.type == "cpu" else 1
        waiting = [_helpers(n - 1).submit(work, blocks[i::n], i) for i in range(1, n)]
        work(blocks[::n], 0)
        for other in waiting:
            other.result()

    def _block(self, segment: Segment, block: Any, pool: Pool, steps: Any, e: Any, flags: int, s: Any) -> None:
        g, p, state = self._inputs(segment, block, pool, steps, e, flags)
        descent, state = self.rule.update_eager(g, p, state, s, self.groups[segment.group].variant)
        if e[2] != 0.0:
            descent = descent + e[2] * p
        for tensor, value in zip(block[2 : 2 + len(segment.slots)], state, strict=True):
            tensor.copy_(value.data)
        if segment.residual is not None:
            split16.split_eager((p - descent).data, block[1], block[-1])
        elif p.borrowed:  # the parameter's own memory, in the compute type
            torch.sub(p.data, descent.data, out=block[1])
        else:
            block[1].copy_((p - descent).data)

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

    def _pool(self, dtype: torch.dtype, device: torch.device, thread: int) -> Pool:
        key = (dtype, device, thread)
        if key not in self._pools:
            self._pools[key] = Pool(dtype, device, BLOCK)
        return self._pools[key]


def _flat_tensors(segment: Segment) -> list[Tensor]:
    """Parameter, state slots and residual of a segment as flat views."""
    tensors = [segment.weight, *segment.slots]
    if segment.residual is not None:
        tensors.append(segment.residual)
    return [layout.flat(t) for t in tensors]
