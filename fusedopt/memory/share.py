"""How a model is spread over ranks, and what one of them has of it: arithmetic alone, no process group."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import NamedTuple

from torch import Tensor

KINDS = "fsdp, hsdp:K, ddp or zero1"


@dataclass(frozen=True)
class Sharding:
    """name: ``"fsdp"``, ``"hsdp:8"``, ``"ddp"`` or ``"zero1"``. world: ranks. over: those that rows are shared out to.

    fsdp: `fully_shard` over all ranks. hsdp:K: over groups of K ranks, each group with the whole model. ddp: nothing is
    sharded. zero1: `ZeroRedundancyOptimizer`, whose ranks step whole parameters, each its own.
    """

    name: str
    world: int
    over: int

    @classmethod
    def of(cls, world: int, name: str = "fsdp") -> "Sharding":
        """From what a user names.

        Raises:
            ValueError: names the argument and what may stand there.
        """
        if isinstance(world, bool) or not isinstance(world, int) or world < 1:
            raise ValueError(f"world must be a number of ranks, 1 or more, got {world!r}")
        kind, colon, count = name.partition(":")
        if kind not in ("fsdp", "hsdp", "ddp", "zero1") or bool(colon) != (kind == "hsdp"):
            raise ValueError(f"shard must be {KINDS} (K: ranks that share one copy of the model), got {name!r}")
        if kind != "hsdp":
            return cls(name, world, world if kind == "fsdp" else 1)
        if not (count.isascii() and count.isdigit()) or not int(count) or world % int(count):
            raise ValueError(f"shard='hsdp:K' takes a K that divides world={world}, got {name!r}")
        return cls(name, world, int(count))

    @property
    def cuts_rows(self) -> bool:
        """Whether it is `fully_shard`'s."""
        return self.name.startswith(("fsdp", "hsdp"))


class Share(NamedTuple):
    """What is a rank's: of ``over`` ranks that rows are shared out to, the one of this number. owned: copies of each
    parameter whose state it keeps, None for all.
    """

    rank: int = 0
    over: int = 1
    owned: Counter[Tensor] | None = None

    def rows(self, count: int) -> int:
        """Of so many, cut as `torch.chunk` does: the last ranks may have fewer or none."""
        each = -(-count // self.over)
        return min(max(count - self.rank * each, 0), each)

    def numel(self, t: Tensor) -> int:
        """Elements of a tensor whose first dim is shared out; a number alone is everybody's."""
        return t.numel() // max(t.shape[0], 1) * self.rows(t.shape[0]) if t.dim() else t.numel()

    def fullest(self) -> "Share":
        """The first rank's, which no other's exceeds."""
        return self._replace(rank=0)


WHOLE = Share()
"""Everything."""


def owners(groups: Iterable[Sequence[Tensor]], world: int) -> list[Counter[Tensor]]:
    """What each rank of a `ZeroRedundancyOptimizer` steps: group by group the largest parameters first, each to the
    rank that has the fewest elements.
    """
    found: list[Counter[Tensor]] = [Counter() for _ in range(world)]
    least = [(0, rank) for rank in range(world)]
    heapify(least)
    for params in groups:
        for p in sorted(params, key=lambda p: p.numel(), reverse=True):
            size, rank = least[0]
            found[rank][p] += 1
            heapreplace(least, (size + p.numel(), rank))
    return found


def shares(sharding: Sharding, groups: Iterable[Sequence[Tensor]]) -> Iterator[tuple[int, Share]]:
    """(rank, what it has) of ranks among which are those with the most and the least."""
    if sharding.name != "zero1":
        yield 0, Share(0, sharding.over)
        if sharding.over > 1:
            yield sharding.over - 1, Share(sharding.over - 1, sharding.over)
        return
    seen: set[frozenset[tuple[Tensor, int]]] = set()
    for rank, owned in enumerate(owners(groups, sharding.world)):
        if (key := frozenset(owned.items())) not in seen:  # most have what some other has
            seen.add(key)
            yield rank, Share(owned=owned)
