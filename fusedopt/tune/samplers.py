"""How settings are proposed and bad trials ended early, by Optuna's samplers and pruners; PSO is in `swarm.py`.

A sampler is made anew for every trial, with a seed that is a function of the study's seed and the trial's number. So
the proposals of grid and random search depend on nothing else, and those of the others also on the results so far:
the same after a kill, and whichever process draws them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from optuna.distributions import CategoricalDistribution
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner, SuccessiveHalvingPruner
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, GridSampler, RandomSampler, TPESampler

from ..train.errors import BadInput
from .space import Dimension

NUMBERS_ONLY = {"cmaes": "CMA-ES", "pso": "particle swarm"}
NEEDS = {"cmaes": ["cmaes"], "gp": ["scipy", "greenlet"], "pso": ["pymoo"]}
"""What a sampler needs beside Optuna; without greenlet, gp takes ten times as long."""
SEE_PRUNED = ("grid", "random", "tpe")
"""Samplers that pruning does not mislead: the others learn from completed trials only."""


class _Grid(GridSampler):
    def after_trial(self, *_: Any) -> None:
        """GridSampler ends `Study.optimize` here, which we do not run."""


def trial_seed(seed: int, number: int) -> int:
    """The seed of the sampler for one trial of a study."""
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def make(name: str, dimensions: Sequence[Dimension], seed: int, number: int) -> BaseSampler:
    """The sampler that proposes trial `number`."""
    own = trial_seed(seed, number)
    if name == "grid":
        return _Grid({d.name: d.points() for d in dimensions}, seed=seed)  # one order of the points for all trials
    if name == "pso":
        from .swarm import SwarmSampler

        return SwarmSampler(dimensions, seed)
    kinds: dict[str, Any] = {"random": RandomSampler, "tpe": TPESampler, "gp": GPSampler, "cmaes": CmaEsSampler}
    return kinds[name](seed=own)


def check(name: str, dimensions: Sequence[Dimension]) -> None:
    """Refuse a space that a sampler cannot search."""
    if name == "grid":
        grid_size(dimensions)
    if name not in NUMBERS_ONLY:
        return
    for dimension in dimensions:
        if isinstance(dimension.distribution, CategoricalDistribution):
            raise BadInput(
                f"--sampler {name}: {NUMBERS_ONLY[name]} moves through numbers, and {dimension.name}={dimension.text} "
                "is a list: make it a range, fix it, or use --sampler tpe"
            )
    if name == "cmaes" and len(dimensions) < 2:
        raise BadInput("--sampler cmaes needs two settings to search: add one, or use --sampler tpe or gp")


def grid_size(dimensions: Sequence[Dimension]) -> int:
    """The number of points of the grid."""
    return math.prod(len(d.points()) for d in dimensions)


def make_pruner(name: str, validations: int) -> BasePruner:
    """The pruner for trials with so many validations, at which losses are reported as 1, 2, …; 0: before training."""
    if name == "median":  # of at least five other trials, and not in the first quarter, where warm-up differs
        return MedianPruner(n_startup_trials=5, n_warmup_steps=max(1, validations // 4))
    if name == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=validations, reduction_factor=3)
    if name == "halving":
        return SuccessiveHalvingPruner(min_resource=max(1, validations // 9), reduction_factor=3)
    return NopPruner()
