"""Parameters, and on request their gradients, in one buffer per device and dtype, with views in the old places.

    fusedopt.flatten_(model.parameters())

A parameter stays the same object with the same shape and strides, and a step has the segments, the chunks and the
bits that it has for scattered parameters. The memory is in ``buffers.py``, what can move in ``movable.py``.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from . import buffers, layout, movable

has_gradients = False
"""Whether `flatten_(grads=True)` has ever been called: spares everyone else the search for places."""


def flatten_(params: Iterable[Any], grads: bool = False) -> None:
    """Move parameters into one contiguous buffer per device and dtype, in place; all of them, frozen ones too.

    Args:
        params: what torch.optim takes: parameters, (name, parameter) pairs or groups. Parameters that are one
            object, or that share all of their memory, keep sharing it.
        grads: gradients of the parameters that require one get such buffers too, and thus the same addresses in every
            step. ``p.grad = None``, ``zero_grad`` of either kind and accumulation mean what they always mean: the
            first gradient that backward brings is moved to its place, later ones are added there. A gradient that
            user code assigns is used where it is.

    Call it between steps, not between a forward pass and its backward pass. While it runs it needs memory for a
    second copy of the parameters. Tensors that alias a parameter (``p.detach()``, a state dict that was kept) keep
    the old memory, as after ``module.to``.

    The parameters of a buffer share one storage: ``torch.save`` of one of them writes the whole buffer, and
    safetensors refuses them. Save ``{key: value.clone() for key, value in module.state_dict().items()}`` instead.

    Raises:
        ValueError: a parameter cannot move: it is named, with a remedy, and nothing was changed. With ``grads`` also
            if a gradient is part of a larger tensor, such as a bucket of DistributedDataParallel.
        TypeError: something is no tensor.
    """
    global has_gradients
    named = movable.named(params)
    for name, p in named:
        movable.refuse("flatten", name, movable.unmovable(p) or movable.shares_memory(p))
        if grads:
            movable.refuse("flatten", name, movable.gradient_shares_memory(p))
    movable.check_overlaps(named)
    members = [p for _, p in named]
    homes = _new_homes(members) if grads else []
    buffers.move(_new_places(members))
    for p, home in homes:
        has_gradients = True
        old = _home(p)
        if old is not None:
            old.handle.remove()
        home.handle = p.register_post_accumulate_grad_hook(home)
        home(p)


def unflatten_(params: Iterable[Any]) -> None:
    """Give every parameter and its gradient memory of their own; those that have it are left alone.

    Args:
        params: as for `flatten_`. Parameters that share all of their memory keep sharing it.

    Raises:
        ValueError: a parameter is in memory shared between processes: it is named, and nothing was changed.
        TypeError: something is no tensor.
    """
    named = movable.named(params)
    moves: list[tuple[Tensor, Tensor]] = []
    copies: dict[Any, Tensor] = {}
    for name, p in named:
        if movable.unmovable(p) or (movable.is_whole(p) and not buffers.is_placed(p)):
            continue
        movable.refuse("unflatten", name, movable.is_interprocess(p))
        # What shares a dense parameter's memory may have another shape, such as its transpose.
        key = (p.numel(),) if layout.is_dense(p) else (p.shape, p.stride())
        own = copies.setdefault((p.device, p.data_ptr(), p.dtype, *key), p.detach().clone())
        moves.append((p, own.as_strided(p.shape, p.stride()) if layout.is_dense(p) else own))
    buffers.move(moves)
    for _, p in named:
        home = _home(p)
        if home is not None:
            home.handle.remove()
            if p.grad is not None and home.holds(p.grad):
                p.grad = p.grad.clone()


def bases(params: Iterable[Tensor]) -> list[Tensor]:
    """What a step over these parameters writes to: one 1-D tensor for each buffer, and parameters outside of any."""
    found: dict[int, Tensor] = {}
    for p in params:
        if not buffers.is_placed(p):
            found[id(p)] = p
        elif id(p.untyped_storage()) not in found:
            found[id(p.untyped_storage())] = buffers.base(p)
    return list(found.values())


def _new_places(params: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(parameter, its place with its numbers); none for parameters that fill one buffer already."""
    moves: list[tuple[Tensor, Tensor]] = []
    for members in _by_type(params, [p.dtype for p in params]).values():
        if not buffers.fill(members):
            views = buffers.place(members, [p.data_ptr() for p in members], members[0].dtype)
            with torch.no_grad():
                moves += [(p, view.copy_(p)) for p, view in zip(members, views, strict=True)]
    return moves


