"""CPU offload of state (option ``offload_state``): state in pinned host memory, streamed through the GPU in every step.

State, its scales and what weight formats keep beside the weight lie in host buffers of about 64 MiB, several parameters
in each. A step copies a buffer to the device, updates its parameters and copies it back, while the next one is already
on its way and the last one still returning: two buffers on the device take turns, and every buffer moves in one copy.
The kernels and their bits are those of a step without it. Step counts, masks and weight averages stay on the device.
"""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import layout
from .groups import GroupOptions
from .numbers import Shared
from .rule import Rule
from .segment import Segment
from .state import MASK, init_state
from .tables import DeviceTables, Launch

if TYPE_CHECKING:
    from .stepper import Stepper

NAME = "offload_state"
CAPACITY = 64 * 2**20
"""Bytes of a host buffer; a parameter whose state is larger has one of its own."""
ALIGNMENT = 256


class Buffer:
    """A host buffer and how much of it is taken."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.host = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self.used = 0


class Place(NamedTuple):
    """Where a parameter's state is. state: its dict, of which ``kept`` is here; segment: what was made of it."""

    buffer: int
    offsets: list[int]
    sizes: list[int]
    state: dict[str, Any]
    kept: dict[str, Tensor]
    segment: Segment
    options: GroupOptions

    def holds(self, state: dict[str, Any], options: GroupOptions) -> bool:
        """Whether nothing has been replaced since."""
        same = state is self.state and all(state.get(key) is value for key, value in self.kept.items())
        return (
            same and (state.get(MASK) is None) == (self.segment.mask is None) and options.same_structure(self.options)
        )


class Offload:
    """The host buffers of one optimizer. They outlast plans: which gradients there are moves no state."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self.places: dict[Tensor, Place] = {}

    def init_state(self, optimizer: "Stepper", segment: Segment, options: GroupOptions) -> None:
        """As `state.init_state`; what it makes is moved here, one parameter at a time."""
        p, known = segment.param, self.places.get(segment.param)
        if options.rule.kernel_part is not None or (p.grad is not None and p.grad.layout != torch.strided):
            what = options.rule.name if options.rule.kernel_part is not None else "sparse gradients"
            raise RuntimeError(f"{NAME}=True does not support {what}: leave it out of this optimizer")
        if known is not None and known.holds(optimizer.state.get(p, {}), options):
            for name in ("slots", "scales", "formats", "residual", "weight_format", "counter", "numbers", "mask"):
                setattr(segment, name, getattr(known.segment, name))
            return
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor):
                optimizer.state[p][key] = value.to(p.device)
        init_state(optimizer, segment, options)
        if p in optimizer.state:
            self.places[p] = self._placed(segment, optimizer.state[p], options)

    def _placed(self, segment: Segment, state: dict[str, Any], options: GroupOptions) -> Place:
        """Move a segment's state to the host; the segment and the state get the tensors there."""
        tensors = _state_of(segment)
        sizes = [t.nbytes for t in tensors]
        known = self.places.get(segment.param)
        if known is not None and known.sizes == sizes:
            number, offsets = known.buffer, known.offsets
        else:
            number, offsets = self._take(sizes, segment.param.device.type == "cuda")
        moved = {}
        for t, offset in zip(tensors, offsets, strict=True):
            moved[id(t)] = _view(self.buffers[number].host, offset, t).as_strided(t.size(), t.stride()).copy_(t)
        kept = {key: moved[id(value)] for key, value in state.items() if id(value) in moved}
        state.update(kept)
        _replace(segment, moved)
        return Place(number, offsets, sizes, state, kept, copy(segment), options)

    def _take(self, sizes: Sequence[int], pinned: bool) -> tuple[int, list[int]]:
        """A buffer with room, and offsets in it."""
        padded = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
        need = sum(padded)
        last = len(self.buffers) - 1
        if last < 0 or self.buffers[last].used + need > self.buffers[last].host.numel():
            self.buffers.append(Buffer(max(CAPACITY, need), pinned))
            last += 1
        buffer = self.buffers[last]
        offsets = [buffer.used + sum(padded[:i]) for i in range(len(padded))]
        buffer.used += need
        return last, offsets


def finish() -> None:
    """Wait until what the last steps copy to the host is there; before the host reads state."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _state_of(s: Segment) -> list[Tensor]:
    return [*s.slots, *(t for t in (*s.scales, s.residual) if t is not None)]


def _replace(s: Segment, by: dict[int, Tensor]) -> None:
    """Put other tensors into a segment, by the identity of those they stand for."""
    s.slots = [by[id(t)] for t in s.slots]
    s.scales = [None if t is None else by[id(t)] for t in s.scales]
    s.residual = None if s.residual is None else by[id(s.residual)]


def _view(buffer: Tensor, offset: int, t: Tensor) -> Tensor:
    """A tensor's bytes in a buffer, as one row of its dtype."""
    return buffer[offset : offset + t.nbytes].view(t.dtype)


