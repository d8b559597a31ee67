"""Streams of random numbers: which of them rounds what.

A parameter's stream id is a 64-bit hash of its name where the optimizer was given names, else its ordinal by first
use; ids are kept, with the seed, in ``group["fusedopt"]``, so that the same numbers are drawn under any grouping that
keeps names or order, on any sharding, in a replay and after a resume. What is drawn: `fusedopt_kernels.numerics`.
"""

import hashlib
from itertools import count
from typing import TYPE_CHECKING, Any

from fusedopt_kernels.rng import stream_key

from .formats import is_random
from .options import KEY

if TYPE_CHECKING:
    from .stepper import Stepper

STREAMS = "streams"
"""Key, beside the options, of the list of stream ids, in the order of a group's parameters."""


def assign(optimizer: "Stepper") -> None:
    """Give every parameter of groups that round stochastically a stream, unless it has one."""
    groups = optimizer.param_groups
    if not any(is_random(group[KEY]) for group in groups if KEY in group):
        return
    known = [_known(group) for group in groups]
    taken = {stream for streams in known for stream in streams}
    position = 0
    for group, streams in zip(groups, known, strict=True):
        first, position = position, position + len(group["params"])
        if KEY not in group or not is_random(group[KEY]) or len(streams) == len(group["params"]):
            continue
        made = list(streams)
        names = group.get("param_names")
        for i in range(len(streams), len(group["params"])):
            stream = of_name(names[i]) if names else _free(first + i, taken)
            taken.add(stream)
            made.append(stream)
        # the seed in words too: torch.distributed.checkpoint reads what the live group has
        group[KEY] = {"seed": 0, **group[KEY], STREAMS: made}


def _known(group: dict[str, Any]) -> list[int]:
    """Streams of a group's first parameters, as far as it has any."""
    return list(group.get(KEY, {}).get(STREAMS, ()))[: len(group["params"])]


def of_name(name: str) -> int:
    """The stream of a parameter with a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _free(ordinal: int, taken: set[int]) -> int:
    """The ordinal, or, if a parameter that is not there any more had it, the next free one."""
    return next(n for n in count(ordinal) if n not in taken)


def key_of(options: dict[str, Any], index: int, purpose: str) -> int:
    """Key of the stream that rounds something of a group's parameter number ``index``."""
    return stream_key(options.get("seed", 0), options[STREAMS][index], purpose)
