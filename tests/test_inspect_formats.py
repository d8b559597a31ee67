"""`fusedopt inspect` on formats of weights and state: bytes, widths, and the budget of instructions."""

import dataclasses
import math
from typing import Any

import pytest
import triton
import triton.language as tl
from test_inspect import needs_interpreter, nothing_announced, per_param
from test_inspect_around import inspect

from fusedopt.formats import NONNEGATIVE, SIGNED
from fusedopt.inspect import compiled, counts, interpreted, subject
from fusedopt.inspect.subject import CASES, GROUPED, Configuration, build, kernel_name, record, shapes
from fusedopt_kernels.state.int8 import load_int8

__all__ = ["nothing_announced"]  # a fixture that every test here uses


def adamw(**arguments: Any) -> Configuration:
    return Configuration("adamw", arguments, "bfloat16", "bfloat16")


def moments(name: str) -> float:
    """Bytes per element of both moments of AdamW, in rows of whole groups."""
    return SIGNED[name].bytes_per_element + NONNEGATIVE[name].bytes_per_element


SPLIT8_INT8 = adamw(master_weights="split8", state_dtype="int8")
NEAREST = adamw(master_weights="split8", state_dtype="int8", master_rounding="nearest")
RANDOM_STATE = adamw(master_weights="split8", state_dtype="int8", state_rounding="stochastic")
INT4 = adamw(master_weights="split8", state_dtype="int4")
FLOAT8 = adamw(master_weights="split8", state_dtype="float8")

# What is kept per parameter: weight and what belongs beside it; moments. Weight 0 of a copy: it is only written.
TRAFFIC: tuple[tuple[Configuration, float, float], ...] = (
    (SPLIT8_INT8, 3.0, moments("int8")),
    (INT4, 3.0, moments("int4")),
    (FLOAT8, 3.0, moments("float8_e4m3")),
    (adamw(master_weights="stochastic", state_dtype="int8"), 2.0, moments("int8")),
    (adamw(master_weights="kahan", state_dtype={"exp_avg": "bfloat16", "exp_avg_sq": "int8"}), 4.0, 2.0 + 1.03125),
    (adamw(master_weights="split16", state_dtype="bfloat16"), 4.0, 4.0),
    (adamw(master_weights="float32", state_dtype="int8"), 6.0, moments("int8")),
    (Configuration("sgd", {"momentum": 0.9, "state_dtype": "int8"}, "float32", "float32"), 4.0, 1.0625),
)
TABLE = {"split8-int8": 12.1875, "split8-int4": 10.1875, "stochastic-int8": 10.1875, "split16-bfloat16": 18.0}
"""Bytes moved per parameter by AdamW, as they are planned."""


def name(row: tuple[Configuration, Any, Any]) -> str:
    """Of a row that begins with a configuration."""
    return "-".join([row[0].rule, *(str(x) for x in row[0].arguments.values())])


def expected(configuration: Configuration, weight: float, state: float) -> tuple[float, float]:
    """Loaded and stored per parameter. Of a weight with an fp32 copy, the copy alone is loaded."""
    copied = configuration.arguments.get("master_weights") == "float32"
    gradient = 2.0 if configuration.grad_dtype == "bfloat16" else 4.0
    return gradient + weight - 2.0 * copied + state, weight + state


def test_the_table_of_planned_bytes_is_what_the_formats_say() -> None:
    found = {}
    for row in TRAFFIC:
        weights, state = (row[0].arguments.get(key) for key in ("master_weights", "state_dtype"))
        found[f"{weights}-{state}"] = sum(expected(*row))
    assert TABLE.items() <= found.items()


@pytest.mark.parametrize(
    ("configuration", "quantised"),
    [
        (SPLIT8_INT8, True),
        (adamw(state_dtype={"exp_avg_sq": "uint8"}), True),
        (adamw(state_dtype="bfloat16"), False),
        (adamw(), False),
        (Configuration("asgd", {"state_dtype": "int8"}), False),
        (Configuration("adamw", {"state_dtype": "int8"}, "float64", "float64"), False),
    ],
)
def test_groups_get_parameters_that_hold_them(configuration: Configuration, quantised: bool) -> None:
    assert (shapes(configuration) is GROUPED) == quantised
    assert tuple(shapes(configuration)) == (tuple(GROUPED) if quantised else tuple(CASES))


# ----------------------------------------------------------------------------------------------------- compiled
def update(configuration: Configuration, arch: str = "sm_90", ragged: bool = False) -> counts.Kernel:
    """The update kernel, of rows of whole groups or of others."""
    built = build(configuration)
    wanted = configuration.rule + ("_ragged" if ragged else "")
    return next(
        compiled.inspect_kernel(built, launched, arch)
        for launched in record(built)
        if kernel_name(launched[0]) == wanted
    )


def bits(kernel: counts.Kernel) -> dict[str, set[int]]:
    """Bits of a thread's accesses to every role in an aligned full chunk."""
    widths = kernel.cases["full"].widths
    return {role: {8 * int(n) for kinds in accesses.values() for n in kinds} for role, accesses in widths.items()}


def check_code(kernel: counts.Kernel) -> None:
    """No spills anywhere; nothing waits in aligned full chunks."""
    full = kernel.cases["full"]
    assert kernel.stack == kernel.spill_instructions == 0
    assert full.spills == full.barriers == full.shared == 0


