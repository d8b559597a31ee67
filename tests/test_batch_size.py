"""Hyper-parameters for another batch size, against the rules as published."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fusedopt

SIZES = st.integers(1, 2**20)


def test_the_published_examples() -> None:
    assert fusedopt.scale_lr(0.0005, 128, 1024) == pytest.approx(0.001414, abs=5e-7)
    assert fusedopt.scale_lr(0.0005, 128, 1024, "sqrt") == fusedopt.scale_lr(0.0005, 128, 1024)
    assert fusedopt.scale_lr(0.1, 256, 8192, rule="linear") == pytest.approx(3.2)  # Goyal et al.: 8k images
    assert fusedopt.scale_lr(0.3, 64, 64) == 0.3


@given(SIZES, SIZES, SIZES, st.sampled_from(["sqrt", "linear"]))
def test_scaling_composes_and_goes_back(a: int, b: int, c: int, rule: str) -> None:
    there = fusedopt.scale_lr(0.01, a, b, rule)
    assert fusedopt.scale_lr(there, b, c, rule) == pytest.approx(fusedopt.scale_lr(0.01, a, c, rule))
    assert fusedopt.scale_lr(there, b, a, rule) == pytest.approx(0.01)


@given(st.integers(1, 64), st.floats(0.5, 8.0))
def test_adams_rule_keeps_what_the_sde_is_made_of(old: int, ratio: float) -> None:
    """Malladi et al., Definition 5.3: lr/√κ, (1 − β)/κ and ε·√κ are those of before."""
    new = max(1, round(old * ratio))
    scaled = fusedopt.scale_adam(0.002, old, new, betas=(0.95, 0.999), eps=1e-6)
    size = new / old
    assert scaled["lr"] / math.sqrt(size) == pytest.approx(0.002)
    assert [(1 - beta) / size for beta in scaled["betas"]] == pytest.approx([0.05, 0.001])
    assert scaled["eps"] * math.sqrt(size) == pytest.approx(1e-6)


def test_adams_rule_gives_arguments_of_an_optimizer() -> None:
    import torch

    optimizer = fusedopt.AdamW([torch.ones(1)], **fusedopt.scale_adam(0.001, 32, 64))
    (group,) = optimizer.param_groups
    assert group["betas"] == pytest.approx((0.8, 0.998))
    assert (group["lr"], group["eps"]) == pytest.approx((0.001 * math.sqrt(2), 1e-8 / math.sqrt(2)))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(rule="square"), ValueError, r"rule must be linear or sqrt, got 'square'"),
        (dict(rule="sqr"), ValueError, r"did you mean sqrt\?"),
        (dict(rule=None), ValueError, "got None"),
        (dict(old_batch_size=0), ValueError, "old_batch_size must be at least 1, got 0"),
        (dict(new_batch_size=-4), ValueError, "new_batch_size must be at least 1, got -4"),
        (dict(new_batch_size=64.0), TypeError, "new_batch_size must be an integer, got 64.0"),
        (dict(old_batch_size=True), TypeError, "old_batch_size must be an integer, got True"),
        (dict(lr=-0.1), ValueError, "Invalid lr value: -0.1"),
        (dict(lr=math.nan), ValueError, "Invalid lr value: nan"),
        (dict(lr=math.inf), ValueError, "Invalid lr value: inf"),
        (dict(lr="0.1"), TypeError, "lr must be a number"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else None,
)
def test_bad_input_is_refused_by_name(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"lr": 0.1, "old_batch_size": 32, "new_batch_size": 64, **arguments}
    with pytest.raises(error, match=message):
        fusedopt.scale_lr(**given)
    if "rule" not in arguments:
        with pytest.raises(error, match=message):
            fusedopt.scale_adam(**given)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(betas=(0.9, 1.0)), "beta parameter at index 1: 1.0"),
        (dict(eps=-1e-8), "Invalid eps value"),
        (dict(betas=(0.4, 0.999)), "no counterpart at 2 times the batch size: 0.4 would become -0.2"),
    ],
)
def test_adams_betas_and_eps_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusedopt.scale_adam(0.1, 32, 64, **options)
