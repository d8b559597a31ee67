"""Judges what a run has stored: each number must be one of those next to the exact one.

Let x be the exact result of a step from the numbers stored before it, and e the error of arithmetic that the rule's
bound allows. What is stored stands for y, rounded to nearest no further from x than half the way to y's neighbour,
rounded at random than all of it, + e. Reported is the largest (|x − y| − that distance)/e: above 1 is broken.

A group's scale is checked by itself: it is the largest magnitude of x's group ± e, or, where numbers are logarithmic,
the largest code is that of it. And a weight is the number of its dtype nearest to what its format holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .bounds import Bound
from .formats import DTYPES, SCALAR, SINGLE
from .kept import TIMES, KeptCell, KeptProblem, build
from .oracle import Value
from .oracles import ORACLES
from .storage import CODED, PLAIN, WEIGHTS, Reading, group_maxima, read_coded, read_float
from .subjects import Outcome, rule_of

CODES = Bound(
    4.0,
    "Codes: x times the rounded quotient of largest code and scale, 2 u of x; at random, a sum with 2¹⁵ codes' digits "
    "more. Decoding is what the format says it is and costs nothing.",
)
FAST = Bound(
    4.0,
    "Compiled with quantised state, fp32 division and root are approximations of 2 ulps each, where ½ is counted.",
)
"""A factor."""


@dataclass
class Verdict:
    """What a cell has come to on a backend.

    used: value or slot → largest share of what arithmetic may be off by. broken: what else is wrong, in words.
    """

    used: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    @property
    def largest(self) -> float:
        """The largest share."""
        return max(self.used.values(), default=0.0)

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words; empty when all is within limits."""
        over = [f"{slot} is off by {used:.3g} × its bound" for slot, used in self.used.items() if not used <= 1.0]
        return over + self.broken


@dataclass(frozen=True)
class _Place:
    """One tensor after one step: what is stored of it."""

    cell: KeptCell
    dtype: str
    shape: tuple[int, ...]
    bits: Mapping[str, np.ndarray]

    def weight(self) -> Reading:
        """The numbers that the weight's format holds."""
        kept = self.cell.kept
        form = PLAIN if kept.weights is None else WEIGHTS[kept.weights]
        beside = self._of("param") if form.key is None else self._of(form.key)
        width = form.bits or self._of("param").dtype.itemsize * 8
        if beside.dtype.itemsize * 8 != width or beside.shape != self.shape:
            raise ValueError(f"{form.key} has {beside.dtype.itemsize * 8} bits and shape {beside.shape}")
        random = kept.random and kept.weights is not None
        return form.read(self.dtype, self._of("param"), beside, random)

    def forward(self) -> np.ndarray:
        """The weight as the model sees it."""
        return read_float(self.dtype, self._of("param"), False).value

    def slot(self, slot: Any) -> tuple[Reading, np.ndarray | None]:
        """Numbers of a slot, and the largest magnitude of its groups, None if it has none.

        Raises:
            ValueError: it is not kept as it should be.
        """
        kept, name = self.cell.kept, slot.name
        if slot.kind == "scalar":
            bits = self._of(name)
            value = bits.view(f"f{bits.dtype.itemsize}").astype(np.float64)
            return Reading(value, np.zeros_like(value), np.zeros_like(value)), None
        storage = kept.storage(slot, np.empty(self.shape))
        random = kept.random and kept.state is not None
        if storage in CODED:
            form = CODED[storage][slot.kind]
            codes, scales = self._of(f"{name}_q"), self._of(f"{name}_scale")
            return read_coded(form, codes, scales, self.shape, random or form.dithered)
        bits = self._of(name)
        width = DTYPES[storage].store
        if bits.dtype.itemsize != (4 if width == SINGLE else 2):
            raise ValueError(f"{name} has {8 * bits.dtype.itemsize} bits, not those of {storage}")
        return read_float(storage, bits, random), None

    def has(self, slot: Any) -> bool:
        """Whether there is anything of a slot."""
        return any(self.bits[key].size for key in (slot.name, f"{slot.name}_q"))

    def _of(self, key: str) -> np.ndarray:
        bits = self.bits[key]
        if not bits.size:
            raise ValueError(f"nothing is stored under {key!r}")
        return bits


