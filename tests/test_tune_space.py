"""The search space of `fusedopt tune`: what `--space` accepts, what becomes of it, and what is refused."""

from typing import Any

import numpy as np
import pytest
import tune_stub
from optuna.distributions import FloatDistribution, IntDistribution

from fusedopt.train.config import resolve
from fusedopt.train.errors import BadInput
from fusedopt.train.optimizers import DEFAULTS
from fusedopt.tune import plan, samplers, space, swarm


def dimension(entry: str) -> space.Dimension:
    return space.parse(space.split([entry]))[0]


@pytest.mark.parametrize(
    ("entry", "distribution"),
    [
        ("lr=log:1e-4:1e-1", FloatDistribution(1e-4, 1e-1, log=True)),
        ("--dropout=0:0.3", FloatDistribution(0.0, 0.3)),
        ("dropout=0:0.3:0.1", FloatDistribution(0.0, 0.3, step=0.1)),
        ("hidden-size=32:256:32", IntDistribution(32, 256, step=32)),
        ("steps=log:10:1000", IntDistribution(10, 1000, log=True)),
        ("optimizer_args.eps=log:1e-10:1e-6", FloatDistribution(1e-10, 1e-6, log=True)),
        ("schedule_args.power=int:1:3", IntDistribution(1, 3)),
    ],
)
def test_a_range_is_of_its_setting_s_type(entry: str, distribution: object) -> None:
    assert dimension(entry).distribution == distribution


@pytest.mark.parametrize(
    ("entry", "values"),
    [
        ("optimizer=adam,lion", ["adam", "lion"]),
        ("batch_size=8,16,full", [8, 16, "full"]),
        ("lr=1e-3,0.01", [0.001, 0.01]),
        ("optimizer_args.betas=(0.9, 0.95),(0.9, 0.999)", [(0.9, 0.95), (0.9, 0.999)]),
        ("optimizer_args.nesterov=true,False", [True, False]),
    ],
)
def test_a_list_holds_values_not_texts(entry: str, values: list[Any]) -> None:
    found = dimension(entry)
    assert [found.value(text) for text in found.points()] == values


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lr", "write NAME=RANGE"),
        ("lr=", "write NAME=RANGE"),
        ("lrr=0:1", "unknown setting lrr; did you mean lr?"),
        ("eps=0:1", "optimizer_args.eps"),
        ("beta2=0.9:0.99", "optimizer_args.betas.1"),
        ("out=a,b", "not searched"),
        ("optimizer_args=1,2", "optimizer_args.eps"),
        ("optimizer_args.betas.x=0:1", "unknown setting"),
        ("lr=0.1:0.01", "is empty: 0.1 is more than 0.01"),
        ("lr=0.1:0.1", "single value"),
        ("lr=0.1", "single value"),
        ("lr=0.1,0.10", "names a value twice"),
        ("lr=log:0:1", "begins above 0"),
        ("lr=log:0.1:1:0.1", "has no step"),
        ("lr=nan:1", "not finite"),
        ("lr=1:b", "'b' is not a number"),
        ("lr=1:2:3:4", "write LOW:HIGH"),
        ("dropout=0:0.3:0.2", "steps of 0.2 do not lead from 0.0 to 0.3"),
        ("dropout=0:0.3:0", "steps of 0.0 do not lead"),
        ("hidden_size=32:64.5", "'64.5' is not a whole number"),
        ("hidden_size=32,x", "'x' is not a whole number"),
        ("optimizer=adam:lion", "not a number; list its values"),
    ],
)
def test_what_cannot_be_searched_gets_one_line(entry: str, message: str) -> None:
    with pytest.raises(BadInput) as error:
        dimension(entry)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_name_is_searched_once() -> None:
    with pytest.raises(BadInput, match="lr twice"):
        space.split(["lr=0:1", "lr=0:2"])
    with pytest.raises(BadInput, match=r"optimizer_args\.betas\.1 inside optimizer_args\.betas"):
        space.parse({"optimizer_args.betas": "(0.9,0.9),(0.8,0.9)", "optimizer_args.betas.1": "0.9:0.99"})
    with pytest.raises(BadInput, match="nothing to search"):
        space.parse({})


