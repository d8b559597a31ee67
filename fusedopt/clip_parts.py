"""Gradients of one device under `clip_grad_norm_`: their norm, and the product in place; here without kernels."""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels.numerics import REAL_TYPE

from . import layout
from .blocks import Workers
from .guard import guard_of
from .norm import eager_sums, norm_of


def coefficient(norm: Tensor, max_norm: float) -> Tensor:
    """What gradients are multiplied with, as `torch.nn.utils.clip_grad_norm_` computes it in the norm's dtype."""
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def numbers(t: Tensor) -> int:
    """Stored real numbers; a complex element counts two."""
    return t.numel() * (2 if t.is_complex() else 1)


def is_wide(tensors: Iterable[Tensor]) -> bool:
    """Whether one is fp64 or complex128; their norm then is fp64."""
    return any(REAL_TYPE.get(t.dtype, t.dtype) == torch.float64 for t in tensors)


class Part:
    """Gradients of one device. Methods take tensors that `fits` has found to look like those it was made from.

    wide: one is fp64. special: they hold complex numbers, or elements that share memory. relaid: places of those whose
    memory cannot be walked.
    """

    def __init__(self, grads: Sequence[Tensor]) -> None:
        self.device, self.n = grads[0].device, len(grads)
        self.guard = guard_of(grads)
        self.wide = is_wide(grads)
        self.special = any(g.is_complex() or layout.overlaps_itself(g) for g in grads)
        self.relaid = [i for i, g in enumerate(grads) if not layout.is_dense(g) or layout.needs_resolving(g)]

    def fits(self, grads: Sequence[Tensor]) -> bool:
        """Whether type, dtype, device, shape, strides and lazy bits of every tensor are the same."""
        return len(grads) == self.n and self.guard.check(*grads)

    def norm(self, grads: Sequence[Tensor], kind: int, wide: bool) -> Tensor:
        """Norm of all gradients, 0-dim, fp32 or, ``wide``, fp64."""
        raise NotImplementedError

    def sums(self, grads: Sequence[Tensor], sizes: tuple[int, ...], kind: int) -> Tensor:
        """Sum (of squares, or the largest magnitude) of the first sizes[0] gradients, of the next sizes[1], …; fp64."""
        raise NotImplementedError

    def multiply(self, grads: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
        """Every gradient that can be walked times its coefficient, in place."""
        raise NotImplementedError

    def scale(self, grads: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
        """Every gradient times its coefficient, in place, seen by autograd; one listed twice is multiplied twice."""
        self.multiply(grads, norm, max_norm)
        for g in map(grads.__getitem__, self.relaid):
            x = g.float() if g.dtype in (torch.float16, torch.bfloat16) else g
            g.copy_(x * coefficient(norm, max_norm))
        torch.autograd.graph.increment_version(grads)

    def walkable(self, grads: Sequence[Tensor]) -> Sequence[Tensor]:
        """The gradients, with copies of those whose memory cannot be walked."""
        if not self.relaid:
            return grads
        layout.warn_once(
            "clip relaid",
            "a gradient with gaps between its elements, or lazily conjugated, is copied to find its norm; make it "
            "contiguous to save the copy",
        )
        grads = list(grads)
        for i in self.relaid:
            grads[i] = grads[i].resolve_conj().resolve_neg().contiguous()
        return grads


class EagerPart(Part):
    """Sums in fp64 on the host, products by torch."""

    def __init__(self, grads: Sequence[Tensor]) -> None:
        super().__init__(grads)
        self.workers = Workers(max(1, *map(numbers, grads)), self.device)

    def norm(self, grads: Sequence[Tensor], kind: int, wide: bool) -> Tensor:
        with np.errstate(all="ignore"):
            norm = norm_of(eager_sums(self.walkable(grads), self.workers, kind).total, wide, kind)
        return torch.tensor(norm, dtype=torch.float64 if wide else torch.float32, device=self.device)

    def sums(self, grads: Sequence[Tensor], sizes: tuple[int, ...], kind: int) -> Tensor:
        rest = iter(self.walkable(grads))
        sets = [list(islice(rest, size)) for size in sizes]
        with np.errstate(all="ignore"):
            totals = [eager_sums(members, self.workers, kind).total for members in sets]
        return torch.tensor(totals, dtype=torch.float64, device=self.device)

    def multiply(self, grads: Sequence[Tensor], norm: Tensor, max_norm: float) -> None:
        c = coefficient(norm, max_norm)
        if self.device.type == "cpu" and c == 1.0:
            return
        left_out = set(self.relaid)
        for i, g in enumerate(grads):
            if i not in left_out:
                layout.flat(g).mul_(c)
