"""What each of many ranks holds of a model: the fullest and the emptiest of them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..optimizer import FusedOptimizer
from ..rule import Rule
from .held import Memory, Twins, _class
from .share import Sharding, shares


@dataclass(frozen=True)
class Ranks:
    """whole: of the model on one rank. fullest, emptiest: (rank, what it holds), the first ones with most and least.

    empty: parameters of which the emptiest rank has no element, or which it does not step.
    """

    sharding: Sharding
    whole: Memory
    fullest: tuple[int, Memory]
    emptiest: tuple[int, Memory]
    empty: int

    def as_json(self) -> dict[str, Any]:
        """How it is sharded, and both ranks in bytes."""
        both = {"fullest": self.fullest, "emptiest": self.emptiest}
        return {
            "world": self.sharding.world,
            "shard": self.sharding.name,
            "ranks": {
                name: {"rank": rank, "memory": {**vars(held), "total": held.total}}
                for name, (rank, held) in both.items()
            },
            "empty_on_emptiest": self.empty,
        }


def per_rank(
    params: torch.nn.Module | Iterable[Any],
    optimizer: str | type[FusedOptimizer] | Rule,
    world: int,
    shard: str = "fsdp",
    *,
    grad_dtype: torch.dtype | None = None,
    **options: Any,
) -> Ranks:
    """Count what the ranks hold when ``world`` of them train ``params``, as `estimate` does for one; no process group.

    Args:
        params: the model before it is sharded, as `estimate` takes it.
        world: number of ranks.
        shard: ``"fsdp"``: `fully_shard` over all ranks. ``"hsdp:K"``: over groups of K ranks. ``"ddp"``: nothing is
            sharded. ``"zero1"``: the state alone, whole parameters each (`ZeroRedundancyOptimizer`).

    Raises:
        ValueError: world or shard; what that way of sharding cannot take; and all that `estimate` raises.
    """
    sharding = Sharding.of(world, shard)
    cls, first = _class(optimizer)
    twins = Twins(params)
    return count(twins, cls(twins.groups, *first, **options), sharding, grad_dtype)


def count(twins: Twins, optimizer: FusedOptimizer, sharding: Sharding, grad_dtype: torch.dtype | None = None) -> Ranks:
    """The same of an optimizer over twins.

    Raises:
        ValueError: what this way of sharding cannot take.
    """
    if sharding.cuts_rows:
        _check_rows(twins, optimizer, sharding)
    whole = twins.count(optimizer, grad_dtype)
    ranks = [(rank, share, twins.count(optimizer, grad_dtype, share)) for rank, share in shares(sharding, twins.order)]
    fullest = max(ranks, key=lambda each: each[2].total)
    emptiest = min(ranks, key=lambda each: each[2].total)
    share = emptiest[1]
    without = (p for params in twins.order for p in params if not share.numel(p))
    empty = sum(1 for _ in without) if share.owned is None else whole.tensors - share.owned.total()
    return Ranks(sharding, whole, (fullest[0], fullest[2]), (emptiest[0], emptiest[2]), empty)


def _check_rows(twins: Twins, optimizer: FusedOptimizer, sharding: Sharding) -> None:
    """Refuse what cannot be cut along dim 0."""
    if any(not p.dim() for params in twins.order for p in params):
        raise ValueError(
            f"shard={sharding.name!r}: fully_shard takes no scalar parameters; give them a dimension of size 1, or use "
            "shard='ddp' or 'zero1'"
        )
    if optimizer._norm_at_backward:
        raise ValueError(f"shard={sharding.name!r} makes DTensors, which norm_at_backward does not take; leave it out")
    for group in optimizer.param_groups:
        rule = optimizer.rule_of(group)
        if rule.kernel_part is not None:
            raise ValueError(
                f"shard={sharding.name!r} cuts matrices into rows, and {rule.name} needs whole ones; use shard='ddp' "
                "or 'zero1'"
            )
