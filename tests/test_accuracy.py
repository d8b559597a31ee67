"""`fusedopt verify`: green on every rule and dtype, red when an update, a bit or a process is wrong."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
import torch

import fusedopt
from fusedopt import cli
from fusedopt.rules import RULES
from fusedopt.verify import backends, check, formats, measure, problem, subjects
from fusedopt.verify.check import Row, verify
from fusedopt.verify.formats import DTYPES
from fusedopt.verify.measure import Error
from fusedopt.verify.oracles import ORACLES
from fusedopt.verify.problem import SEEDS, TIMES, build, cells, configuration
from fusedopt.verify.report import complaints
from tests.tolerances import TOLERANCES

ALL_CELLS = cells(ORACLES, DTYPES)
INTERPRETED_CELLS = [
    *((configuration("adamw", "plain"), dtype) for dtype in DTYPES),
    (configuration("adam", "amsgrad"), "float32"),
    (configuration("adam", "weight decay"), "bfloat16"),
    (configuration("sgd", "nesterov"), "float32"),
    (configuration("asgd", "averaging"), "float64"),
    (configuration("lamb", "weight decay"), "float32"),
    (configuration("nadam", "plain"), "bfloat16"),
    (configuration("rmsprop", "centered momentum"), "float32"),
    (configuration("sparse_adam", "plain"), "float32"),
]


def run_cli(capsys, *args) -> tuple[Any, str, str]:
    """Exit status, stdout and stderr of `fusedopt verify`."""
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify", *args])
    return stop.value.code, *capsys.readouterr()


def patch_update(monkeypatch, cls, change):
    """Put ``change(delta, new_state)`` behind the eager twin of a class's update."""
    rule = cls.rule

    def broken(*args):
        return change(*rule.update_eager(*args))

    monkeypatch.setattr(cls, "rule", dataclasses.replace(rule, update_eager=broken))


@pytest.mark.parametrize("longest", [2051, pytest.param(problem.MANY_CHUNKS[0], marks=pytest.mark.long)])
def test_eager_is_within_the_derived_bounds_for_every_rule_and_dtype(longest, monkeypatch):
    """longest: elements of the largest tensor. More than a chunk is half of the time, and matters to norms alone."""
    monkeypatch.setattr(problem, "MANY_CHUNKS", (longest,))
    report = verify(ALL_CELLS, ["eager"], SEEDS[:1])
    assert complaints(report) == []
    assert {(row.configuration, row.dtype) for row in report.rows} == set(ALL_CELLS)
    for row in report.rows:  # stricter than `verify`, which also takes torch's maximum
        assert row.error.largest <= row.bound, row
        one_number = row.slot in ORACLES[row.configuration.rule].scalars
        assert row.error.count >= (len(TIMES) * 3 if one_number else 1500), row


def test_interpreted_kernels_are_within_bounds_and_equal_eager_in_every_bit():
    report = verify(INTERPRETED_CELLS, ["eager", "interpreted"], SEEDS[1:2])
    assert complaints(report) == []
    assert report.equal == {"interpreted": len(INTERPRETED_CELLS)}


@pytest.mark.gpu
def test_compiled_kernels_are_within_bounds_and_equal_eager_in_every_bit():
    report = verify(ALL_CELLS, ["eager", "compiled"], SEEDS[:1])
    assert complaints(report) == []
    assert report.equal == {"compiled": len(ALL_CELLS)}


@pytest.mark.parametrize(
    ("change", "slot"),
    [
        (lambda delta, new: (delta * (1 + 1e-6), new), "param"),
        (lambda delta, new: (delta, (new[0] * (1 + 1e-6), *new[1:])), "exp_avg"),
        (lambda delta, new: (delta, (new[0], new[1] * (1 + 1e-6))), "exp_avg_sq"),
    ],
    ids=["delta", "exp_avg", "exp_avg_sq"],
)
def test_an_update_wrong_by_a_millionth_turns_verify_red(change, slot, monkeypatch, capsys):
    patch_update(monkeypatch, fusedopt.AdamW, change)
    status, output, _ = run_cli(capsys, "--rule", "adamw", "--dtype", "float32", "--backend", "eager", "--json")
    report = json.loads(output)
    assert status == 1 and not report["passed"]
    assert {row["value"] for row in report["rows"] if not row["passed"]} == {slot}


@pytest.mark.parametrize("name", [name for name in ORACLES if name not in ("adafactor", "muon")])  # no twin to patch
def test_every_value_of_every_rule_turns_red_when_it_is_off_by_a_few_hundred_ulps(name, monkeypatch):
    def change(delta, new):
        return delta * (1 + 2e-5), tuple(x * (1 + 2e-5) for x in new)

    patch_update(monkeypatch, getattr(fusedopt, RULES[name]), change)
    oracle = ORACLES[name]
    report = verify([(oracle.configurations[0], "float32")], ["eager"], SEEDS[:1])
    red = {row.slot for row in report.rows if row.problems}
    assert red == {row.slot for row in report.rows} - set(oracle.scalars)