# Configuration, most instructions per element of an aligned full chunk, most registers; perf/notes/low_precision.md.
BUDGETS = (
    (NEAREST, 60.0, 80),
    (SPLIT8_INT8, 75.0, 96),
    pytest.param((RANDOM_STATE, 86.0, 104), marks=pytest.mark.long),
    pytest.param((INT4, 73.0, 88), marks=pytest.mark.long),
    pytest.param((FLOAT8, 95.0, 80), marks=pytest.mark.long),
)


@pytest.fixture
def full_chunks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other cases take three quarters of the time."""
    monkeypatch.setattr(subject, "GROUPED", {"full": GROUPED["full"]})


@pytest.mark.compiled
@pytest.mark.parametrize("row", BUDGETS, ids=name)
def test_instructions_stay_within_the_budget(row: tuple[Configuration, float, int], full_chunks_alone: None) -> None:
    configuration, instructions, registers = row
    kernel = update(configuration)
    check_code(kernel)
    assert 40 < kernel.cases["full"].instructions_per_element <= instructions
    assert kernel.registers <= registers


WIDTHS = {
    "grad": {128}, "param": {128}, "param_residual": {64}, "exp_avg_q": {64}, "exp_avg_sq_q": {64},
    "exp_avg_scale": {32}, "exp_avg_sq_scale": {16},
}  # fmt: skip


@pytest.mark.compiled
@pytest.mark.parametrize(
    "row",
    [
        ("sm_90", SPLIT8_INT8, {}),
        ("sm_90", INT4, {"exp_avg_q": {32}, "exp_avg_sq_q": {32}}),
        pytest.param(("sm_80", SPLIT8_INT8, {}), marks=pytest.mark.long),
        pytest.param(("sm_100", SPLIT8_INT8, {}), marks=pytest.mark.long),
    ],
    ids=lambda row: f"{row[0]}-{row[1].arguments['state_dtype']}",
)
def test_full_chunks_move_what_is_planned_by_wide_accesses(
    row: tuple[str, Configuration, dict[str, set[int]]], full_chunks_alone: None
) -> None:
    arch, configuration, others = row
    kernel = update(configuration, arch)
    check_code(kernel)
    kept = 3.0 + moments(configuration.arguments["state_dtype"])
    assert per_param(kernel) == {"full": (2.0 + kept, kept)}
    assert bits(kernel) == {**WIDTHS, **others}
    assert kernel.cases["full"].sector_use > 0.95  # scales use a part of theirs
    assert 0 < kernel.cases["full"].table_bytes < 0.01 * kernel.cases["full"].elements


@pytest.mark.compiled
def test_rows_of_no_whole_groups_have_a_kernel_of_their_own() -> None:
    kernel = update(NEAREST, ragged=True)
    assert kernel.name == "adamw_ragged" and list(kernel.cases) == ["ragged"]
    assert kernel.stack == kernel.spill_instructions == 0
    scales = (4 + 2) * 2 / 100  # two groups in a row of 100
    case = kernel.cases["ragged"]
    assert case.total("load") / case.elements == pytest.approx(7 + scales)
    assert case.total("store") / case.elements == pytest.approx(5 + scales)


@triton.jit
def load_neighbours_too(values, scales, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    """Codes and, on the way of aligned full chunks, once more those of another thread."""
    x = load_int8(values, scales, at, T, COMPUTE, FULL)
    if FULL:
        x += load_int8(values, scales, (at[0], at[1] ^ 64, at[2], at[3], at[4], at[5]), T, COMPUTE, FULL)
    return x


@pytest.mark.compiled
def test_one_more_load_of_codes_would_be_seen(full_chunks_alone: None) -> None:
    built = build(NEAREST)
    spec, grid, arguments = next(launched for launched in record(built) if launched[0].name == "adamw")
    (_, *rest), *others = spec.constants["STATES"]
    states = ((load_neighbours_too, *rest), *others)
    changed: dict[str, Any] = {"STATES": states, "SOURCES": getattr(load_neighbours_too, "cache_key", "")}
    broken = dataclasses.replace(spec, items=tuple((key, changed.get(key, value)) for key, value in spec.items))
    full = compiled.inspect_kernel(built, (broken, grid, arguments), "sm_90").cases["full"]
    assert full.bytes["exp_avg_q"] == {"load": 2 * 16384, "store": 16384}
    assert full.total("load") / full.elements == expected(*TRAFFIC[0])[0] + 1.0


@pytest.mark.compiled
def test_the_command_reports_split8_and_int8() -> None:
    dtypes = ("--param-dtype", "bfloat16", "--grad-dtype", "bfloat16")
    report = inspect("adamw", *dtypes, "--master-weights", "split8", "--state-dtype", "int8")
    assert report["check"] == {"agrees": True, "differences": []}
    assert report["launches"] == {"3": 2, "24": 2}
    assert report["roofline"]["bytes_per_param"] == 12.1875
    assert sum(report["resident"].values()) == 7.09375
    assert [kernel["name"] for kernel in report["kernels"]] == ["adamw_scalars", "adamw", "adamw_ragged"]


# -------------------------------------------------------------------------------------------------- interpreted
@needs_interpreter
@pytest.mark.parametrize(
    "row",
    [TRAFFIC[1], *(pytest.param(row, marks=pytest.mark.long) for row in TRAFFIC if row is not TRAFFIC[1])],
    ids=name,
)
def test_interpreted_bytes_are_those_of_the_formats(row: tuple[Configuration, float, float]) -> None:
    configuration = row[0]
    found = interpreted.count(configuration)[configuration.rule]
    for case in CASES:
        elements = math.prod(shapes(configuration)[case][0])
        moved = tuple(sum(role.get(what, 0) for role in found[case].values()) for what in ("load", "store"))
        assert tuple(n / elements for n in moved) == expected(*row), case