def test_arguments_go_to_their_class_and_one_entry_of_a_tuple_leaves_the_others() -> None:
    entries = ["optimizer_args.betas.1=0.9:0.99", "optimizer_args.eps=log:1e-9:1e-7", "optimizer=adam,adan"]
    dimensions = space.parse(space.split(entries))
    drawn = {"optimizer_args.betas.1": 0.93, "optimizer_args.eps": 1e-8, "optimizer": "adan"}
    fixed = {"lr": 0.1, "optimizer_args": {"betas": [0.5, 0.9, 0.99]}}
    found = space.settings(fixed, dimensions, drawn)
    arguments = {"betas": (0.5, 0.93, 0.99), "eps": 1e-8}
    assert found == {"lr": 0.1, "optimizer": "adan", "optimizer_args": arguments}
    assert fixed["optimizer_args"]["betas"] == [0.5, 0.9, 0.99]
    default = space.settings({}, dimensions, {**drawn, "optimizer": "adam"})
    assert default["optimizer_args"]["betas"] == (0.9, 0.93)
    with pytest.raises(BadInput, match="betas of sgd has no entry 1"):
        space.settings({"optimizer": "sgd"}, dimensions[:1], drawn)


def test_grid_points() -> None:
    assert dimension("dropout=0:0.3:0.1").points() == [0.0, 0.1, 0.2, 0.3]
    assert dimension("num_layers=1:3").points() == [1, 2, 3]
    for entry in ("lr=log:1e-3:1e-1", "dropout=0:0.3", "steps=log:10:20"):
        with pytest.raises(BadInput, match="has no points: list them"):
            samplers.check("grid", [dimension(entry)])


@pytest.mark.parametrize("name", ["cmaes", "pso"])
def test_samplers_of_numbers_refuse_lists(name: str) -> None:
    with pytest.raises(BadInput, match=f"--sampler {name}: .*optimizer=adam,lion is a list"):
        samplers.check(name, space.parse({"optimizer": "adam,lion", "lr": "0:1"}))
    with pytest.raises(BadInput, match="two settings"):
        samplers.check("cmaes", space.parse({"lr": "0:1"}))


def test_a_value_that_no_run_accepts_is_refused_before_training() -> None:
    with pytest.raises(BadInput, match=r"--space dropout=0:1.5, at 1.5: --dropout must be"):
        space.check({}, space.parse({"dropout": "0:1.5", "lr": "0.1,0.2"}), tune_stub.validated)
    heads = {"num_heads": "3,4", "hidden_size": "64,96"}  # 3 does not divide 64, and does divide 96
    assert space.check({}, space.parse(heads), tune_stub.validated).num_heads in (3, 4)
    with pytest.raises(BadInput, match="num_heads=3,5"):
        space.check({}, space.parse({**heads, "num_heads": "3,5"}), tune_stub.validated)


def test_the_default_space_is_around_the_defaults() -> None:
    config = resolve({"optimizer": "sgd", "steps": 200}, "cpu", DEFAULTS)
    wanted = {"lr": "log:0.01:1", "weight_decay": "log:0.001:1", "warmup_steps": "0:40"}
    assert space.default(config, {}, lambda _: True) == wanted
    assert space.default(config, {"lr": 0.1}, lambda more: "weight_decay" not in more) == {"warmup_steps": "0:40"}


@pytest.mark.parametrize("entry", ["lr=log:1e-4:1e-1", "dropout=0:0.5", "dropout=0:0.4:0.1", "num_layers=1:4"])
def test_positions_of_particles_reach_every_value(entry: str) -> None:
    distribution: Any = dimension(entry).distribution
    values = [swarm.stretch(distribution, x) for x in np.linspace(0, 1, 401)]
    assert (values[0], values[-1]) == (distribution.low, distribution.high) and values == sorted(values)
    assert all(distribution._contains(value) for value in values)
    if distribution == IntDistribution(1, 4):
        assert [values.count(n) for n in (1, 2, 3, 4)] == [100, 100, 100, 101]
    if entry == "lr=log:1e-4:1e-1":
        assert values[200] == pytest.approx(10**-2.5)


def test_a_plan_names_what_differs_when_a_study_is_resumed() -> None:
    made = plan.settle({"space": ("lr=0.1,0.2",), "sampler": "grid"}, {"clip": 2.0}, {}, tune_stub.validated)
    assert (made.trials, made.validations, made.direction) == (2, 5, "minimize")
    assert plan.continued(made, {"sampler": "grid", "trials": 9}, {"clip": 2.0}, {}) == made  # the grid has two points
    with pytest.raises(BadInput, match=r"--sampler was grid, now tpe; clip was 2\.0, now 3\.0; dropout was left at"):
        plan.continued(made, {"sampler": "tpe"}, {"clip": 3.0, "dropout": 0.1}, {})
    with pytest.raises(BadInput, match=r"--space was lr=0\.1,0\.2, now lr=0\.1,0\.3"):
        plan.continued(made, {"space": ("lr=0.1,0.3",)}, {}, {})