def test_the_table_names_what_is_broken(monkeypatch, capsys):
    patch_update(monkeypatch, fusedopt.SGD, lambda delta, new: (delta * 1.001, new))
    status, output, _ = run_cli(capsys, "--rule", "sgd", "--dtype", "float64", "--backend", "eager")
    assert status == 1
    assert "BROKEN" in output and "sgd (plain) float64 eager, param: maximum" in output and "FAILED" in output


def test_an_update_that_raises_turns_verify_red_and_leaves_the_other_cells(monkeypatch, capsys):
    def fail(delta, new):
        raise ArithmeticError("no update today")

    patch_update(monkeypatch, fusedopt.SGD, fail)
    status, output, _ = run_cli(capsys, "--rule", "sgd", "--rule", "adamw", "--dtype", "float32", "--backend", "eager")
    assert status == 1
    assert "sgd (plain) float32 eager: ArithmeticError: no update today" in output
    assert "7 of 7 rows within bounds, 5 cells failed" in output  # AdamW's


def test_a_worker_that_dies_turns_verify_red(monkeypatch):
    monkeypatch.setattr(backends.sys, "executable", "/bin/false")
    report = verify(INTERPRETED_CELLS[:1], ["interpreted"], SEEDS[:1])
    assert not report.passed
    assert "ended with status 1" in complaints(report)[0]


