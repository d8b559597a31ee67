"""`fusedopt inspect` counts what kernels do, by two methods that agree in every byte and see one load too many."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from lamb_like import LambLike
from table import private

from fusedopt import layout
from fusedopt.inspect import compiled, counts, interpreted
from fusedopt.inspect.subject import CASES, Configuration, Subject, build, record
from fusedopt_kernels import launch, memory

ADAMW = Configuration("adamw", {})
MIXED = Configuration("sgd", {"momentum": 0.9, "nesterov": True}, "float32", "bfloat16")

# Per parameter: loaded, stored.
TRAFFIC = (
    (ADAMW, 16.0, 12.0),
    (Configuration("adam", {"amsgrad": True, "weight_decay": 0.1}, "bfloat16", "bfloat16"), 10.0, 8.0),
    (Configuration("sgd", {}, "float16", "float16"), 4.0, 2.0),
    (Configuration("adam", {}, "float64", "float64"), 32.0, 24.0),
    (MIXED, 10.0, 8.0),
)


@pytest.fixture(autouse=True)
def nothing_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built here must not use up warnings that other tests wait for."""
    monkeypatch.setattr(layout, "_announced", set())


def update_kernel(subject: Subject, arch: str = "sm_90") -> counts.Kernel:
    return compiled.inspect_kernel(subject, record(subject)[-1], arch)


def per_param(kernel: counts.Kernel) -> dict[str, tuple[float, float]]:
    return {n: (c.total("load") / c.elements, c.total("store") / c.elements) for n, c in kernel.cases.items()}


# ----------------------------------------------------------------------------------------------------- compiled
@pytest.mark.compiled
def test_adamw_moves_28_bytes_per_parameter_and_spills_nothing() -> None:
    inspection = compiled.inspect(ADAMW, "sm_90")
    assert inspection.launches == {"3": 2, "24": 2}
    assert [kernel.name for kernel in inspection.kernels] == ["adamw_scalars", "adamw"]
    kernel = inspection.kernels[-1]
    assert per_param(kernel) == dict.fromkeys(CASES, (16.0, 12.0))
    assert kernel.cases["full"].bytes_per_param == 28.0
    assert kernel.stack == kernel.spill_instructions == 0
    assert all(case.spills == 0 for case in kernel.cases.values())
    full = kernel.cases["full"]
    assert {width for accesses in full.widths.values() for kind in accesses.values() for width in kind} == {"16"}
    assert full.sector_use == 1.0
    assert kernel.cases["unaligned"].sector_use > 0.9  # coalesced: neighbours share sectors, some at each end are split
    assert 0 < full.table_bytes < 0.01 * full.elements
    assert 20 < full.instructions_per_element < kernel.cases["unaligned"].instructions_per_element < 80
    assert counts.Inspection.from_json(json.loads(json.dumps(inspection.as_json()))) == inspection


@pytest.mark.compiled
@pytest.mark.parametrize(
    ("arch", "row"), [("sm_80", TRAFFIC[4]), ("sm_100", TRAFFIC[1]), ("sm_90", TRAFFIC[2]), ("sm_90", TRAFFIC[3])]
)
def test_bytes_are_those_of_the_formats(arch: str, row: tuple[Configuration, float, float]) -> None:
    configuration, loaded, stored = row
    assert per_param(update_kernel(build(configuration), arch)) == dict.fromkeys(CASES, (loaded, stored))


@pytest.mark.compiled
def test_split_weights_and_a_norm_are_counted() -> None:
    subject = build(Configuration("adamw", {}, "bfloat16", "bfloat16"))
    private(subject.optimizer, clip_grad_norm=1.0, master_weights="split16")
    kernels = [compiled.inspect_kernel(subject, launched, "sm_90") for launched in record(subject)]
    assert [kernel.name for kernel in kernels] == ["norm", "adamw_scalars", "adamw"]
    assert per_param(kernels[0]) == dict.fromkeys(CASES, (2.0, 0.0))
    assert per_param(kernels[2]) == dict.fromkeys(CASES, (14.0, 12.0))
    assert kernels[2].cases["full"].bytes["param_residual"] == {"load": 2 * 16384, "store": 2 * 16384}


