"""Nothing is lost: decay alone, long ways against float64, gradients of every size; and its study's tables.

On eager twins, whose bits the kernels share; the formats themselves are tested in test_codecs*.py.
"""

import json
import math
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fusedopt

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf.studies import drift
from perf.studies import drift_studies as studies

BF16_WARNING = "ignore:state 'exp_avg_sq' takes its parameter's dtype:UserWarning"
UNIT = {
    "fp32": 2.0**-23, "float32": 2.0**-23, "split16": 2.0**-23, "split8": 2.0**-15, "split8-nearest": 2.0**-15,
    "kahan": 2.0**-16, "stochastic": 2.0**-7,
}  # fmt: skip
"""Largest distance of two neighbours among the numbers of a format, over the power of two below them. Kahan's second
number is at most 2⁻⁸ of that power and has 8 bits."""
RANDOM = ("split8", "stochastic")
SHORT_AND_LONG = [200, pytest.param(10_000, marks=pytest.mark.long)]


def deviation_of_decay(name: str, rate: float, steps: int) -> float:
    """Bound on the standard deviation of the share of decay that was done, a mean over elements of weight x².

    At random: a step d is rounded to a multiple of the unit u with variance u²·f(1 − f), f the fraction of d/u, at most
    u·d and u²/4. To nearest: a step is off by up to u/2, the same from step to step, uniform over the elements; the
    largest of a binade counts double. fp32's own rounding, likewise, comes on top.
    """
    x = studies.start(0)[: studies.DECAY_ROWS]
    weight = float(x.pow(4).sum().sqrt() / x.square().sum())
    if name in RANDOM:
        one = math.sqrt(steps * min(UNIT[name] * rate, UNIT[name] ** 2 / 4))
    else:
        one = steps * UNIT[name] / 2 / math.sqrt(3)
    return weight * (one + steps * 2.0**-24 / math.sqrt(3)) / -math.expm1(steps * math.log1p(-rate))


@pytest.mark.parametrize("steps", SHORT_AND_LONG)
@pytest.mark.parametrize("name", ["float32", "split16", "split8", "kahan", "stochastic"])
def test_decay_alone_is_done(name: str, steps: int) -> None:
    """lr·wd from 1e-6 to 1e-3, within five standard deviations; Kahan's from 2⁻¹⁷ on, as the next test says."""
    for row in studies.decay("AdamW", name, steps):
        if name != "kahan" or row["rate"] > 2.0**-17:
            assert abs(row["share"] - 1) <= 5 * deviation_of_decay(name, row["rate"], steps), row


def test_kahan_stands_still_below_half_of_its_last_bit() -> None:
    """At lr·wd = 1e-6 a step on x in [1, 2) is less than half of c's last bit, 2ᵏ⁻⁸, once |c| has reached 2ᵏ = 2⁻¹⁰."""
    row = studies.decay("AdamW", "kahan", 1000)[0]
    assert row["rate"] == 1e-6 and 0.0 < row["share"] * row["exact"] <= 2.0**-10


def test_split8_to_nearest_loses_what_stochastic_rounding_keeps() -> None:
    """Half of its unit is 2⁻¹⁶: x in [1, 2) stands still at lr·wd = 1e-6."""
    rows = studies.decay("AdamW", "split8-nearest", 50)
    assert rows[0]["share"] == 0.0 and rows[3]["share"] == pytest.approx(1.0, abs=0.02)


@pytest.mark.filterwarnings(BF16_WARNING)
@pytest.mark.parametrize("name", ["bf16", "torch bf16"])
def test_plain_bf16_loses_all_decay(name: str) -> None:
    """Half of its unit is 2⁻⁸, and lr·wd·x < 2⁻⁹ for x in [1, 2): what the formats above are for."""
    assert all(row["share"] == 0.0 for row in studies.decay("AdamW", name, 20))


def test_decay_is_the_same_for_every_rule() -> None:
    """Bits included: it is applied beside the rule, from the same random numbers."""
    ours, theirs = (studies.decay(rule, "split8", 20) for rule in ("AdamW", "Lion"))
    assert [row["share"] for row in ours] == [row["share"] for row in theirs]


@pytest.mark.filterwarnings(BF16_WARNING)
@pytest.mark.parametrize("steps", SHORT_AND_LONG)
def test_weights_follow_float64(steps: int) -> None:
    """x is below twice the power of two that its units count from, so a unit is at most UNIT·|x|.

    Rounding to nearest is off by half a unit in each step; at random the deviations, half a unit at most, add up as
    their squares do, and their mean over n elements is within five standard deviations of zero. An update of at most a
    few lr has about 16 roundings in fp32.
    """
    names = ("fp32", *(f"{name}+float32" for name in UNIT if name != "fp32"), "bf16")
    rows = {row["format"]: row for row in studies.follow(names, steps)}
    size = 0.04  # rms of the weights: 0.02 at first, then 0.02·√2 away from zero at most
    arithmetic = steps * (size * 2.0**-24 + studies.LR * 16 * 2.0**-24)
    for name in UNIT:
        row = rows[name if name == "fp32" else f"{name}+float32"]
        grown = math.sqrt(steps) if name in RANDOM else steps
        error = (size * UNIT[name] / 2 * grown + arithmetic) / row["way"]
        assert row["error"] <= error, name
        mean = 5 * error / 64 + arithmetic / row["way"] if name in RANDOM else error
        assert abs(row["share"] - 1) <= mean, name
    assert rows["split16+float32"]["error"] == rows["float32+float32"]["error"] == rows["fp32"]["error"]
    assert rows["bf16"]["share"] < 0.99  # where updates are below half a unit


