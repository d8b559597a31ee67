"""`fusedopt verify --formats`: every rule in every format, red when a codec, a bit or a refusal is wrong."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from fusedopt import encoded, formats
from fusedopt.rules import RULES
from fusedopt.verify import kept, storage
from fusedopt.verify.kept_report import complaints
from fusedopt.verify.kept_verify import verify
from fusedopt.verify.oracles import ORACLES
from fusedopt.verify.problem import SEEDS
from fusedopt_kernels.state.int8 import INT8
from fusedopt_kernels.state.uint8 import UINT8
from tests.test_accuracy import run_cli

QUICK = [
    cell
    for cell in kept.cells(ORACLES, ("int8", "float8_e4m3", kept.BOTH, "kahan"))
    if not cell.kept.random or cell.kept.name == kept.BOTH
]
INTERPRETED = [
    kept.cell(rule, config, title)
    for rule, config, title in (
        ("adamw", "amsgrad", "int4, stochastic"),
        ("lamb", "plain", "int8"),
        ("muon", "plain", "float8_e5m2"),
        ("sgd", "momentum", "split8+int8, stochastic"),
        ("adafactor", "plain", "kahan"),
        ("sparse_adam", "plain", "uint8"),
        ("nadam", "plain", "float16, stochastic"),
        ("lion", "plain", "stochastic"),
    )
]


def test_every_rule_meets_every_format_that_the_library_has():
    assert set(formats.NAMES) == set(kept.STATE_NAMES)
    assert set(formats.WEIGHTS) == {*kept.WEIGHT_NAMES, "float32"} - {kept.MASTER, kept.BOTH} == set(storage.WEIGHTS)
    met = {(cell.configuration.rule, str(cell.kept)) for cell in kept.cells(ORACLES, kept.NAMES)}
    assert met == {(rule, title) for rule in RULES for title in kept.KEPT}
    for name in kept.STATE_NAMES[1:]:
        assert {way.random for way in kept.KEPT.values() if way.name == name} == {False, True}


def test_every_rule_stores_the_numbers_next_to_the_exact_ones():
    report = verify(QUICK, ["eager"], SEEDS[:1])
    assert complaints(report) == []
    seen = {cell for cell, _ in report.verdicts} | {*report.refused, *report.idle}
    assert seen == set(QUICK)
    assert {cell.configuration.rule for cell in report.refused} == {"adafactor", "rmsprop"}
    assert {cell.configuration.rule for cell in report.idle} == {"asgd", "schedule_free_sgd"}  # weights alone
    for (cell, _), verdict in report.verdicts.items():
        coded = any(name.endswith(", scales") for name in verdict.used)
        rule, weights_alone = cell.configuration.rule, ("asgd", "schedule_free_sgd")
        assert coded == (cell.kept.state is not None and rule not in weights_alone), cell


@pytest.mark.long
def test_every_rule_in_every_format_on_both_backends():
    cells = kept.cells(ORACLES, kept.NAMES)
    report = verify(cells, ["eager", "interpreted"], SEEDS[1:2])
    assert complaints(report) == []
    assert report.equal["interpreted"] == len(cells) - len(report.refused) - len(report.idle)


def test_interpreted_kernels_store_the_same_bits():
    report = verify(INTERPRETED, ["eager", "interpreted"], SEEDS[1:2])
    assert complaints(report) == []
    assert report.equal == {"interpreted": len(INTERPRETED)}


def scaled(form, factor):
    """Scales off by a factor, codes as they were."""

    def store(x, noise):
        codes, scales = form.store(x, noise)
        return codes, scales * factor

    return replace(form, store=store)


def shifted(form):
    """Bases of logarithmic codes one too high, and codes one lower where they can be."""

    def store(x, noise):
        codes, bases = form.store(x, noise)
        return codes.clamp(min=1) - 1, bases + 1

    return replace(form, store=store)


SPLIT8, SPLIT16, KAHAN = (formats.WEIGHTS[name] for name in ("split8", "split16", "kahan"))


def without_residual(x, param, residual, noise):
    param.copy_(x)
    residual.zero_()


def off_by_many_bits(x, param, residual, noise):
    SPLIT16.store(x, param, residual, noise)
    residual.bitwise_xor_(64)


def nearest_below(x, param, residual, noise):
    """Cut off instead of rounded."""
    bits = x.view(torch.int32) + 0x8000
    param.view(torch.int16).copy_(bits >> 16)
    residual.copy_((bits >> 8) & 0xFF)


BROKEN = {
    "scale": (formats.SIGNED, "int8", scaled(INT8, 1.01), "int8", "exp_avg, scales"),
    "load": (
        formats.SIGNED, "int8", replace(INT8, load=lambda codes, scales: INT8.load(codes, scales) * 1.01), "int8",
        "param",
    ),
    "base": (formats.NONNEGATIVE, "int8", shifted(UINT8), "int8", "exp_avg_sq, scales"),
    "nibble": (formats.SIGNED, "int4", scaled(formats.SIGNED["int4"], 0.99), "int4, stochastic", "exp_avg, scales"),
    "kahan": (formats.WEIGHTS, "kahan", replace(KAHAN, store=without_residual), "kahan", "param"),
    "split16": (formats.WEIGHTS, "split16", replace(SPLIT16, store=off_by_many_bits), "split16", "param"),
    "split8": (formats.WEIGHTS, "split8", replace(SPLIT8, store=nearest_below), "split8", "param"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_codec_turns_verify_red(what, monkeypatch):
    table, name, form, title, slot = BROKEN[what]
    cell = kept.cell("adamw", "plain", title)
    assert verify([cell], ["eager"], SEEDS[:1]).passed
    monkeypatch.setitem(table, name, form)
    report = verify([cell], ["eager"], SEEDS[:1])
    assert not report.passed
    assert slot in {name for name, used in report.verdicts[cell, "eager"].used.items() if used > 1}


def test_state_that_is_not_kept_as_asked_turns_verify_red(monkeypatch):
    monkeypatch.setattr(formats, "SMALLEST", 10**9)  # everything stays fp32
    report = verify([kept.cell("adamw", "plain", "int8")], ["eager"], SEEDS[:1])
    assert "nothing is stored under 'exp_avg_q'" in complaints(report)[0]


def test_a_weight_that_is_not_the_nearest_turns_verify_red(monkeypatch):
    def store(x, param, residual, noise):
        residual.copy_(x)
        param.copy_(x * 1.02)

    monkeypatch.setitem(formats.WEIGHTS, "float32", replace(formats.WEIGHTS["float32"], store=store))
    report = verify([kept.cell("sgd", "momentum", "master")], ["eager"], SEEDS[:1])
    assert "weights are not the bfloat16 numbers nearest to what their format holds" in complaints(report)[0]


def test_a_refusal_out_of_place_turns_verify_red(monkeypatch):
    cells = [kept.cell("adafactor", "plain", "int8"), kept.cell("adamw", "plain", "int8")]
    monkeypatch.setattr(kept.Kept, "refused_by", lambda kept, rule, options: rule.name == "adamw")
    lines = complaints(verify(cells, ["eager"], SEEDS[:1]))
    assert "refused, but should be taken: state_dtype='int8' is not supported by adafactor" in lines[0]
    assert lines[1].endswith("taken, but should be refused")


def test_a_step_that_raises_is_a_failure_of_its_cell(monkeypatch):
    def fail(x, noise):
        raise ArithmeticError("no codes today")

    monkeypatch.setitem(formats.SIGNED, "int8", replace(INT8, store=fail))
    cells = [kept.cell("sgd", "momentum", title) for title in ("int8", "int4")]
    report = verify(cells, ["eager"], SEEDS[:1])
    assert complaints(report) == ["sgd (momentum) in int8, eager: ArithmeticError: no codes today"]
    assert (cells[1], "eager") in report.verdicts


def test_the_command_reports_each_pair_in_tables_and_in_json(capsys, monkeypatch):
    rules = ("--rule", "sgd", "--rule", "adafactor", "--rule", "asgd")
    args = (*rules, "--formats", "int8", "--formats", "kahan", "--backend", "eager")
    status, output, errors = run_cli(capsys, *args)
    assert (status, errors) == (0, "")
    table = [line.split() for line in output.splitlines()]
    assert ["asgd", "(plain)", "none"] in table and ["adafactor", "(plain)", "refused"] in table
    assert "refused by adafactor (plain): state_dtype='int8' is not supported by adafactor" in output
    assert "formats PASSED: 5 of 5 cells within bounds, 0 failed, 0 differ in bits; 2 refused, 2 with nothing" in output

    monkeypatch.setitem(formats.SIGNED, "int8", scaled(INT8, 1.01))
    status, output, _ = run_cli(capsys, *args, "--json")
    report = json.loads(output)
    assert status == 1 and not report["passed"] and not report["formats"]["passed"] and report["rows"] == []
    pairs = {(c["rule"], c["format"], c["rounding"]): c["verdict"] for c in report["formats"]["cells"]}
    assert len(pairs) == 9
    assert pairs["sgd", "int8", "nearest"] == pairs["sgd", "int8", "stochastic"] == "BROKEN"
    assert pairs["adafactor", "int8", "nearest"] == "refused" and pairs["asgd", "int8", "nearest"] == "none"
    assert {pairs[rule, "kahan", "nearest"] for rule in ("sgd", "adafactor", "asgd")} == {"ok"}
    assert report["formats"]["problems"][0].startswith("sgd (momentum) in int8, eager: momentum_buffer")
    status, output, _ = run_cli(capsys, *args)
    assert status == 1 and " BROKEN" in output and "formats FAILED: 3 of 5 cells" in output


def test_dtypes_and_formats_leave_each_other_out(capsys):
    rule = ("--rule", "sgd", "--backend", "eager", "--json")
    only_formats = json.loads(run_cli(capsys, *rule, "--formats", "split16")[1])
    assert only_formats["rows"] == [] and only_formats["coverage"]["dtypes"] == "not run: not asked for"
    assert [cell["format"] for cell in only_formats["formats"]["cells"]] == ["split16"] and only_formats["passed"]
    only_dtypes = json.loads(run_cli(capsys, *rule, "--dtype", "float32")[1])
    assert only_dtypes["formats"] is None and only_dtypes["rows"]
    both = json.loads(run_cli(capsys, *rule, "--dtype", "float32", "--formats", "split16")[1])
    assert both["rows"] == only_dtypes["rows"] and both["formats"] == only_formats["formats"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--formats", "int9"], "unknown format 'int9'; did you mean 'int"),
        (["--formats", "none", "--formats", "int8"], "--formats none goes with no other"),
    ],
)
def test_bad_input_is_one_line_and_status_2(args, message, capsys):
    status, output, errors = run_cli(capsys, *args)
    assert (status, output) == (2, "")
    assert message in errors and errors.count("\n") == 1


@pytest.mark.parametrize("kind", ["signed", "nonnegative"])
@pytest.mark.parametrize("name", storage.CODED)
def test_stored_numbers_are_read_as_the_library_reads_them(name, kind):
    form, own = formats.QUANTISED[kind].get(name), storage.CODED[name].get(kind)
    assert (form is None) == (own is None)
    if form is None or own is None:
        return
    x = torch.randn(40, 100) * torch.logspace(-12, 4, 40)[:, None]
    x = x.abs() if kind == "nonnegative" else x
    codes, scales = encoded.encode(x, form)
    bits = [t.view(torch.uint8).numpy() if t.dtype.itemsize == 1 else t.numpy() for t in (codes, scales)]
    bits = [b.view(f"u{b.dtype.itemsize}") for b in bits]
    reading, largest = storage.read_coded(own, bits[0], bits[1], (40, 100), form.dithered)
    values = encoded.decode(codes, scales, form, x.shape)
    np.testing.assert_array_equal(reading.value, values.double().numpy())
    ratio = largest / storage.group_maxima(reading.value)
    assert np.nanmax(np.abs(ratio - 1)) < 2.0**-22  # decoding rounds three times
