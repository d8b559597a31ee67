"""The published data: a sequence of single steps of a configuration, each from a state that the oracle reached.

After every step parameter and state are set to the oracle's values, rounded once to storage, so that each step is
judged alone. Everything follows from (seed, configuration, dtype) by NumPy's default generator: two processes build
the same problem without exchanging it.
"""

from __future__ import annotations

import zlib
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .formats import DTYPES, DType
from .oracle import Configuration, Oracle, Value
from .oracles import CONFIGURATIONS, ORACLES

SEEDS = (11, 23, 37, 53, 71, 97, 113, 131, 151, 173)
"""The seed set; `--seeds N` takes the first N."""

TIMES = (1, 2, 3, 30, 1000, 5000)
"""Step counts that are run, one after the other: the start, and bias corrections up to where they vanish."""

SHAPES = ((), (3,), (53, 97))
MANY_CHUNKS = (16389,)
"""Added to the first configuration of each rule: more than one chunk of 16384 elements, with an odd tail."""

SAMPLED = ("float32", "bfloat16", "float64")
"""Dtypes in which a rule's further configurations run by default; its first one runs in all."""

PARAMETERS = (-6.0, 1.0)
"""Decimal exponents of the smallest and the largest parameter (from −3 in float16)."""
ZEROS = 0.03
"""Share of elements that are exactly zero, separately in parameters, gradients and single gradients."""


@dataclass(frozen=True)
class StepCase:
    """One step: for every tensor its inputs, already rounded to storage, and what the oracle makes of them.

    t: the step count after this step. states: empty dicts on the first step, whose state does not exist yet.
    """

    t: int
    params: list[np.ndarray]
    grads: list[np.ndarray]
    states: list[dict[str, np.ndarray]]
    expected: list[dict[str, Value]]


@dataclass(frozen=True)
class Problem:
    """All steps of one configuration and dtype under one seed."""

    configuration: Configuration
    dtype: DType
    seed: int
    steps: list[StepCase]

    @property
    def slots(self) -> list[str]:
        """``"param"`` and the state's keys, in the oracle's order."""
        return list(self.steps[0].expected[0])

    @property
    def sparse(self) -> bool:
        """Whether gradients are handed over as sparse tensors."""
        return ORACLES[self.configuration.rule].sparse

    def dtype_of(self, slot: str) -> DType:
        """How a value is kept: as the parameter, scalar slots apart."""
        return ORACLES[self.configuration.rule].dtype(slot, self.dtype)


def cells(
    rules: Container[str], dtypes: Iterable[str], further: Container[str] = SAMPLED
) -> list[tuple[Configuration, str]]:
    """Configurations and dtypes to verify, rule by rule.

    further: dtypes for all configurations of a rule but its first. Rules for real parameters get no complex ones.
    """
    dtypes = tuple(dtypes)
    return [
        (config, name)
        for oracle in ORACLES.values()
        for config in oracle.configurations
        for name in dtypes
        if oracle.rule in rules
        and (oracle.complex or DTYPES[name].parts == 1)
        and (config is oracle.configurations[0] or name in further)
    ]


def configuration(rule: str, name: str) -> Configuration:
    """The configuration called ``name`` of a rule."""
    return next(c for c in CONFIGURATIONS if (c.rule, c.name) == (rule, name))


def build(config: Configuration, dtype_name: str, seed: int) -> Problem:
    """Draw the data and walk the oracle through all of `TIMES`."""
    oracle, dtype = ORACLES[config.rule], DTYPES[dtype_name]
    shapes = oracle.shapes or SHAPES + ((MANY_CHUNKS,) if config is oracle.configurations[0] else ())
    if oracle.sparse:
        shapes = tuple(shape for shape in shapes if shape)  # a 0-dim tensor has no rows
    params, gradients = data(str(config), dtype, seed, shapes)
    states: list[dict[str, np.ndarray]] = [{} for _ in shapes]
    steps = []
    for t, grads in zip(TIMES, gradients, strict=True):
        case = _step(oracle, config, t, params, grads, states)
        steps.append(case)
        rounded = [
            {key: oracle.dtype(key, dtype).store.round(value.exact) for key, value in new.items()}
            for new in case.expected
        ]
        params = [new.pop("param") for new in rounded]
        states = rounded
    return Problem(config, dtype, seed, steps)


def data(
    name: str, dtype: DType, seed: int, shapes: Sequence[tuple[int, ...]]
) -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """First parameters, and for each of `TIMES` the gradients, representable in the dtype; complex numbers as pairs."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{name} {dtype.name}".encode())])
    if dtype.parts > 1:
        shapes = tuple((*shape, dtype.parts) for shape in shapes)
    lowest = -3.0 if dtype.store.emin > -20 else PARAMETERS[0]
    params = [_draw(rng, dtype, np.asarray(rng.uniform(lowest, PARAMETERS[1], shape))) for shape in shapes]
    exponents = [np.asarray(rng.uniform(*dtype.gradients, shape)) for shape in shapes]
    gradients = []
    for _ in TIMES:
        wander = [np.clip(e + rng.uniform(-1, 1, e.shape), *dtype.gradients) for e in exponents]
        gradients.append([_draw(rng, dtype, e) for e in wander])
    return params, gradients


def _step(
    oracle: Oracle,
    config: Configuration,
    t: int,
    params: list[np.ndarray],
    grads: list[np.ndarray],
    states: list[dict[str, np.ndarray]],
) -> StepCase:
    expected = [oracle.run(config, t, *inputs) for inputs in zip(params, grads, states, strict=True)]
    return StepCase(t, params, grads, states, expected)


def _draw(rng: np.random.Generator, dtype: DType, exponents: np.ndarray) -> np.ndarray:
    """Random signs at the given decimal exponents, some exact zeros, rounded to storage."""
    signs = rng.choice((-1.0, 1.0), exponents.shape) * (rng.random(exponents.shape) >= ZEROS)
    return dtype.store.round(np.asarray(signs * 10.0**exponents).astype(dtype.reference))
