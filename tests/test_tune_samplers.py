"""Samplers of `fusedopt tune`: what they propose follows from the seed and the results, and most of them learn."""

import statistics

import optuna
import pytest
import tune_stub

from fusedopt.tune import samplers, space, swarm

LISTED = {"lr": "0.001,0.01,0.1", "dropout": "0:0.4:0.1"}


def proposals(name: str, count: int, seed: int = 0, study: optuna.Study | None = None) -> optuna.Study:
    """A study of `count` trials in memory, each with a sampler of its own, as workers make them."""
    dimensions = space.parse(LISTED if name == "grid" else tune_stub.SPACE)
    study = study or optuna.create_study()
    while len(study.trials) < count:
        study.sampler = samplers.make(name, dimensions, seed, len(study.trials))
        trial = study.ask({d.name: d.distribution for d in dimensions})
        drawn = space.settings({}, dimensions, trial.params)
        study.tell(trial, tune_stub.loss_at(drawn, 1))
    return study


@pytest.mark.parametrize("name", ["grid", "random", "tpe", "gp", "cmaes", "pso"])
def test_the_same_seed_proposes_the_same_trials(name: str) -> None:
    count = {"gp": 12, "pso": 30}.get(name, 14)  # from the eleventh on by a model; that of gp takes its time
    first, again, other = (proposals(name, count, seed) for seed in (0, 0, 1))
    params = [[trial.params for trial in study.trials] for study in (first, again, other)]
    assert params[0] == params[1] != params[2]
    assert len({str(p) for p in params[0]}) == count  # no point twice


@pytest.mark.parametrize(("name", "count"), [("tpe", 40), ("gp", 16), ("cmaes", 40), ("pso", 40)])
def test_what_is_proposed_becomes_better(name: str, count: int) -> None:
    losses = [trial.values[0] - 2.0 for trial in proposals(name, count).trials]  # 2 is the least
    assert statistics.median(losses[-5:]) < 0.5 * statistics.median(losses[:10])


def test_a_grid_visits_every_point_once() -> None:
    found = [tuple(trial.params.values()) for trial in proposals("grid", 15).trials]
    assert len(set(found)) == 15 and found != sorted(found)


def test_a_swarm_s_generation_depends_on_the_results_of_those_before_alone() -> None:
    worst, best = [3.0] * 10, [*[3.0] * 9, 1.0]
    second = swarm.positions(2, 0, [worst])
    assert (swarm.positions(2, 0, [worst]) == second).all()
    assert (swarm.positions(2, 0, [best]) != second).any()
    third = swarm.positions(2, 0, [worst, [float("inf")] * 10])  # pruned and failed trials attract nothing
    assert third.shape == (10, 2) and ((third >= 0) & (third <= 1)).all()


def test_a_swarm_s_generation_waits_for_the_one_before() -> None:
    study = proposals("pso", 9)
    study.sampler = samplers.make("pso", space.parse(tune_stub.SPACE), 0, 9)
    trial = study.ask({d.name: d.distribution for d in space.parse(tune_stub.SPACE)})
    assert swarm.must_wait(study, 10) and not swarm.must_wait(study, 9)
    study.tell(trial, 1.0)
    assert not swarm.must_wait(study, 10)
