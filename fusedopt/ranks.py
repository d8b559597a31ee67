"""Sums over the ranks of a process group: norms of gradients, whether to skip, norms that rules take.

A step needs one all-reduce: every rank adds up the squares of what it alone counts (of replicas one rank counts), and
the sum over all ranks of the mesh, with the flags beside it, is the same everywhere, so that ranks never part. Where
norms of single tensors are wanted, or meshes have different ranks, each tensor's own sum goes over its ranks instead.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fusedopt_kernels import table

from .shards import Ranks, arrived

if TYPE_CHECKING:
    from .groups import GroupOptions
    from .metrics import Metrics
    from .rule import Rule
    from .segment import Segment


class NormGroup:
    """A process group (option ``norm_group``) whose other ranks hold other parameters of one norm."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: Any) -> "NormGroup":
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "an optimizer with norm_group cannot be pickled, because a process group belongs to this run: save its "
            "state_dict() instead"
        )


def checked(group: Any) -> NormGroup | None:
    """The option's value.

    Raises:
        TypeError: neither a process group nor a mesh of one dimension. RuntimeError: torch.distributed is not ready.
    """
    if group is None:
        return None
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("norm_group needs torch.distributed: call torch.distributed.init_process_group() before")
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise TypeError(f"norm_group must be a mesh of one dimension, got one of {group.ndim}: pass mesh['name']")
        group = group.get_group()
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"norm_group must be a process group or a DeviceMesh of one dimension, got {group!r}")
    return NormGroup(group)


class Reach:
    """Which ranks the sums of a plan's segments go over.

    route: process groups that join all ranks of all meshes, one after the other; (): none are needed, or None: meshes
    have different ranks. norm_group: joined after them, for the norm of all.
    """

    def __init__(self, segments: Sequence["Segment"] = (), norm_group: NormGroup | None = None) -> None:
        self.norm_group = norm_group
        meshes = dict.fromkeys(s.mesh[0] for s in segments if s.mesh is not None)
        self.shared_out = any(s.ranks is not None for s in segments)
        self.route = _route(list(meshes)) if self.shared_out else ()
        self._all = [mesh.get_group(dim) for mesh in meshes for dim in range(mesh.ndim)] if self.shared_out else []
        self._first = not any(next(iter(meshes)).get_coordinate()) if meshes else True  # one rank of all

    @property
    def joins(self) -> bool:
        """Whether the norm of all gradients needs other ranks."""
        return self.shared_out or self.norm_group is not None

    def by_tensor(
        self, rule: "Rule", segments: Sequence["Segment"], groups: Sequence["GroupOptions"], metrics: "Metrics"
    ) -> bool:
        """Whether each of some segments needs its own sum over its ranks."""
        if not any(s.ranks is not None for s in segments):
            return False
        alone = rule.grad_norm or metrics.single or any(groups[s.group].clips_alone for s in segments)
        return alone or self.route is None

    def counts(self, segment: "Segment") -> bool:
        """Whether this rank, and no other that has the same numbers, counts a segment in the norm of all."""
        if not self.route:
            return True
        if segment.mesh is None:
            return self._first
        mesh, placements = segment.mesh
        at = mesh.get_coordinate()
        return not any(at[i] for i, place in enumerate(placements) if place.is_replicate())

    def join(self, sums: Tensor, kind: int) -> None:
        """Add up fp64 numbers of at least 0 (of kind inf: take the largest) over the route, in place."""
        for group in self.route or ():
            all_reduce(sums, group, kind)

    def join_flag(self, flag: Tensor) -> None:
        """Whether any rank of a mesh or of ``norm_group`` has it: one fp64 number of at least 0, in place."""
        for group in self._all if self.route is None else self.route:
            all_reduce(flag, group, table.NORM_INF.value)
        self.join_groups(flag, table.NORM_INF.value)

    def join_groups(self, sums: Tensor, kind: int) -> None:
        """The same over ``norm_group``."""
        if self.norm_group is not None:
            all_reduce(sums, self.norm_group.group, kind)