def test_green_report_says_what_ran_and_what_did_not(capsys):
    options = ("--rule", "sgd", "--dtype", "float16", "--backend", "eager")
    status, output, errors = run_cli(capsys, *options)
    assert (status, errors) == (0, "")
    assert "PASSED: 8 of 8 rows within bounds, 0 cells failed, 0 differ in bits; seeds 11" in output
    assert "eager        ran: the eager twins in torch" in output
    assert "interpreted  not run: not asked for" in output
    assert torch.cuda.is_available() or "compiled on a GPU: not run, no GPU here" in output

    status, output, errors = run_cli(capsys, *options, "--json", "--seeds", "2")
    report = json.loads(output)
    assert (status, errors, report["passed"], report["seeds"]) == (0, "", True, list(SEEDS[:2]))
    row = report["rows"][0]
    assert (row["rule"], row["configuration"], row["dtype"], row["value"]) == ("sgd", "plain", "float16", "param")
    assert row["max"] <= row["limit_max"] and row["rms"] <= row["limit_rms"]
    assert set(row["torch"]) == {"for-loop", "foreach", "fused"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rule", "adamv"], "unknown rule 'adamv'; did you mean 'adam"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--backend", "cuda"], "unknown backend 'cuda'; known: eager, interpreted, compiled"),
        (["--seeds", "0"], "--seeds must be between 1 and 10, not 0"),
        (["--seeds", "many"], "'many' is not a valid integer"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args, message, capsys):
    status, output, errors = run_cli(capsys, *args)
    assert (status, output) == (2, "")
    assert message in errors and errors.count("\n") == 1


def test_a_dtype_without_a_longer_reference_is_named_as_not_run(monkeypatch, capsys):
    monkeypatch.setattr(formats, "has_reference", lambda dtype: dtype.name != "float64")
    options = ("--rule", "sgd", "--backend", "eager")
    status, output, _ = run_cli(capsys, *options, "--dtype", "float64", "--dtype", "float32")
    assert status == 0
    assert "float64      not run: NumPy's longdouble is too short for a reference" in output
    assert run_cli(capsys, *options, "--dtype", "float64")[0] == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what only a machine without a GPU refuses")
def test_asking_for_a_gpu_that_is_not_there_is_bad_input(capsys):
    assert run_cli(capsys, "--backend", "compiled")[0] == 2


def test_first_difference_sees_one_bit_and_the_sign_of_zero():
    problem = build(configuration("sgd", "momentum"), "float32", 1)
    left = subjects.run(subjects.torch_subject(problem.configuration, "for-loop"), problem)
    assert measure.first_difference(1, left, left) is None
    right = [{slot: [x.copy() for x in tensors] for slot, tensors in step.items()} for step in left]
    right[3]["param"][2].ravel()[77] = np.nextafter(left[3]["param"][2].ravel()[77], np.float32(9))
    difference = measure.first_difference(1, left, right)
    assert difference is not None and difference.count == 1
    assert (difference.t, difference.slot, difference.tensor, difference.element) == (30, "param", 2, 77)
    left[0]["param"][0][...], right[0]["param"][0][...] = 0.0, -0.0
    difference = measure.first_difference(1, left, right)
    assert difference is not None and (difference.count, difference.t) == (2, 1)


def test_what_is_infinite_on_one_side_only_never_passes():
    dtype = DTYPES["float32"]
    exact = ORACLES["sgd"].run(configuration("sgd", "plain"), 1, np.ones(4), np.zeros(4), {})["param"]
    error = Error()
    error.add(measure.ulps(np.array([1, np.inf, np.nan, 1 + 2.0**-23], np.float32), exact, dtype))
    assert (error.broken, error.count, error.largest, error.rms) == (2, 2, 1.0, 0.5**0.5)
    row = Row(configuration("sgd", "plain"), "float32", "eager", "param", error, {}, bound=3.0)
    assert row.rms_limit is None and row.problems == ["2 elements are infinite or NaN on one side only"]


def test_a_torch_form_that_is_simply_wrong_is_no_yardstick():
    good, wrong = Error(2.0, 100, 4.0), Error(255.0, 100, 1e6)
    row = Row(
        configuration("sgd", "plain"), "bfloat16", "eager", "param", Error(200.0, 100, 1e5),
        {"for-loop": good, "fused": wrong}, bound=2.0,
    )  # fmt: skip
    assert row.yardsticks == [good] and row.limit == 2.0
    assert len(row.problems) == 2


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_long_run_drifts_no_further_than_torch_s(name):
    config = configuration(name, "plain" if name == "adamw" else "nesterov")
    subjects_to_run = {"ours": subjects.fusedopt_subject(config, "eager")}
    for form in subjects.TORCH_FORMS:
        subjects_to_run[form] = subjects.torch_subject(config, form)
    rng = np.random.default_rng(8)
    start = rng.standard_normal(2000).astype(np.float32)
    params = {key: torch.from_numpy(start.copy()).requires_grad_() for key in subjects_to_run}
    optimizers = {key: make([params[key]]) for key, make in subjects_to_run.items()}
    exact, state = start.astype(np.float64), {}
    for t in range(1, 301):
        g = rng.standard_normal(2000).astype(np.float32) + np.float32(0.3)
        new = ORACLES[name].run(config, t, exact, g.astype(np.float64), state)
        state = {key: value.exact for key, value in new.items()}
        exact = state.pop("param")
        for key, optimizer in optimizers.items():
            params[key].grad = torch.from_numpy(g)
            optimizer.step()
    drift = {key: float(np.sqrt(np.mean((p.detach().double().numpy() - exact) ** 2))) for key, p in params.items()}
    ours = drift.pop("ours")
    assert 0 < ours <= TOLERANCES["long run"].value * max(drift.values())


def test_torch_columns_cover_the_three_forms():
    errors = check._torch_errors([build(configuration("adam", "plain"), "complex64", 1)])
    assert set(errors) == {"for-loop", "foreach"}  # fused takes no complex parameters
    assert subjects.torch_forms("nadam") == ["for-loop", "foreach"]
    assert subjects.torch_forms("sparse_adam") == ["for-loop"]
    assert subjects.torch_forms("lamb") == []


def test_scalar_slots_are_fp32_whatever_the_parameters_are():
    problem = build(configuration("nadam", "plain"), "float64", 1)
    outcome = subjects.run(subjects.fusedopt_subject(problem.configuration, "eager"), problem)
    assert {x.dtype for step in outcome for x in step["mu_product"]} == {np.dtype(np.float32)}
    for before, after in zip(problem.steps, problem.steps[1:], strict=False):
        for expected, state in zip(before.expected, after.states, strict=True):
            assert state["mu_product"] == np.float32(expected["mu_product"].exact)
    errors = {}
    measure.measure(problem, outcome, errors)
    assert errors["mu_product"].largest == 0 and errors["mu_product"].count == len(outcome) * len(outcome[0]["param"])


def test_the_report_says_which_cells_were_left_out(capsys):
    rules = ("--rule", "sparse_adam", "--rule", "sgd")
    status, output, errors = run_cli(capsys, *rules, "--backend", "eager", "--json")
    report = json.loads(output)
    ran = {(row["rule"], row["configuration"], row["dtype"]) for row in report["rows"]}
    assert status == 0 and ("sgd", "plain", "complex64") in ran and ("sgd", "momentum", "float64") in ran
    assert ("sgd", "momentum", "complex64") not in ran and ("sparse_adam", "plain", "complex64") not in ran
    assert report["coverage"]["real only"] == "sparse_adam: no complex parameters"
    assert report["coverage"]["sampled"].startswith("float16, complex64, complex128: the first configuration")
    assert "verified" not in errors
    assert run_cli(capsys, "--rule", "sparse_adam", "--dtype", "complex64")[0] == 2


def test_norms_in_float64_are_not_compared_bit_for_bit():
    names = ["eager", "interpreted"]
    chosen = [(configuration("lamb", "plain"), dtype) for dtype in ("float32", "float64")]
    report = verify(chosen, names, SEEDS[:1])
    assert complaints(report) == [] and report.equal == {"interpreted": 1}
    assert report.uncompared == {(chosen[1], "interpreted")}
