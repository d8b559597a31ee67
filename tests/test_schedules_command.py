"""Impossible schedules in one line; `fusedopt schedules`; and the page on schedules."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import fusedopt
from fusedopt.schedules import NAMES, SCHEDULES, check, make, parse_arguments
from fusedopt.schedules.command import command

DOCS = Path(fusedopt.__file__).parent / "docs"


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("cosin", {}, "unknown schedule cosin: did you mean cosine? (known: constant, step, "),
        ("zzz", {}, "unknown schedule zzz (known: constant, "),
        ("linear", {"warmup_steps": 100}, "warmup_steps 100 must be less than steps 100"),
        ("linear", {"steps": 0}, "steps must be a whole number of at least 1, not 0"),
        ("linear", {"steps": 1.5}, "steps must be a whole number of at least 1, not 1.5"),
        ("linear", {"warmup_steps": -1}, "warmup_steps must be a whole number of at least 0, not -1"),
        ("linear", {"min_lr": 1.5}, "min_lr 1.5 must not exceed lr 1.0"),
        ("linear", {"min_lr": float("nan")}, "min_lr must be a finite number of at least 0, not nan"),
        ("linear", {"lr": -1.0}, "lr must be a finite number of at least 0, not -1.0"),
        ("linear", {"epoch_steps": 0}, "epoch_steps must be a number above 0, not 0"),
        ("linear", {"arguments": {"power": 2}}, "schedule linear takes no argument power (known: none)"),
        ("step", {"arguments": {"stepsize": 2}}, "no argument stepsize: did you mean step_size? (known: "),
        ("step", {"arguments": {"step_size": 0}}, "step_size must be a whole number of at least 1, not 0"),
        ("step", {"arguments": {"step_size": True}}, "step_size must be a whole number of at least 1, not True"),
        ("step", {"arguments": {"step_size": 95}, "warmup_steps": 5}, "step_size 95 must be less than the 95 steps"),
        ("step", {"arguments": {"gamma": 1.0}}, "gamma must be a number above 0 and below 1, not 1.0"),
        ("exponential", {"arguments": {"k": "fast"}}, "schedule exponential: k must be a number above 0, not 'fast'"),
        ("polynomial", {"arguments": {"power": float("inf")}}, "power must be a number above 0, not inf"),
        ("piecewise", {"arguments": {"boundaries": 5}}, "boundaries must be a list of whole numbers, not 5"),
        ("piecewise", {"arguments": {"boundaries": [50, 40]}}, "boundaries must be increasing steps, not [50, 40]"),
        ("piecewise", {"arguments": {"boundaries": [50, 50]}}, "boundaries must be increasing steps, not [50, 50]"),
        ("piecewise", {"arguments": {"boundaries": []}}, "boundaries must be increasing steps, not []"),
        ("piecewise", {"arguments": {"boundaries": [50, 100]}}, "[50, 100] must be after warmup_steps 0 and before"),
        ("piecewise", {"arguments": {"boundaries": [5, 50]}, "warmup_steps": 5}, "must be after warmup_steps 5 and"),
        ("piecewise", {"arguments": {"boundaries": [50]}}, "1 boundaries need 2 factors, not 3"),
        ("piecewise", {"arguments": {"values": [1, 0.5]}}, "2 boundaries need 3 values, not 2"),
        ("piecewise", {"arguments": {"values": [1, 2, 0.5]}}, "values 2 is above lr 1.0"),
        ("piecewise", {"arguments": {"values": [1, 1, 1], "factors": [1, 1, 1]}}, "give values or factors, not both"),
        ("piecewise", {"arguments": {"factors": [1, 2, 1]}}, "factors must be a list of numbers from 0 to 1"),
        ("cosine_restarts", {"arguments": {"first_period": 101}}, "first_period 101 must not exceed the 100 steps"),
        ("cosine_restarts", {"arguments": {"multiplier": 1.5}}, "multiplier must be a whole number of at least 1"),
        ("one_cycle", {"arguments": {"div_factor": 0.5}}, "div_factor must be a number of at least 1, not 0.5"),
        ("one_cycle", {"arguments": {"anneal": "sin"}}, "anneal must be one of cos, linear, not 'sin'"),
        ("wsd", {"arguments": {"decay": 0}}, "decay must be a number above 0 and up to 1, not 0"),
        ("wsd", {"arguments": {"decay": 0.96}, "warmup_steps": 5}, "5 and 96 steps of decay are more than steps 100"),
        ("wsd", {"warmup_steps": 81}, "warmup_steps 81 and 20 steps of decay are more than steps 100"),
        ("inverse_sqrt", {"arguments": {"timescale": 0}}, "timescale must be a number above 0, not 0"),
        ("plateau", {"arguments": {"factor": 1}}, "factor must be a number above 0 and below 1, not 1"),
        ("plateau", {"arguments": {"patience": -1}}, "patience must be a whole number of at least 0, not -1"),
        ("plateau", {"arguments": {"threshold": 1.0}}, "threshold must be a number of at least 0 and below 1, not 1.0"),
    ],
)  # fmt: skip
def test_impossible_schedules_are_refused_in_one_line(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        check(name, **{"steps": 100, **given})
    assert "\n" not in str(caught.value)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    if "lr" not in given:
        with pytest.raises(ValueError, match=re.escape(message)):
            make(name, optimizer, **{"steps": 100, **given})


def test_what_just_fits_is_taken() -> None:
    check("linear", steps=2, warmup_steps=1, lr=0.0)
    check("wsd", steps=100, warmup_steps=80)
    check("wsd", steps=100, arguments={"decay": 1})
    check("step", steps=100, arguments={"step_size": 99})
    check("cosine_restarts", steps=100, arguments={"first_period": 100})
    check("piecewise", steps=100, warmup_steps=5, arguments={"boundaries": [6, 99]})
    for name in NAMES:
        check(name, steps=1)


def test_arguments_are_literals_or_words() -> None:
    found = parse_arguments(["step_size=3", "boundaries=10,20", "values = [1e-3, 0.5]", "shape=sqrt", "div-factor=10"])
    expected = {"step_size": 3, "boundaries": (10, 20), "values": [1e-3, 0.5], "shape": "sqrt", "div_factor": 10}
    assert found == expected
    for pair in ("gamma", "gamma=", "=3"):
        with pytest.raises(ValueError, match=f"written NAME=VALUE, not '{pair}'"):
            parse_arguments([pair])


def run(*options: object) -> tuple[int, str]:
    result = CliRunner().invoke(command, list(map(str, options)), env={"COLUMNS": "300"})
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result.exit_code, result.output


def test_it_lists_each_schedule_with_its_arguments() -> None:
    status, out = run()
    assert status == 0
    for name, row in SCHEDULES.items():
        assert f"│ {name} " in out and row.formula in out
        assert all(f"{label}: {a.about}" in out and f"[{a.default_text}]" in out for label, a in row.arguments.items())
    assert "wsd" not in run("step", "plateau")[1]


def test_it_draws_what_is_named(tmp_path: Path) -> None:
    file = tmp_path / "some.png"
    options = (
        "wsd",
        "step",
        "--plot",
        file,
        "--steps",
        30,
        "--schedule-arg",
        "shape=sqrt",
        "--schedule-arg",
        "gamma=0.5",
    )
    status, out = run(*options, "--lr", 1, "--warmup-steps", 3, "--min-lr", 0.2, "--epoch-steps", 5)
    assert (status, out) == (0, f"2 schedules over 30 steps: {file}\n")
    assert file.read_bytes().startswith(b"\x89PNG")
    assert b"<svg" in (run("--plot", tmp_path / "all.svg", "--steps", 9), (tmp_path / "all.svg").read_bytes())[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["cosin"], "unknown schedule cosin: did you mean cosine?"),
        (["--lr", "1"], "--lr describes the run that --plot FILE draws: add --plot"),
        (["--schedule-arg", "gamma=0.1"], "--schedule-arg describes the run that --plot FILE draws"),
        (["--plot", "a.bmp"], "--plot a.bmp: the name must end in .png, .svg, .pdf"),
        (["step", "--plot", "none/a.png"], "cannot write none/a.png: No such file or directory"),
        (["--plot", "a.png", "--steps", "0"], "steps must be a whole number of at least 1, not 0"),
        (["--plot", "a.png", "--warmup-steps", "1000"], "warmup_steps 1000 must be less than steps 1000"),
        (["--plot", "a.png", "--schedule-arg", "gama=1"], "--schedule-arg gama: none of constant, step, "),
        (["--plot", "a.png", "--schedule-arg", "gamma"], "a schedule's argument is written NAME=VALUE, not 'gamma'"),
        (["wsd", "--plot", "a.png", "--schedule-arg", "decay=2"], "schedule wsd: decay must be a number above 0"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    options: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out = run(*options)
    assert status == 2 and f"Error: {message}" in out and out.count("\n") == 4  # two of usage, and a blank one
    assert not list(tmp_path.iterdir())


def test_the_list_and_the_help_import_no_torch() -> None:
    program = (
        "import sys; from fusedopt.schedules.command import command\n"
        "for options in ['--help'], []: command.main(options, standalone_mode=False)\n"
        "assert not {'torch', 'matplotlib'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--schedule-arg NAME=VALUE" in done.stdout and "│ plateau" in done.stdout


def test_the_page_names_every_schedule_and_argument_and_its_programs_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (DOCS / "schedules.md").read_text(encoding="utf-8")
    for name, row in SCHEDULES.items():
        assert f"### {name}\n" in text
        section = text.split(f"### {name}\n")[1].split("\n#")[0]
        assert all(f"`{label}` [{a.default_text}]" in section for label, a in row.arguments.items()), name
    assert 10_000 < (DOCS / "schedules.png").stat().st_size < 120_000
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert names["lr"] == pytest.approx(0.5e-3)
