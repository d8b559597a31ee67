"""The values that low-precision weights hold, whatever their format: read, written, and kept from going stale.

An fp32 master is all that its format reads, so what something else writes to the parameter (``load_state_dict`` of the
model, an initialiser, tied weights) would be undone by the next step. `Watch` sees it by the parameter's version
counter and renews the master where it does not round to the parameter; elsewhere the master stays bit for bit.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fusedopt_kernels.param.master import MASTER

from . import shards
from .average import EMA, refuse_swapped
from .formats import LOW, weight_format
from .options import KEY
from .state import BESIDE, MASK, fit, fold_residual, held_format
from .upload import capturing

if TYPE_CHECKING:
    from .segment import Segment
    from .stateful import Stateful
    from .stepper import Stepper

Key = str | int
"""Name of a parameter, or its number where the optimizer was given no names."""


def _version(pair: tuple[Tensor, Tensor]) -> int:
    """Grows with every write to a parameter: what is written to a DTensor may raise its version or its local one's."""
    return pair[0]._version + pair[1]._version


class Watch:
    """The fp32 masters among a plan's segments, and the versions that their parameters had after the last step."""

    def __init__(self, optimizer: "Stepper", segments: Iterable["Segment"]) -> None:
        kept = [(s, s.residual) for s in segments if s.weight_format is MASTER and s.residual is not None]
        self._pairs = [(s.local, master) for s, master in kept]
        self._params = [(s.local, s.param) for s, _ in kept]
        self._versions = [-1] * len(self._pairs)
        if not capturing() and not optimizer._swapped:
            self.renew()

    def renew(self) -> None:
        """Take over what something else wrote to a parameter since."""
        if not self._params:
            return
        versions = list(map(_version, self._params))
        for (p, master), version, known in zip(self._pairs, versions, self._versions, strict=True):
            if version != known:
                master.copy_(current(p, master))  # in place: captured steps read it there
        self._versions = versions

    def see(self) -> None:
        """After a step of our own."""
        if self._params:
            self._versions = list(map(_version, self._params))


def current(p: Tensor, master: Tensor) -> Tensor:
    """The master where it rounds to the parameter, else the parameter; fp32."""
    p = p.detach()
    return torch.where(master.to(p.dtype) == p, master, p.to(torch.float32))


def held(p: Tensor, state: shards.State) -> Tensor:
    """A new tensor of the values that a parameter holds: fp32 for bf16 and fp16, else of its dtype."""
    if shards.is_dtensor(p):
        return shards.spread(held(shards.here(p), shards.local_state(state, p)), p)
    if p.dtype not in LOW:
        fold_residual(p, state)
        return p.detach().clone()
    form = held_format(p, state)
    if form is None or form.key is None:
        return p.detach().to(torch.float32)
    beside = fit(form.key, state[form.key], p, (form.dtype_beside(p),))
    return current(p, beside) if form is MASTER else form.load(p.detach(), beside)


def state_dict(optimizer: "Stateful") -> dict[Key, Tensor]:
    """See `Stateful.master_state_dict`."""
    refuse_swapped(optimizer, "master_state_dict()")
    with torch.inference_mode(False), torch.no_grad():
        return {key: held(p, optimizer.state.get(p, {})) for key, _, p in _named(optimizer)}


def load_state_dict(optimizer: "Stateful", values: Mapping[Key, Tensor]) -> None:
    """See `Stateful.load_master_state_dict`."""
    refuse_swapped(optimizer, "load_master_state_dict()")
    named = _named(optimizer)
    _check(optimizer, named, values)
    averaged = {p for _, _, p in named if EMA in optimizer.state.get(p, {})}
    with torch.inference_mode(False), torch.no_grad():
        optimizer.materialize_state()  # may refuse what the state holds: before anything is written
        for key, group, p in named:
            state = optimizer.state.get(p, {})
            x = shards.here(shards.take(values[key].detach(), p, ""))
            x = x.to(shards.here(p).device, p.dtype if p.dtype not in LOW else torch.float32, copy=True)
            if EMA in state and p not in averaged:  # begun just now
                shards.here(state[EMA]).copy_(x)
            write(optimizer, p, x, group)