@pytest.mark.compiled
def test_both_passes_of_a_rule_with_norms_are_counted() -> None:
    subject = build(ADAMW)
    subject.optimizer = LambLike(subject.params, backend="triton")
    measured = [compiled.inspect_kernel(subject, launched, "sm_90") for launched in record(subject)]
    assert [per_param(k)["full"] for k in measured if k.cases] == [(16.0, 0.0), (16.0, 12.0)]


@pytest.mark.compiled
def test_amd_kernels_are_read() -> None:
    kernel = update_kernel(build(ADAMW), "gfx942")
    assert kernel.registers > 16 and kernel.spill_instructions == 0 and kernel.stack == 0
    assert not kernel.cases
    assert {"load 128": 4, "store 128": 3}.items() <= kernel.static_widths.items()


# ----------------------------------------------------------------------------------------------- one load too many
@triton.jit
def load_neighbours_too(values, scales, at, T: tl.constexpr, COMPUTE: tl.constexpr, FULL: tl.constexpr):
    """The state, and on the way of aligned full chunks once more that of another thread's elements."""
    x = memory.load(values, at, T, COMPUTE, FULL)
    if FULL:
        x += memory.load(values, (at[0], at[1] ^ 64, at[2]), T, COMPUTE, FULL)
    return x


def with_one_more_load(spec: launch.KernelSpec) -> launch.KernelSpec:
    """An update kernel whose first state is loaded twice."""
    (_, *rest), *others = spec.constants["STATES"]
    states = ((load_neighbours_too, *rest), *others)
    changed = {"STATES": states, "SOURCES": getattr(load_neighbours_too, "cache_key", "")}
    return dataclasses.replace(spec, items=tuple((name, changed.get(name, value)) for name, value in spec.items))


@pytest.mark.compiled
def test_the_command_checks_itself_and_would_see_one_load_more() -> None:
    command = [sys.executable, "-m", "fusedopt.cli", "inspect", "adamw", "--params", "1e9", "--bandwidth", "2e12"]
    done = subprocess.run([*command, "--check", "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["check"] == {"agrees": True, "differences": []}
    assert report["kernels"][-1]["cases"]["full"]["bytes_per_param"] == 28.0
    assert report["roofline"]["predicted"] is True
    assert report["roofline"]["memory_seconds"] == pytest.approx(14e-3)

    subject = build(ADAMW)
    spec, grid, arguments = record(subject)[-1]
    broken = compiled.inspect_kernel(subject, (with_one_more_load(spec), grid, arguments), "sm_90")
    found = {"adamw": {name: case.bytes for name, case in broken.cases.items()}}
    expected = {"adamw": {name: case["bytes"] for name, case in report["kernels"][-1]["cases"].items()}}
    assert counts.differences(("found", found), ("expected", expected)) == [
        "adamw full exp_avg load: 131072 bytes found, 65536 expected"
    ]


class BrokenLauncher(interpreted.CountingLauncher):
    def run(self, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
        super().run(with_one_more_load(spec) if "STATES" in spec.constants else spec, grid, args)


def totals(found: counts.Bytes, kernel: str) -> dict[str, tuple[float, float]]:
    def per_param(case: str, what: str) -> float:
        return sum(role.get(what, 0) for role in found[kernel][case].values()) / CASES[case][0]

    return {case: (per_param(case, "load"), per_param(case, "store")) for case in found[kernel]}


needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="counts interpreted kernels; runs in the interpreted tests"
)


@needs_interpreter
@pytest.mark.parametrize("row", TRAFFIC, ids=lambda row: f"{row[0].rule}-{row[0].param_dtype}")
def test_interpreted_bytes_are_those_of_the_formats(row: tuple[Configuration, float, float]) -> None:
    configuration, loaded, stored = row
    assert totals(interpreted.count(configuration), configuration.rule) == dict.fromkeys(CASES, (loaded, stored))


@needs_interpreter
def test_the_interpreter_sees_one_load_more() -> None:
    found = totals(interpreted.count_step(build(ADAMW), BrokenLauncher()), "adamw")
    assert found == {"full": (20.0, 12.0), "unaligned": (16.0, 12.0), "tail": (16.0, 12.0)}