def _by_type(params: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> dict[Any, list[Tensor]]:
    groups: dict[Any, list[Tensor]] = {}
    for p, dtype in zip(params, dtypes, strict=True):
        groups.setdefault((dtype, p.device), []).append(p)
    return groups


# ------------------------------------------------------------------------------------------------------ gradients
class _Home:
    """The place of one parameter's gradient: a hook that moves a gradient there as soon as it has been computed.

    A parameter has no gradient until then, so that whoever looks at ``p.grad`` (clipping, loss scaling,
    DistributedDataParallel, a user) sees what it would see without us, and no buffer is ever filled in vain.
    """

    handle: RemovableHandle

    def __init__(self, view: Tensor) -> None:
        self.view: Tensor | None = view

    def __call__(self, p: Tensor) -> None:
        view, grad = self.view, p.grad
        if view is None or grad is None or grad.layout != torch.strided or grad.requires_grad or self.holds(grad):
            return
        if self.fits(p, grad.dtype):
            view.copy_(grad)
            p.grad = view.data  # an object of its own, with a version of its own
        else:
            self.view = None  # the parameter was moved or cast since: free the place

    def fits(self, p: Tensor, dtype: torch.dtype) -> bool:
        """Gradients of the parameter in this dtype belong here."""
        v = self.view
        return v is not None and (v.shape, v.stride(), v.device, v.dtype) == (p.shape, p.stride(), p.device, dtype)

    def holds(self, grad: Tensor) -> bool:
        """The gradient is in its place."""
        return self.view is not None and grad.layout == torch.strided and grad.data_ptr() == self.view.data_ptr()


def _home(p: Tensor) -> _Home | None:
    hooks = p._post_accumulate_grad_hooks
    return next((hook for hook in hooks.values() if isinstance(hook, _Home)), None) if hooks else None


def _new_homes(params: Sequence[Tensor]) -> list[tuple[Tensor, _Home]]:
    homes: list[tuple[Tensor, _Home]] = []
    new, dtypes = [], []
    for p in params:
        home, dtype = _home(p), getattr(p, "grad_dtype", None) or p.dtype
        if p.requires_grad and (home is None or not home.fits(p, dtype)):
            new.append(p)
            dtypes.append(dtype)
    for (dtype, _), members in _by_type(new, dtypes).items():
        views = buffers.place(members, list(map(id, members)), dtype)
        homes += [(p, _Home(view)) for p, view in zip(members, views, strict=True)]
    return homes


def zero_grad(params: Sequence[Tensor], set_to_none: bool) -> None:
    """``zero_grad`` of an optimizer over ``params``; zeros are written by one launch per buffer.

    Raises:
        RuntimeError: DistributedDataParallel has taken a gradient into a bucket of its own.
    """
    placed: dict[int, list[Tensor]] = {}
    for p in params:
        home, grad = _home(p), p.grad
        if grad is None:
            continue
        ours = home is not None and home.holds(grad)
        if home is not None and home.view is not None and not ours and not grad.requires_grad:
            taken = movable.gradient_shares_memory(p)
            if taken:
                raise RuntimeError(f"a flattened parameter of shape {tuple(p.shape)} is {taken}")
        if set_to_none:
            p.grad = None
        elif ours:
            placed.setdefault(id(grad.untyped_storage()), []).append(grad)
        else:
            grad.detach_() if grad.grad_fn is not None else grad.requires_grad_(False)
            grad.zero_()
    for grads in placed.values():
        if buffers.fill(grads):
            buffers.base(grads[0]).zero_()
            torch.autograd.graph.increment_version(grads)
        else:
            torch._foreach_zero_(grads)  # pyright: ignore[reportPrivateImportUsage] # as torch's own zero_grad does
