"""`fusedopt inspect RULE`: what a configuration's kernels do, read from their machine code.

Exit status: 0 when everything was counted, 1 when it could not be or `--check` finds other counts, 2 for bad input.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import click

from fusedopt.inspect.errors import BadInput, CannotFollow
from fusedopt.rules import RULES

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}

HELP = """Compile a rule's kernels and count launches, bytes and instructions, without a GPU.

Every argument of the rule's class is an option too, written after RULE: flags like --amsgrad, numbers like
--momentum 0.9.

\b
Examples:
  fusedopt inspect adamw
  fusedopt inspect adamw --clip 1.0 --amp
  fusedopt inspect adamw --amsgrad --param-dtype bf16 --arch sm_100 --check
  fusedopt inspect sgd --momentum 0.9 --nesterov --params 70e9 --bandwidth 3.3e12 --json
"""


@click.command("inspect", help=HELP, context_settings={"ignore_unknown_options": True})
@click.argument("rule")
@click.argument("rule_options", nargs=-1, type=click.UNPROCESSED)
@click.option("--arch", default="sm_90", show_default=True, help=f"GPU to compile for: {', '.join(ARCHITECTURES)}.")
@click.option("--param-dtype", default="float32", show_default=True, help=f"{', '.join(DTYPES)}, or torch's names.")
@click.option("--grad-dtype", help="The same for gradients.  [default: the parameters']")
@click.option("--clip", metavar="NORM", help="Clip gradients to this norm: short for --clip-grad-norm NORM.")
@click.option("--ema", metavar="DECAY", help="Average the weights: short for --ema-decay DECAY.")
@click.option("--metrics", metavar="A,B", help="What the step measures of itself, such as grad_norm,update_ratio.")
@click.option("--amp", is_flag=True, help="Unscale and check gradients, as the step does under fusedopt.GradScaler.")
@click.option("--params", default="8e9", show_default=True, help="Parameters of the model, for the prediction.")
@click.option(
    "--bandwidth", default="4.3e12", show_default=True, help="Bytes per second; the default is a copy on an H200."
)
@click.option("--check", is_flag=True, help="Count the bytes in the interpreter too; exit status 1 if they differ.")
@click.option("--json", "json_output", is_flag=True, help="Print the whole report as JSON.")
def command(rule: str, rule_options: tuple[str, ...], check: bool, json_output: bool, **given: Any) -> int:
    try:
        return inspect(rule, rule_options, check, json_output, given)
    except BadInput as error:
        raise click.UsageError(str(error)) from None
    except CannotFollow as error:
        raise click.ClickException(str(error)) from None


def inspect(rule: str, rule_options: Sequence[str], check: bool, json_output: bool, given: dict[str, Any]) -> int:
    """Settle the request, count in processes of their own, print. Returns the exit status."""
    if rule.startswith("-"):
        raise BadInput(f"write the rule before its options: fusedopt inspect RULE {rule}")
    rule = _known("rule", rule.lower(), tuple(RULES))
    arch = _known("architecture", given["arch"].lower(), ARCHITECTURES)
    params, bandwidth = _positive("--params", given["params"]), _positive("--bandwidth", given["bandwidth"])
    param_dtype = _dtype(given["param_dtype"])
    if check and arch.startswith("gfx"):
        raise BadInput(f"--check compares bytes, and none are counted for {arch}; choose an NVIDIA architecture")
    arguments = rule_arguments(rule_options)
    configuration = {
        "rule": rule,
        "arguments": {**arguments, **short_forms(given, arguments)},
        "param_dtype": param_dtype,
        "grad_dtype": _dtype(given["grad_dtype"]) if given["grad_dtype"] else param_dtype,
        "amp": given["amp"],
    }
    request = {"configuration": configuration, "arch": arch}
    return _report(request, _count(request, check), (params, bandwidth), json_output)


def _count(request: dict[str, Any], check: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What the two methods counted; they work at the same time."""
    from rich.console import Console

    from fusedopt.inspect.worker import Worker

    workers = [Worker(method, request) for method in (["compiled", "interpreted"] if check else ["compiled"])]
    try:
        with Console(stderr=True).status("compiling and counting") if sys.stderr.isatty() else nullcontext():
            results = [worker.result() for worker in workers]
    finally:
        for worker in workers:
            worker.close()
    return results[0], results[1] if check else None


def _report(
    request: dict[str, Any],
    counted: tuple[dict[str, Any], dict[str, Any] | None],
    model: tuple[float, float],
    json_output: bool,
) -> int:
    from fusedopt.inspect import counts, report, roofline

    inspection = counts.Inspection.from_json(counted[0])
    differences = None
    if counted[1] is not None:
        differences = counts.differences(("compiled", counts.bytes_of(inspection)), ("interpreted", counted[1]))
    predicted = roofline.predict(inspection, *model)
    if json_output:
        click.echo(json.dumps(report.as_json(request, inspection, predicted, differences), indent=1))
    else:
        report.print_report(request, inspection, predicted, differences)
    return 1 if differences else 0


def rule_arguments(options: Sequence[str]) -> dict[str, Any]:
    """``["--amsgrad", "--momentum", "0.9", "--betas=(0.9,0.99)"]`` as keyword arguments of the rule's class."""
    arguments: dict[str, Any] = {}
    rest = list(options)
    while rest:
        option = rest.pop(0)
        if not re.match(r"--[a-zA-Z]", option):
            raise BadInput(f"unexpected argument {option}; a rule's options look like --amsgrad or --momentum 0.9")
        name, equals, text = option[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        arguments[name.replace("-", "_")] = _literal(name, text) if text else True
    return arguments


SHORT_FORMS = {"clip": "clip_grad_norm", "ema": "ema_decay", "metrics": "metrics"}


def short_forms(given: Mapping[str, str | bool | None], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """What the options in `SHORT_FORMS` stand for, unless the long forms in ``arguments`` say it already."""
    found: dict[str, Any] = {}
    for short, name in SHORT_FORMS.items():
        text = given[short]
        if isinstance(text, str):
            if name in arguments:
                raise BadInput(f"--{short} is short for --{name.replace('_', '-')}: give one of them")
            found[name] = text.replace(",", " ").split() if short == "metrics" else _literal(short, text)
    return found


def _literal(name: str, text: str) -> Any:
    if text in ("inf", "-inf"):
        return float(text)
    if re.fullmatch(r"(?!True$|False$|None$)[A-Za-z]\w*", text):
        return text  # a name, such as a format's
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise BadInput(f"--{name} takes a number, not {text!r}") from None


def _known(what: str, name: str, known: Sequence[str]) -> str:
    if name in known:
        return name
    close = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {close[0]}?" if close else ""
    raise BadInput(f"unknown {what} {name}{hint} (known: {', '.join(known)})")


def _dtype(name: str) -> str:
    return DTYPES.get(name.lower()) or _known("dtype", name.lower(), tuple(DTYPES.values()))


def _positive(option: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise BadInput(f"{option} takes a positive number such as 8e9, not {text!r}")
    return value