def moments(steps: int) -> list[tuple[Tensor, Tensor]]:
    """Adam's m and v in float64 under the gradients of `moved`."""
    m, v = torch.zeros(studies.SHAPE, dtype=torch.float64), torch.zeros(studies.SHAPE, dtype=torch.float64)
    made = []
    for gradient in studies.gradients(steps, 0):
        m, v = m + 0.1 * (gradient.double() - m), v + 0.001 * (gradient.double().square() - v)
        made.append((m, v))
    return made


def expected_error(state: str, steps: int) -> float:
    """Bound on the rms error of the way of `moved`, lr = 1.

    m: rounding at step j is off by ε, of variance q²/12 (nearest) or at most q²/4 (random), independently; it enters
    every later step t with β₁ᵗ⁻ʲ. q is 1/127 of the group's largest, or 1/8 of m for float8. v: every rounding is off
    by less than u = v/16 (int8) or v/8, of variance u²/4 at most, which adds up; half of it is in the root.
    """
    made = moments(steps)
    later, variance, root = torch.zeros(studies.SHAPE), torch.zeros(studies.SHAPE), torch.zeros(studies.SHAPE)
    for t in range(steps, 0, -1):
        m, v = made[t - 1]
        q = m.abs() / 8 if "float8" in state else m.abs().amax(1, keepdim=True) / 127
        variance = variance + (later * q).square() / (4 if "random" in state else 12)
        later = 0.9 * (later + 1 / (1 - 0.9**t) / (v / (1 - 0.999**t)).sqrt())
    lost = torch.zeros(studies.SHAPE)
    for t, (m, v) in enumerate(made, 1):
        step = m.abs() / (1 - 0.9**t) / (v / (1 - 0.999**t)).sqrt()
        root = root + step * lost.sqrt() / v / 2
        lost = lost + (v / (8 if "float8" in state else 16)).square() / 4
    return float(variance.mean().sqrt() + root.square().mean().sqrt())


@pytest.mark.parametrize("state", ["int8", "int8-random", "float8-random"])
def test_quantised_state_is_as_exact_as_its_codes(state: str) -> None:
    """Errors are independent and do not add up in one direction; 5 % for what they change in each other."""
    exact, got = studies.moved("float64", 1.0, 50), studies.moved(state, 1.0, 50)
    lr = 1e-3
    assert studies.rms(got - exact) <= 1.05 * lr * expected_error(state, 50)
    assert studies.along(got, exact) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("state", [name for name in drift.STATES if name != "float16"])
def test_the_size_of_gradients_does_not_matter(state: str) -> None:
    """The same bits from 1e-12 to 1e4: a power of two goes through codes, scales, roots and quotients unchanged."""
    one = studies.moved(state, 1.0, 8)
    assert float(one.abs().min()) > 0.0
    for size in (1e-12, 1e-6, 1e4):
        assert torch.equal(studies.moved(state, studies.nearest_power(size), 8), one), size


def test_half_precision_does_not_hold_every_size() -> None:
    """Neither as state nor as scales: what low_precision.md warns of."""
    assert not any(row["same bits"] for row in studies.magnitudes("float16", 8) if not 1e-2 < row["magnitude"] < 1e2)
    errors = {row["magnitude"]: row["error"] for row in studies.half_scales(8)}
    assert errors[1e-12] == errors[1e-10] == 1.0 and errors[1.0] < 2.0**-11


@pytest.mark.filterwarnings(BF16_WARNING)
def test_the_final_loss_is_that_of_fp32() -> None:
    """Of the recommended formats, within five standard deviations of fp32's over noises; bf16's is not."""
    losses = [studies.closed("fp32", 300, seed)[0]["loss"] for seed in range(4)]
    spread = 5 * float(np.std(losses, ddof=1))
    for name in ("split16+float32", "split8+float32", "split8+int8"):
        assert abs(studies.closed(name, 300)[0]["loss"] - losses[0]) <= spread, name
    assert studies.closed("bf16", 300)[0]["loss"] > losses[0] + spread


def test_the_page_is_a_program() -> None:
    text = (Path(fusedopt.__file__).parent / "docs" / "low_precision.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    made: dict[str, Any] = {}
    exec(compile(blocks[0], "low_precision.md", "exec"), made)
    state = made["optimizer"].state
    moved = {key: state[p] for key, p in made["model"].named_parameters()}
    assert moved["0.weight"]["exp_avg_q"].dtype == torch.int8 and moved["0.weight"]["param_residual"].itemsize == 1
    assert moved["2.weight"]["exp_avg"].dtype == torch.float32  # fewer than 4096 elements
    exec(compile(blocks[1], "low_precision.md", "exec"), made)


@pytest.mark.filterwarnings(BF16_WARNING)
def test_the_tables(tmp_path: Path) -> None:
    """Made of rows as they are read back, put between the markers, other text left alone."""
    options = Namespace(studies=list(studies.STUDIES), steps=2, short=1, workers=2)
    wanted = {"fp32", "split8+int8", "split8", "int8", "AdamW"}
    rows = [drift.header(options)]
    for study, arguments in drift.jobs(options):
        if study == "follow":
            rows += studies.follow([name for name in arguments[0] if name in wanted], 2)
        elif study == "half scales" or set(map(str, arguments)) & (wanted - {"AdamW"}):
            rows += studies.STUDIES[study](*arguments)
    text = drift.show(json.loads(json.dumps(rows)))
    assert text.count("| split8+int8 | 5.09 |") == 1 and text.count("| AdamW | split8 |") == 1
    assert text.count("| int8 |") == 1 and "fp32 under 4 noises" in text and rows[0]["commit"] in text
    notes = tmp_path / "drift.md"
    drift.write(notes, "first")
    notes.write_text(notes.read_text() + "\nconclusions\n")
    drift.write(notes, text)
    assert notes.read_text().endswith("conclusions\n") and "first" not in notes.read_text()
