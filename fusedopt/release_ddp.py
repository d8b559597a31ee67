"""Gradient release under DistributedDataParallel: parameters are updated in backward when their bucket is reduced.

A communication hook averages each bucket and, when that is done, updates those of its parameters that an optimizer
releases. ``p.grad`` becomes a view of the bucket, into which DDP writes the same numbers when backward ends, so that
buckets are all the memory that gradients take; ``step()`` lets go of the views.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage] # documented there
from torch.nn.parallel import DistributedDataParallel

from . import layout
from .optimizer import FusedOptimizer
from .release import NAME, Release


def release_under_ddp(model: DistributedDataParallel, *optimizers: FusedOptimizer) -> None:
    """Let optimizers with ``release_gradients=True`` update a model's parameters as soon as DDP has reduced them.

    The same bits as DDP with a step after backward. It is called before the first backward pass, takes the place of the
    model's communication hook and averages over the model's process group; called again, it lets these optimizers take
    the place of those before. Parameters of other optimizers have their gradients as always.

    Raises:
        TypeError: model is no DistributedDataParallel. ValueError: no optimizer, or one without ``release_gradients``.
        RuntimeError: the model has another communication hook.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"release_under_ddp: model must be a DistributedDataParallel, got {type(model).__name__}")
    releases = [optimizer._release for optimizer in optimizers if optimizer._release is not None]
    if not optimizers or len(releases) < len(optimizers):
        raise ValueError(f"release_under_ddp: pass the model's optimizers, made with {NAME}=True")
    if model not in _hooked:
        assert model.process_group is not None
        buckets = Buckets(model.process_group)
        model.register_comm_hook(buckets, _average_and_update)
        _hooked[model] = buckets
    _hooked[model].releases = [weakref.ref(release) for release in releases]
    for release in releases:
        release.announce(model.parameters())


class Buckets:
    """State of the hook: over which processes to average, and who updates."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.releases: list[weakref.ref[Release]] = []
        self._streams: dict[torch.device, torch.Stream] = {}

    def due(self, bucket: GradBucket) -> list[tuple[Release, Tensor, Tensor]]:
        """(who updates, parameter, view of the bucket) of each parameter whose gradient was produced here.

        Whether other ranks produced another's is known when backward ends: DDP then sets its ``p.grad``, and `step`
        updates from that, as it does from sparse gradients.
        """
        buffer, params = bucket.buffer(), bucket.parameters()
        releases = [release for reference in self.releases if (release := reference()) is not None]
        waited = [(release, p) for p in params for release in releases if release.expects(p)]
        if buffer.layout != torch.strided:
            for release, p in waited:
                release.postpone(p)
            return []
        views = {p: _view(buffer, p, grad) for p, grad in zip(params, bucket.gradients(), strict=True)}
        return [(release, p, views[p]) for release, p in waited]

    @contextmanager
    def stream(self, device: torch.device) -> Iterator[None]:
        """A stream of our own, between what the current one has to do and what it is given next.

        torch runs continuations on whichever stream is free; state made on one and freed under another would be torn.
        """
        if device.type == "cpu":
            yield
            return
        module = torch.get_device_module(device)
        if device not in self._streams:
            self._streams[device] = module.Stream(device)
        here, own = module.current_stream(device), self._streams[device]
        own.wait_stream(here)
        with module.stream(own):
            yield
        here.wait_stream(own)


_hooked: weakref.WeakKeyDictionary[DistributedDataParallel, Buckets] = weakref.WeakKeyDictionary()
"""torch registers a hook once."""


def _average_and_update(state: Buckets, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook. The continuation runs in a thread of the process group's, or in this one, when the sum is there."""
    buffer, due = bucket.buffer(), state.due(bucket)
    n = state.group.size()
    buffer.mul_(1.0 / n) if buffer.layout == torch.strided else buffer.div_(n)  # as DDP does it: the same bits
    work = dist.all_reduce(buffer, group=state.group, async_op=True)
    assert work is not None  # this rank belongs to the group

    def update(future: torch.futures.Future[list[Tensor]]) -> Tensor:
        result = future.value()[0]
        with state.stream(buffer.device):
            for release, p, grad in due:
                release.arrive(p, grad)
        return result

    return work.get_future().then(update)


def _view(buffer: Tensor, p: Tensor, grad: Tensor) -> Tensor:
    """A gradient in its bucket, where it lies as the parameter does; torch's own view takes that for contiguous."""
    return buffer.as_strided(p.shape, p.stride(), grad.storage_offset()) if layout.is_dense(p) else grad