def write(optimizer: "Stepper", p: Tensor, x: Tensor, group: Mapping[str, Any]) -> None:
    """Store the values x, which are used up, in a parameter and what its group's format keeps beside it."""
    form, state = weight_format(p, group.get(KEY, {})), shards.local_state(optimizer.state.get(p, {}), p)
    whole, p, x, beside = p, shards.here(p), shards.here(x), None
    if form is not None and form.key is not None:
        beside = state.get(form.key) if held_format(p, state) is form else form.initial(p)
    for key in BESIDE:  # of another format: not converted yet
        state.pop(key, None)
    if form is None or form.key is None:
        p.detach().copy_(x)
        return
    assert beside is not None
    weight = torch.empty_like(p.detach())
    form.store(x, weight, beside, None)
    p.detach().copy_(weight)
    shards.local_state(optimizer.state[whole], whole)[form.key] = beside  # also of one that gets no gradient


def has_more(p: Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter's format keeps something beside it."""
    form = weight_format(p, group.get(KEY, {}))
    return form is not None and form.key is not None


def move_towards(optimizer: "Stepper", p: Tensor, end: Tensor, share: float, group: Mapping[str, Any]) -> None:
    """Move the values that a parameter holds a share of the way to ``end``, where its mask lets them."""
    state = shards.local_state(optimizer.state[p], p)
    x = shards.here(held(p, optimizer.state[p]))
    moved = torch.lerp(x, shards.here(end).to(x), share)
    write(optimizer, p, moved if state.get(MASK) is None else torch.where(state[MASK], moved, x), group)


def _named(optimizer: "Stepper") -> list[tuple[Key, dict[str, Any], Tensor]]:
    """(key, group, parameter) of every parameter, in order."""
    found: list[tuple[Key, dict[str, Any], Tensor]] = []
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            found.append((group["param_names"][i] if "param_names" in group else len(found), group, p))
    keys = [key for key, _, _ in found]
    if twice := sorted({str(key) for key in keys if keys.count(key) > 1}) if len(set(keys)) < len(keys) else []:
        raise ValueError(f"two parameters have the name {twice[0]!r}; give each of the optimizer's its own")
    return found


def _check(optimizer: "Stepper", named: list[tuple[Key, dict[str, Any], Tensor]], values: Mapping[Key, Tensor]) -> None:
    """Refuse what does not fit the parameters.

    Raises:
        TypeError, ValueError: names the parameter. RuntimeError: what lies beside it now is of no known format.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"load_master_state_dict takes a dict by name or number, got {type(values).__name__}")
    known = {key for key, _, _ in named}
    for what, keys in (("lacks", known - values.keys()), ("has unknown", values.keys() - known)):
        if keys:
            listed = ", ".join(map(repr, sorted(keys, key=str)[:5])) + (", …" if len(keys) > 5 else "")
            raise ValueError(
                f"load_master_state_dict: the dict {what} {listed}; it must have the keys of master_state_dict(): "
                "names where the optimizer was given named_parameters(), else numbers"
            )
    for key, group, p in named:
        x = values[key]
        if not isinstance(x, Tensor):
            raise TypeError(f"load_master_state_dict: {key!r} must be a tensor, got {type(x).__name__}")
        if x.shape != p.shape or x.is_complex() != p.is_complex():
            raise ValueError(
                f"load_master_state_dict: {key!r} has shape {tuple(x.shape)} and dtype {x.dtype}, its parameter "
                f"{tuple(p.shape)} and {p.dtype}"
            )
        weight_format(p, group.get(KEY, {}))
        held_format(p, optimizer.state.get(p, {}))
