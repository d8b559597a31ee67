"""`fusedopt verify --rule FILE.py:NAME`: a user's kernels against the user's reference."""

import json
from pathlib import Path

import pytest

from fusedopt.verify import own
from tests.test_accuracy import run_cli

RULES = Path(__file__).with_name("own_rules.py")


def test_a_good_rule_is_equal_in_every_bit_under_all_its_options(capsys):
    status, output, errors = run_cli(capsys, "--rule", f"{RULES}:GOOD", "--dtype", "float32", "--dtype", "complex64")
    assert (status, errors) == (0, "")
    assert "PASSED: 6 of 6 cells equal the reference in every bit; seeds 11" in output
    for label in ("plain", "weight decay", "signed"):
        assert f"{label:12}  float32    interpreted  equal in every bit" in output
    assert "eager        the reference: the eager twins in torch" in output


def test_a_kernel_in_another_order_is_named_with_the_first_element(capsys):
    args = ("--rule", "tests.own_rules:WRONG", "--dtype", "float32", "--seeds", "2")
    status, output, _ = run_cli(capsys, *args, "--json")
    report = json.loads(output)
    assert (status, report["passed"], report["equal"]) == (1, False, [])
    first = report["differences"][0]
    assert (first["options"], first["dtype"], first["backend"], first["t"]) == ("plain", "float32", "interpreted", 2)
    assert first["slot"] in ("param", "mean") and first["values"] == [float.fromhex(x) for x in first["hex"]]
    output = run_cli(capsys, *args)[1]
    left, right = zip(first["hex"], first["values"], strict=True)
    found = f"step 2, {first['slot']} of tensor {first['tensor']}, element {first['element']}"
    assert f"{found}: {left[0]} ({left[1]}) and {right[0]} ({right[1]})" in output
    assert "FAILED: 0 of 3 cells equal" in output


def test_a_reference_that_raises_is_a_failure(capsys):
    status, output, _ = run_cli(capsys, "--rule", f"{RULES}:REFUSES", "--dtype", "float32")
    assert status == 1
    assert "plain float32 eager FAILED: ArithmeticError: no update today" in " ".join(output.split())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.py:RULE", "FileNotFoundError: no file nowhere.py"),
        (f"{RULES}:MISSING", "has no attribute 'MISSING'"),
        (f"{RULES}:reference", "is function, not a rule; fusedopt.make_rule makes one"),
        ("tests.no_such_module:RULE", "ModuleNotFoundError"),
    ],
)
def test_what_is_no_rule_is_bad_input_in_one_line(target, message, capsys):
    status, output, errors = run_cli(capsys, "--rule", target)
    assert (status, output) == (2, "") and message in errors and errors.count("\n") == 1


def test_a_rule_of_ones_own_is_verified_by_itself_and_with_kernels(capsys):
    assert "by itself" in run_cli(capsys, "--rule", f"{RULES}:GOOD", "--rule", "sgd")[2]
    assert "name another --backend" in run_cli(capsys, "--rule", f"{RULES}:GOOD", "--backend", "eager")[2]


def test_norms_in_float64_are_not_compared():
    from tests.lamb_like import RULE

    assert not own.Cell(RULE, "plain", "float64").compared("interpreted")
    assert own.Cell(RULE, "plain", "float32").compared("interpreted")
    assert own.Cell(own.load(f"{RULES}:GOOD"), "plain", "float64").compared("compiled")


def test_a_good_rule_is_equal_in_every_bit_in_formats(capsys):
    status, output, errors = run_cli(capsys, "--rule", f"{RULES}:GOOD", "--formats", "int4", "--formats", "split8")
    assert (status, errors) == (0, "")
    assert "PASSED: 4 of 4 cells equal the reference in every bit" in output
    assert "int4, stochastic    float32   interpreted  equal in every bit" in output
    assert run_cli(capsys, "--rule", f"{RULES}:GOOD", "--formats", "uint8")[0] == 2  # a signed average


def test_only_what_a_compiled_division_may_change_is_not_compared_in_formats():
    rule = own.load(f"{RULES}:GOOD")
    assert not own.Cell(rule, "int8", "float32").compared("compiled")
    assert own.Cell(rule, "int8", "float32").compared("interpreted")
    assert own.Cell(rule, "kahan", "bfloat16").compared("compiled")
