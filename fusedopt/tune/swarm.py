"""Particle swarm optimization as a sampler: pymoo's PSO, asked and told a generation at a time.

Trial n is particle n mod P of generation n div P. The swarm is not saved: its generations follow from the seed and
the study's finished trials, and are computed again for each proposal (milliseconds).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from .space import Dimension

PARTICLES = 10


class SwarmSampler(BaseSampler):
    """Proposes positions of particles in the unit cube, stretched over the dimensions. Only completed trials attract:
    the others count as infinitely bad.
    """

    def __init__(self, dimensions: Sequence[Dimension], seed: int) -> None:
        self._space, self._seed = {d.name: d.distribution for d in dimensions}, seed

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        trials = study.get_trials(deepcopy=False)
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        scores = [
            sign * t.value if t.state == TrialState.COMPLETE and t.value is not None else math.inf for t in trials
        ]
        generation, particle = divmod(trial.number, PARTICLES)
        told = [scores[i * PARTICLES : (i + 1) * PARTICLES] for i in range(generation)]
        position = positions(len(search_space), self._seed, told)[particle]
        return {name: stretch(d, x) for (name, d), x in zip(search_space.items(), position, strict=True)}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"{param_name} is in every trial's search space")


def must_wait(study: Study, number: int) -> bool:
    """Whether trial `number` begins a generation while the one before is still being measured."""
    if number % PARTICLES:
        return False
    return any(not t.state.is_finished() for t in study.get_trials(deepcopy=False))


def positions(dimensions: int, seed: int, told: list[list[float]]) -> np.ndarray:
    """The particles, each a point of the unit cube, after the generations with these scores; lower is better."""
    from pymoo.algorithms.soo.nonconvex.pso import PSO
    from pymoo.core.problem import Problem

    swarm: Any = PSO(pop_size=PARTICLES, pertube_best=False)  # which often repeats the best point as it is
    swarm.setup(Problem(n_var=dimensions, n_obj=1, xl=0.0, xu=1.0), seed=seed, verbose=False)
    for scores in told:
        particles = swarm.ask()
        particles.set("F", np.asarray(scores)[:, None])
        swarm.tell(infills=particles)
    return swarm.ask().get("X")


def stretch(distribution: BaseDistribution, x: float) -> float | int:
    """The value at `x`, from 0 to 1, of a range: by its logarithm if it is one, rounded to its step."""
    assert isinstance(distribution, IntDistribution | FloatDistribution)
    low, high, step = distribution.low, distribution.high, distribution.step
    if isinstance(distribution, IntDistribution) and not distribution.log:
        count = (high - low) // distribution.step + 1  # equal shares for all values
        return low + distribution.step * min(int(x * count), count - 1)
    if distribution.log:
        value = low * (high / low) ** x
    else:
        value = low + x * (high - low)
    if isinstance(distribution, IntDistribution):
        value = round(value)
    elif step is not None:
        value = low + step * round((value - low) / step)
    return min(max(value, low), high)
