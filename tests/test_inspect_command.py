"""`fusedopt inspect` from the outside: bad input in one line, and what the report says."""

import json
from typing import Any

import pytest

from fusedopt import cli
from fusedopt.inspect import command, roofline, worker
from fusedopt.inspect.counts import Case, Inspection, Kernel
from fusedopt.inspect.errors import BadInput
from fusedopt.inspect.subject import Configuration, build


def case(elements: int) -> Case:
    accesses = {"load": 4 * elements, "store": 4 * elements}
    roles = {"param": accesses, "exp_avg": accesses, "exp_avg_sq": accesses, "grad": {"load": 4 * elements}}
    widths = {role: {what: {"16": n // 16} for what, n in kinds.items()} for role, kinds in roles.items()}
    widths["grad"] = {"load": {"4": elements}}
    return Case(elements, roles, widths, 0.5, 40 * elements, 108, 16, 60, spills=3, shared=0, barriers=2)


def inspection(launches: int = 2) -> Inspection:
    scalars = Kernel("adamw_scalars", 4, 30, 0, 0, 200, 0, 0)
    cases = {"full": case(16384), "unaligned": case(16384), "tail": case(1003)}
    update = Kernel("adamw", 4, 64, 0, 0, 900, 0, 0, cases)
    return Inspection("sm_90", "3.9.0", {"3": 2, "24": launches}, [scalars, update])


class FakeWorker:
    """Answers at once with counts made by hand."""

    answers: dict[str, Any]

    def __init__(self, method: str, request: dict[str, Any]) -> None:
        self.method = method

    def result(self) -> dict[str, Any]:
        return self.answers[self.method]

    def close(self) -> None:
        pass


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    found = inspection()
    FakeWorker.answers = {
        "compiled": found.as_json(),
        "interpreted": {"adamw": {name: c.bytes for name, c in found.kernels[1].cases.items()}},
    }
    FakeWorker.answers = json.loads(json.dumps(FakeWorker.answers))
    monkeypatch.setattr(worker, "Worker", FakeWorker)
    return FakeWorker.answers


def run(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", *options])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Missing argument"),
        (["adamx"], "did you mean adam"),
        (["--amsgrad", "adamw"], "write the rule before"),
        (["adamw", "--arch", "sm_95"], "unknown architecture sm_95"),
        (["adamw", "--param-dtype", "int8"], "unknown dtype int8"),
        (["adamw", "--grad-dtype", "bfloat1"], "did you mean bfloat16"),
        (["adamw", "--params", "0"], "--params takes a positive number"),
        (["adamw", "--bandwidth", "fast"], "--bandwidth takes a positive number"),
        (["adamw", "--params", "inf"], "--params takes a positive number"),
        (["adamw", "amsgrad"], "unexpected argument amsgrad"),
        (["adamw", "--lr", "1e-"], "--lr takes a number"),
        (["adamw", "--arch", "gfx942", "--check"], "choose an NVIDIA architecture"),
        (["adamw", "--clip", "1", "--clip-grad-norm", "2"], "--clip is short for --clip-grad-norm: give one of them"),
        (["adamw", "--ema", "0.9x"], "--ema takes a number"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *options)
    assert (status, out) == (2, "")
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"amsgrd": True}, "did you mean --amsgrad"),
        ({"parms": 8e9}, "did you mean --params"),
        ({"foo": True}, "it takes --lr, --betas"),
        ({"lr": -1}, "Invalid learning rate"),
        ({"lr": "fast"}, "wrong type"),
        ({"betas": 5}, "wrong type"),
        ({"backend": "eager"}, "no option --backend"),
        ({"metrics": ["grad_nor"]}, "'grad_nor' is not known"),
    ],
)
def test_what_the_rule_refuses_is_bad_input(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build(Configuration("adamw", arguments))


def test_an_error_in_a_worker_becomes_one_line(
    answers: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()  # the real worker, on a rule's own check
    status, out, err = run(capsys, "sgd", "--nesterov")
    assert (status, out) == (2, "")
    assert "Nesterov momentum requires" in err and err.count("\n") == 1


def test_options_of_the_rule() -> None:
    options = ["--amsgrad", "--weight-decay", "0.1", "--betas=(0.9, 0.99)", "--lr", "-1", "--maximize"]
    assert command.rule_arguments(options) == {
        "amsgrad": True, "weight_decay": 0.1, "betas": (0.9, 0.99), "lr": -1, "maximize": True,
    }  # fmt: skip
    assert command.rule_arguments(["--state-dtype", "int8", "--amsgrad", "False"]) == {
        "state_dtype": "int8",
        "amsgrad": False,
    }


def test_the_report_names_what_was_counted(answers: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "adamw", "--check", "--params", "8e9")
    assert (status, err) == (0, "")
    words = " ".join(out.split())
    assert "launches per step: 2 for 3 tensors and 2 for 24 tensors (adamw_scalars, adamw)" in words
    assert "adamw full, aligned 16.00 12.00 28.00 128, grad 32 128 40.0 3 2 50%" in words
    assert "adamw tail (1003) 16.00" in words
    assert "bytes per parameter: 28.00" in words
    assert "108 bytes read per full chunk (0.0066 per parameter), by 60 loads of warps; 16 written." in words
    assert "predicted, not measured: 28.00 B × 8e+09 parameters at 4.3e+12 B/s = 52.09 ms per step" in words
    assert "hidden behind memory" in words
    assert "exactly these bytes" in words


def test_a_disagreement_is_named_and_gives_status_1(
    answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers["interpreted"]["adamw"]["tail"]["grad"]["load"] -= 4
    status, out, _ = run(capsys, "adamw", "--check")
    assert status == 1
    assert "adamw tail grad load: 4012 bytes compiled, 4008 interpreted" in out
    status, out, _ = run(capsys, "adamw", "--check", "--json")
    assert status == 1 and json.loads(out)["check"]["agrees"] is False


def test_launches_that_depend_on_the_tensors_are_shouted(
    answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    answers["compiled"] = inspection(launches=24).as_json()
    assert "THE NUMBER DEPENDS ON THE TENSORS" in " ".join(run(capsys, "adamw")[1].split())


def test_json_holds_the_configuration_and_the_ratios(
    answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    report = json.loads(run(capsys, "adamw", "--amsgrad", "--param-dtype", "bf16", "--json")[1])
    assert report["configuration"] == {
        "rule": "adamw", "arguments": {"amsgrad": True}, "param_dtype": "bfloat16", "grad_dtype": "bfloat16",
        "amp": False,
    }  # fmt: skip
    full = report["kernels"][1]["cases"]["full"]
    assert (full["loaded_per_param"], full["stored_per_param"], full["instructions_per_element"]) == (16, 12, 40)
    assert report["roofline"]["seconds"] == pytest.approx(28 * 8e9 / 4.3e12)
    assert report["check"] is None


def test_short_forms_stand_for_options_of_the_optimizer(
    answers: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("--clip", "1.0", "--amp", "--ema", "0.999", "--metrics", "grad_norm,update_ratio", "--amsgrad")
    asked = json.loads(run(capsys, "adamw", *short, "--json")[1])["configuration"]
    assert asked["amp"] is True
    assert asked["arguments"] == {
        "amsgrad": True, "clip_grad_norm": 1.0, "ema_decay": 0.999, "metrics": ["grad_norm", "update_ratio"],
    }  # fmt: skip
    assert "as under fusedopt.GradScaler" in " ".join(run(capsys, "adamw", "--amp")[1].split())
    assert "GradScaler" not in run(capsys, "adamw")[1]


def test_the_roofline_takes_the_slower_of_memory_and_issue() -> None:
    predicted = roofline.predict(inspection(), params=1e9, bandwidth=1e15)
    assert predicted is not None and predicted.issue_seconds is not None
    assert predicted.seconds == predicted.issue_seconds == pytest.approx(40e9 / roofline.ISSUE_RATES["sm_90"])
    assert roofline.predict(Inspection("gfx942", "3.9.0", {}, [Kernel("k", 4, 0, 0, 0, 0, 0, 0)]), 1e9, 1e12) is None
