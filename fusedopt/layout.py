"""How a tensor lies in memory, and what to do when a parameter or gradient does not lie as the kernels walk.

Kernels and twins walk a segment in memory order, so parameter, gradient and state must be dense and share strides.
A gradient of another layout is copied into the parameter's; a parameter with gaps is packed before the step and
unpacked after it. Both buffers are cached and both are announced once.
"""

import warnings

import torch

_announced: set[str] = set()


def warn_once(kind: str, message: str) -> None:
    """Warn the first time something slower than usual is done."""
    if kind not in _announced:
        _announced.add(kind)
        warnings.warn(message, stacklevel=2)


def is_dense(t: torch.Tensor) -> bool:
    """Every address between the first and the last element belongs to exactly one element."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(t.stride(), t.shape, strict=True) if sz != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shapes and equal strides wherever a stride matters."""
    if a.shape != b.shape:
        return False
    if a.stride() == b.stride() or a.numel() == 0:
        return True
    return all(
        n == 1 or sa == sb for n, sa, sb in zip(a.shape, a.stride(), b.stride(), strict=True)
    )  # fmt: skip


def overlaps_itself(t: torch.Tensor) -> bool:
    """Some elements share an address (an expanded tensor), so it cannot be updated in place."""
    return any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True))


def flat(t: torch.Tensor) -> torch.Tensor:
    """The stored real numbers of a dense tensor, in memory order, as a 1-D view."""
    t = t.detach()
    if t.is_complex():
        t = torch.view_as_real(t)
    return t.as_strided((t.numel(),), (1,))


def needs_resolving(t: torch.Tensor) -> bool:
    """Memory holds the conjugate or the negative of the values."""
    return t.is_conj() or t.is_neg()