def judge(cell: KeptCell, seeds: Sequence[int], outcomes: Sequence[Outcome], fast: bool = False) -> Verdict:
    """Check every number that was stored at every step. fast: divisions were approximate, see `FAST`."""
    verdict = Verdict()
    for seed, outcome in zip(seeds, outcomes, strict=True):
        problem = build(cell, seed)
        for index, (dtype, first) in enumerate(zip(problem.dtypes, problem.params, strict=True)):
            try:
                for name, used in _shares(cell, problem, index, dtype, first.shape, outcome, fast):
                    verdict.used[name] = max(verdict.used.get(name, 0.0), used)
            except ValueError as error:
                verdict.broken.append(f"{dtype} parameter of shape {first.shape}: {error}")
    return verdict


def _shares(
    cell: KeptCell, problem: KeptProblem, index: int, dtype: str, shape: tuple[int, ...], outcome: Outcome, fast: bool
) -> Iterator[tuple[str, float]]:
    """For each step, the weight's and every slot's `_share`."""
    oracle, rule = ORACLES[cell.configuration.rule], rule_of(cell.configuration.rule)
    value, state = problem.params[index], {}
    for step, t in enumerate(TIMES):
        place = _Place(cell, dtype, shape, {key: tensors[index] for key, tensors in outcome[step].items()})
        grad, config = problem.grads[step][index], cell.configuration
        exact, before = oracle.run(config, t, value, grad, state), state
        state = {}
        for slot in rule.state:
            if slot.name not in exact:
                if place.has(slot):
                    raise ValueError(f"{slot.name} is stored where it has no meaning")
                continue
            reading, largest = place.slot(slot)
            error = _error(cell, slot.name, exact[slot.name], fast)
            yield slot.name, _share(reading, exact[slot.name], error)
            if largest is not None:
                yield f"{slot.name}, scales", _scale_share(place, slot, largest, exact[slot.name], error)
            state[slot.name] = reading.value
        if oracle.stored:
            told = replace(config, options={**config.options, "stored": state})
            exact = oracle.run(told, t, value, grad, before)
        weight = place.weight()
        yield "param", _share(weight, exact["param"], _error(cell, "param", exact["param"], fast))
        _check_forward(place, weight.value)
        value = weight.value


def _error(cell: KeptCell, name: str, exact: Value, fast: bool) -> np.ndarray:
    """What arithmetic may be off by."""
    oracle, single = ORACLES[cell.configuration.rule], DTYPES["float32"]
    bound = oracle.bounds[cell.configuration.name][name]
    if name in oracle.scalars:
        return (bound.of(SCALAR) + 0.5) * SINGLE.ulp(exact.addend)
    coded = cell.kept.state in CODED
    ulps = bound.of(single) * (FAST.ulps if fast and coded else 1.0) + (CODES.ulps if coded and name != "param" else 0)
    with np.errstate(invalid="ignore"):
        return ulps * SINGLE.ulp(exact.addend)


def _share(reading: Reading, exact: Value, error: np.ndarray) -> float:
    """Largest share of the error that any judged element takes; NaN on one side counts as infinite."""
    with np.errstate(invalid="ignore", divide="ignore"):
        off = exact.exact - reading.value
        beyond = np.abs(off) - np.where(off > 0, reading.up, reading.down)
        used = np.where(beyond <= 0, 0.0, beyond / error)
    same = np.isnan(exact.exact) & np.isnan(reading.value)
    used = np.where(same | np.isinf(exact.addend), 0.0, used)
    return float(np.max(np.where(np.isnan(used), np.inf, used), initial=0.0))


def _check_forward(place: _Place, held: np.ndarray) -> None:
    off = np.abs(place.forward() - held)
    wrong = int(np.sum(~(off <= DTYPES[place.dtype].store.ulp(held) / 2)))
    if wrong:
        raise ValueError(f"{wrong} weights are not the {place.dtype} numbers nearest to what their format holds")


def _scale_share(place: _Place, slot: Any, largest: np.ndarray, exact: Value, error: np.ndarray) -> float:
    """`_share` of groups' largest magnitudes."""
    form = CODED[place.cell.kept.storage(slot, np.empty(place.shape))][slot.kind]
    reach = np.where(np.isnan(largest), np.inf, largest * form.top_reach)
    value = np.where(np.isnan(largest), 0.0, largest)
    top = group_maxima(exact.exact)
    return _share(Reading(value, reach, reach), Value(top, top), group_maxima(error))