class Turn(NamedTuple):
    """One host buffer in a step: the device buffer that it goes through, its bytes, and what is launched then."""

    host: Tensor
    device: Tensor
    launches: list[Launch]


class OffloadTables(DeviceTables):
    """Tables and launches for segments whose state is on the host."""

    def __init__(self, rule: Rule, segments: Sequence[Segment], groups: Sequence[GroupOptions], shared: Shared) -> None:
        assert shared.offload is not None
        self._buffers: list[Buffer] = shared.offload.buffers
        places = [shared.offload.places[s.param] for s in segments]
        self._numbers = [place.buffer for place in places]
        self._order = list(dict.fromkeys(self._numbers))
        size = max(self._buffers[number].used for number in self._order)
        device = segments[0].weight.device
        self._stages = [torch.empty(size, dtype=torch.uint8, device=device) for _ in range(min(2, len(self._order)))]
        self._turns: dict[Any, list[Turn]] = {}
        self._made: list[Turn] = []
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []
        staged = [self._staged(s, place) for s, place in zip(segments, places, strict=True)]
        super().__init__(rule, staged, groups, shared)

    def _stage(self, number: int) -> Tensor:
        """The device buffer that a host buffer goes through."""
        return self._stages[self._order.index(number) % 2]

    def _staged(self, s: Segment, place: Place) -> Segment:
        """The segment with its state where the kernels find it."""
        s, stage = copy(s), self._stage(place.buffer)
        _replace(s, {id(t): _view(stage, o, t) for t, o in zip(_state_of(s), place.offsets, strict=True)})
        return s

    def _update_launches(self) -> list[Launch]:
        by_turn: dict[int, list[Launch]] = {number: [] for number in self._order}
        numbers = iter(self._numbers)
        for (number, key), members in self._by(lambda s: (next(numbers), self._variant(s))).items():
            by_turn[number] += self._variant_launches(key, members)
        used = {number: self._buffers[number].used for number in self._order}
        self._made = [
            Turn(self._buffers[n].host[: used[n]], self._stage(n)[: used[n]], launches)
            for n, launches in by_turn.items()
        ]
        return [launch for turn in self._made for launch in turn.launches]

    def run(self) -> None:
        """Launch the step on the current stream of the device, copies on streams of their own."""
        self.hypers.renew()
        self.conditions.renew()
        launches, key = self.launches, (self.use, self.summed)
        turns = self._turns.setdefault(key, self._made)
        self._start(launches[: len(launches) - sum(len(turn.launches) for turn in turns)])
        if self._streams:
            with torch.cuda.device(self.device):
                self._stream(turns)
            return
        for turn in turns:
            turn.device.copy_(turn.host)
            self._start(turn.launches)
            turn.host.copy_(turn.device)

    def _stream(self, turns: Sequence[Turn]) -> None:
        """Copy in, update, copy out, each on its stream; a device buffer is filled when its last content has left."""
        inward, outward = self._streams
        here = torch.cuda.current_stream(self.device)
        inward.wait_stream(here)  # the last step's copies, which `here` has waited for
        gone: list[Any] = []
        for i, turn in enumerate(turns):
            if i >= len(self._stages):
                inward.wait_event(gone[i - len(self._stages)])
            with torch.cuda.stream(inward):
                turn.device.copy_(turn.host, non_blocking=True)
            here.wait_event(inward.record_event())
            self._start(turn.launches)
            outward.wait_event(here.record_event())
            with torch.cuda.stream(outward):
                turn.host.copy_(turn.device, non_blocking=True)
            gone.append(outward.record_event())
        here.wait_stream(outward)


def checked(chosen: Mapping[str, Any]) -> bool:
    """The option's value.

    Raises:
        ValueError: another value, or with ``release_gradients``.
    """
    value = chosen.get(NAME, False)
    if not isinstance(value, bool):
        raise ValueError(f"{NAME} must be True or False, got {value!r}")
    if value and chosen.get("release_gradients"):
        raise ValueError(f"{NAME}=True streams the state of many parameters at once, release_gradients=True steps them "
                         "one by one: leave one out")  # fmt: skip
    return value


def warn_on_host() -> None:
    """Say that there is nothing to offload."""
    layout.warn_once(NAME, f"{NAME}=True: parameters on the CPU have their state there anyway; the option does nothing")
