"""`fusedopt inspect` on what surrounds the update: unscaling, clipping, averages, metrics. What is not asked for costs
nothing, and both methods count the same bytes.
"""

import json
import subprocess
import sys
from typing import Any

import pytest
from test_inspect import ADAMW, needs_interpreter, nothing_announced, per_param, totals

from fusedopt.inspect import compiled, counts, interpreted
from fusedopt.inspect.subject import CASES, Configuration, build

__all__ = ["nothing_announced"]  # a fixture that every test here uses

CAUTIOUS = Configuration("adamw", {"cautious": True})
AROUND = (
    (Configuration("adamw", {}, amp=True), 3, {"norm": (4.0, 0.0), "adamw": (16.0, 12.0)}),
    (Configuration("adamw", {"clip_grad_norm": 1.0}, amp=True), 3, {"norm": (4.0, 0.0), "adamw": (16.0, 12.0)}),
    (Configuration("adamw", {"ema_decay": 0.999}), 2, {"adamw": (20.0, 16.0)}),
    (Configuration("adamw", {"ema_decay": 0.999}, "bfloat16", "bfloat16"), 2, {"adamw": (12.0, 10.0)}),
    (Configuration("adamw", {"metrics": ("update_ratio",)}), 2, {"adamw": (16.0, 12.0)}),
    (Configuration("adamw", {"metrics": ("grad_norm",)}), 3, {"norm": (4.0, 0.0), "adamw": (16.0, 12.0)}),
    (Configuration("adamw", {"clip_grad_norm": 1.0, "norm_at_backward": True}), 2, {"adamw": (16.0, 12.0)}),
    (CAUTIOUS, 3, {"adamw_measure": (12.0, 0.0), "adamw": (16.0, 12.0)}),
)
"""Configuration, launches of a step, and for each kernel the bytes loaded and stored per parameter."""


def name(row: tuple[Configuration, int, Any]) -> str:
    return "-".join([*row[0].arguments, row[0].param_dtype, *(["amp"] if row[0].amp else [])])


def counted(inspection: counts.Inspection) -> dict[str, dict[str, tuple[float, float]]]:
    return {kernel.name: per_param(kernel) for kernel in inspection.kernels if kernel.cases}


def in_every_case(kernels: dict[str, tuple[float, float]]) -> dict[str, dict[str, tuple[float, float]]]:
    return {name: dict.fromkeys(CASES, traffic) for name, traffic in kernels.items()}


@pytest.mark.compiled
@pytest.mark.parametrize("row", AROUND, ids=name)
def test_compiled_bytes_and_launches(row: tuple[Configuration, int, dict[str, tuple[float, float]]]) -> None:
    configuration, launches, kernels = row
    inspection = compiled.inspect(configuration, "sm_90")
    assert inspection.launches == {"3": launches, "24": launches}
    assert counted(inspection) == in_every_case(kernels)
    assert all(k.stack == k.spill_instructions == 0 for k in inspection.kernels if k.cases)


@pytest.mark.compiled
def test_metrics_store_a_pair_of_sums_per_chunk_and_nothing_else() -> None:
    """And without them the update kernel stores nothing into tables at all."""
    without, measured = (
        compiled.inspect(Configuration("adamw", arguments), "sm_90").kernels[-1]
        for arguments in ({}, {"metrics": ("param_norm", "update_norm")})
    )
    for name in CASES:
        assert (without.cases[name].table_stored, measured.cases[name].table_stored) == (0, 16)
        assert measured.cases[name].bytes == without.cases[name].bytes


@needs_interpreter
@pytest.mark.parametrize("row", AROUND, ids=name)
def test_interpreted_bytes(row: tuple[Configuration, int, dict[str, tuple[float, float]]]) -> None:
    configuration, _, kernels = row
    found = interpreted.count(configuration)
    assert {name: totals(found, name) for name in found} == in_every_case(kernels)


@needs_interpreter
def test_a_load_counts_only_if_something_stored_depends_on_it() -> None:
    """The first pass of a cautious AdamW loads the parameter, and nothing that it stores comes from there."""
    found = interpreted.count(CAUTIOUS)
    assert all("param" not in roles for roles in found["adamw_measure"].values())
    assert all(roles["param"]["load"] for roles in found["adamw"].values())
    launcher = interpreted.CountingLauncher()
    interpreted.count_step(build(ADAMW), launcher)
    heard = launcher.listeners["adamw"]
    unused = [access for i, access in enumerate(heard.accesses) if i not in heard.needed]
    assert unused and all(access.what == "load" and len(access.addresses) == 1 for access in unused)  # of tables


def inspect(*options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "fusedopt.cli", "inspect", *options, "--check", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.compiled
def test_clipped_adamw_under_a_grad_scaler_moves_32_bytes_in_three_launches() -> None:
    report = inspect("adamw", "--clip", "1.0", "--amp")
    assert report["launches"] == {"3": 3, "24": 3}
    assert report["roofline"]["bytes_per_param"] == 32.0
    assert report["check"] == {"agrees": True, "differences": []}


@pytest.mark.compiled
def test_everything_at_once_agrees_with_the_interpreter() -> None:
    """4 of the norm, 12 and 28 of a cautious step, 8 of the average."""
    options = ("--clip", "1.0", "--amp", "--ema", "0.999", "--metrics", "grad_norm,update_ratio", "--cautious")
    report = inspect("adamw", *options)
    assert report["launches"] == {"3": 4, "24": 4}
    assert report["roofline"]["bytes_per_param"] == 4.0 + 12.0 + 28.0 + 8.0
    assert report["check"] == {"agrees": True, "differences": []}