class TensorSums:
    """Sums of single segments over the ranks of each."""

    def __init__(self, segments: Sequence["Segment"], constant: Callable[[np.ndarray], Tensor]) -> None:
        """constant: brings numbers to the device of the sums."""
        sets: dict[tuple[Any, int], list[int]] = {}
        for i, s in enumerate(segments):
            for dim in () if s.ranks is None else s.ranks[1]:
                sets.setdefault((s.ranks[0], dim), []).append(i)  # pyright: ignore[reportOptionalSubscript] # not None here
        self._sets = [
            (mesh.get_group(dim), constant(np.array(members)))
            for (mesh, dim), members in sets.items()
            if mesh.size(dim) > 1
        ]

    def join(self, sums: Tensor, kind: int, more: Tensor | None = None) -> None:
        """Add up fp64 numbers of at least 0, a row per segment (of kind inf: take the largest), in place.

        more: one number that goes with every collective; what it becomes says only whether a rank had any above 0.
        """
        for group, members in self._sets:
            own = sums.index_select(0, members)
            together = own.reshape(-1) if more is None else torch.cat([own.reshape(-1), more])
            all_reduce(together, group, kind)
            sums.index_copy_(0, members, together[: own.numel()].view_as(own))
            if more is not None:
                more.copy_(together[-1:])


def _route(meshes: Sequence[Any]) -> tuple[Any, ...] | None:
    """Process groups that join all ranks of the meshes, if all have the same."""
    import torch.distributed as dist

    if len({tuple(sorted(mesh.mesh.flatten().tolist())) for mesh in meshes}) > 1:
        return None
    one = next((mesh for mesh in meshes if mesh.ndim == 1), meshes[0])
    if one.ndim > 1 and one.size() == dist.get_world_size() and dist.group.WORLD is not None:
        return (dist.group.WORLD,)
    return tuple(one.get_group(dim) for dim in range(one.ndim) if one.size(dim) > 1)


def all_reduce(sums: Tensor, group: Any, kind: int) -> None:
    """fp64 numbers of at least 0 added up (of kind inf: the largest) over a process group, in place."""
    import torch.distributed as dist

    place = _reachable(sums.device, group)
    t = sums.to(place)
    if kind != table.NORM_INF.value:
        dist.all_reduce(t, group=group)
    else:
        # as integers, numbers of at least 0 keep their order and NaN is above all; libraries lose NaN in a maximum
        bits = t.abs().view(torch.int64)
        dist.all_reduce(bits, dist.ReduceOp.MAX, group=group)
        t = bits.view(torch.float64)
    if t is not sums:
        sums.copy_(t)


def _reachable(device: torch.device, group: Any) -> torch.device:
    """The device, or another whose tensors the group's backend takes (offloaded parameters under NCCL)."""
    import torch.distributed as dist

    able = [pair.partition(":")[0] for pair in str(dist.get_backend_config(group)).split(",")]
    if device.type in able:
        return device
    return torch.device(able[0], torch.cuda.current_device()) if able[0] == "cuda" else torch.device(able[0])


def over_ranks(totals: Sequence[Tensor], ranks: Sequence[Ranks], kind: int) -> list[Tensor]:
    """Each 0-dim fp64 total added up (of kind inf: the largest) over its ranks: a collective per mesh and dim.

    For functions that a compiler may trace.
    """
    out = list(totals)
    axes = dict.fromkeys(
        (r[0], dim, total.device) for total, r in zip(totals, ranks, strict=True) if r is not None for dim in r[1]
    )
    for mesh, dim, device in axes:
        which = [
            i for i, r in enumerate(ranks)
            if r is not None and r[0] == mesh and dim in r[1] and totals[i].device == device
        ]  # fmt: skip
        together = _over_axis(torch.stack([out[i] for i in which]), mesh, dim, kind)
        for place, total in zip(which, together.unbind(), strict=True):
            out[place] = total
    return out


def _over_axis(totals: Tensor, mesh: Any, dim: int, kind: int) -> Tensor:
    from torch.distributed import _functional_collectives as functional

    if kind != table.NORM_INF.value:
        return arrived(functional.all_reduce(totals, "sum", (mesh, dim)))
    bits = totals.abs().view(torch.int64)  # see `all_reduce`
    return arrived(functional.all_reduce(bits, "max", (mesh, dim))).view(torch.float64)
