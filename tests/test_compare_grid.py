"""The grid of `fusedopt compare`, the search for learning rates, and what is refused before anything runs."""

import math
from pathlib import Path

import pytest
from compare_command import Compare, assert_refused

from fusedopt.compare import classes, grid, tuned
from fusedopt.rules import RULES
from fusedopt.train.errors import BadInput


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Compare:
    return Compare(tmp_path, capsys, monkeypatch)


def test_every_rule_for_dense_gradients_is_in_one_class() -> None:
    names = [name for entries in classes.CLASSES.values() for name in entries]
    assert len(names) == len(set(names)) and classes.chosen(["all"]) == tuple(names)
    assert {entry.optimizer for entry in classes.ENTRIES.values()} == RULES.keys() - {"sparse_adam"}
    assert len({classes.class_of(name) for name in classes.DEFAULT}) == 3


def test_a_cell_for_every_combination_seed_by_seed() -> None:
    axes = grid.Axes(("momentum", "adamw"), ("cosine", "constant"), (0, 7))
    cells = list(grid.cells(axes, {"steps": 5}, {"adamw": {"lr": 0.5}}))
    assert [cell.name for cell in cells[:4]] == [
        "momentum-cosine-seed0", "adamw-cosine-seed0", "momentum-constant-seed0", "adamw-constant-seed0",
    ]  # fmt: skip
    assert [cell.seed for cell in cells] == [0] * 4 + [7] * 4
    assert cells[1].settings == {
        "steps": 5, "optimizer": "adamw", "optimizer_args": {}, "schedule": "cosine", "seed": 0, "lr": 0.5,
    }  # fmt: skip
    assert "lr" not in cells[0].settings and cells[0].tuned is None  # then train's default is taken
    assert cells[0].settings["optimizer"] == "sgd" and cells[0].settings["optimizer_args"] == {"momentum": 0.9}


def test_batch_sizes_see_the_same_examples_at_a_scaled_rate() -> None:
    fixed = grid.fixed_settings({"batch_size": 16, "epochs": 3}, batches=True)
    assert fixed["epochs"] == 3 and "steps" not in fixed and "batch_size" not in fixed
    assert fixed["lr_scaling"] == "sqrt" and fixed["base_batch_size"] == 16
    cells = list(grid.cells(grid.Axes(("sgd",), ("cosine",), (0,), (1, "full")), fixed, {}))
    assert [cell.settings["batch_size"] for cell in cells] == [1, "full"]
    assert [cell.name for cell in cells] == ["sgd-cosine-batch1-seed0", "sgd-cosine-batchfull-seed0"]
    assert grid.tuning_cell("sgd", "cosine", 9, 0.1, fixed).settings["batch_size"] == 16
    with pytest.raises(BadInput, match="--epochs instead of --steps"):
        grid.fixed_settings({"steps": 3}, batches=True)


def test_one_number_of_seeds_is_how_many() -> None:
    assert grid.parse_seeds(["3"]) == (0, 1, 2) and grid.parse_seeds(["3", "1", "3"]) == (3, 1)


@pytest.mark.parametrize("best", [-9, -3, -2, -1, 0, 5])
def test_the_search_goes_on_until_both_neighbours_are_worse(best: int) -> None:
    """From 10^(−2/2) on, over half powers of ten, one further than the best."""
    losses = tuned.search(0.1, lambda lr: abs(2 * math.log10(lr) - best))
    low, high = min(best, -2) - 1, max(best, -2) + 1
    assert list(losses) == [tuned.learning_rate(k) for k in range(low, high + 1)]
    found = tuned.record(losses, {"seed": 1})
    assert found is not None and found["lr"] == tuned.learning_rate(best) and found["seed"] == 1


def test_a_search_flees_from_divergence_and_ends() -> None:
    losses = tuned.search(0.1, lambda lr: math.inf if lr > 2e-3 else round(1 / lr))
    assert tuned.record(losses, {}) == {
        "lr": 0.001, "val_loss": 1000,
        "tried": {"0.00032": 3125, "0.001": 1000, "0.0032": None, "0.01": None, "0.032": None, "0.1": None,
                  "0.32": None},
    }  # fmt: skip
    tried: list[float] = []
    assert tuned.record(tuned.search(0.1, lambda lr: tried.append(lr) or math.inf), {}) is None
    assert len(tried) == len(set(tried)) == tuned.REACH + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--optimizers adamww", "--optimizers: unknown name adamww: did you mean adamw?"),
        ("--optimizers sparse_adam", "sparse gradients only"),
        ("--optimizers sgd --schedules cosin", "--schedules: unknown name cosin: did you mean cosine?"),
        ("--optimizers", "--optimizers"),
        ("--seeds 0", "--seeds 0: one number is how many"),
        ("--seeds two", "--seeds takes how many, or several numbers, not two"),
        ("--seeds 1 -2", "-2"),
        ("--seeds 1000 3", "1000 is the seed that learning rates are tuned with"),
        ("--batch-sizes 0 8", "--batch-sizes takes numbers of at least 1, or full, not 0"),
        ("--batch-sizes half", "not half"),
        ("--batch-sizes 1 2 --steps 9", "--epochs instead of --steps"),
        ("--hidden-size 30 --num-heads 4", "--num-heads 4 does not divide --hidden-size 30"),
        ("--report", "holds no results yet"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(compare: Compare, options: str, message: str) -> None:
    assert_refused(compare(*options.split()), message)
    assert not compare.session.ran
