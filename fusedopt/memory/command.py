"""`fusedopt memory [RULE]`: what training a model holds, by component, beside the published formats of others; with
``--world`` what each of many ranks holds.

Exit status: 0, or 2 for bad input. Nothing is allocated: parameters and state are meta tensors.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import torch

from fusedopt.inspect.command import DTYPES, rule_arguments
from fusedopt.inspect.command import _known as known
from fusedopt.inspect.errors import BadInput
from fusedopt.inspect.subject import Configuration, make_optimizer
from fusedopt.rules import RULES
from fusedopt.shapes import MODELS

if TYPE_CHECKING:
    from fusedopt.memory.share import Sharding

HELP = f"""Count the memory that training a model holds, without allocating it.

RULE is adamw unless given. Every argument of the rule's class is an option too, written after RULE: flags like
--amsgrad, numbers like --ema-decay 0.999.

\b
Examples:
  fusedopt memory
  fusedopt memory sgd --momentum 0.9 --model gpt2
  fusedopt memory adamw --model llama3-70b --param-dtype bf16 --master-weights split8 --state-dtype int8
  fusedopt memory adamw --model llama3-70b --world 64
  fusedopt memory --module my_package.models:make_model --world 16 --shard hsdp:8 --json

Models: {", ".join(MODELS)}.
"""

OWN_OPTIONS = ("model", "module", "param_dtype", "grad_dtype", "world", "shard", "json")
"""The command's own options, for whoever misspells one of them."""


@click.command("memory", help=HELP, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="[RULE] [OPTIONS OF THE RULE]...")
@click.option("--model", metavar="NAME", help="A built-in model, named above.  [default: llama3-8b]")
@click.option(
    "--module",
    metavar="MODULE:NAME",
    help="A model of your own: package.module:NAME or FILE.py:NAME, a function without arguments or a class that makes "
    "a torch.nn.Module; called with the meta device as default.",
)
@click.option("--param-dtype", help=f"{', '.join(DTYPES)}, or torch's names.  [default: float32; a module's own]")
@click.option("--grad-dtype", help="The same for gradients.  [default: the parameters']")
@click.option("--world", type=click.IntRange(min=1), metavar="N", help="Count what one of N ranks (GPUs) holds.")
@click.option(
    "--shard",
    metavar="KIND",
    help="With --world: fsdp (fully_shard over all ranks), hsdp:K (over groups of K), ddp (nothing sharded) or zero1 "
    "(state alone, by ZeroRedundancyOptimizer).  [default: fsdp]",
)
@click.option("--json", "json_output", is_flag=True, help="Print everything in bytes, as JSON.")
def command(words: tuple[str, ...], json_output: bool, **given: Any) -> int:
    try:
        return memory(words, json_output, given)
    except BadInput as error:
        raise click.UsageError(str(error)) from None


def memory(words: Sequence[str], json_output: bool, given: dict[str, Any]) -> int:
    """Settle the request, count, print."""
    from fusedopt.memory import held, ours, rank_report, ranks, report
    from fusedopt.memory.rivals import RIVALS

    rule = known("rule", words[0].lower(), tuple(RULES)) if words and not words[0].startswith("-") else None
    arguments = rule_arguments(words if rule is None else words[1:])
    grad_dtype, sharding = _dtype(given["grad_dtype"]), _sharding(given["world"], given["shard"])
    title, params = _model(given["model"], given["module"], _dtype(given["param_dtype"]))
    subject = report.Subject(title, rule or "adamw", arguments, tuple({str(p.dtype)[6:]: None for p in params}))
    with _refusals(subject.rule):
        twins = held.Twins(params)
        optimizer = make_optimizer(Configuration(subject.rule, arguments), twins.groups, OWN_OPTIONS)
        if sharding is not None:
            spread = ranks.count(twins, optimizer, sharding, grad_dtype)
            if json_output:
                click.echo(json.dumps({**report.of_subject(subject), **spread.as_json()}, indent=1))
            else:
                rank_report.print_ranks(subject, spread)
            return 0
        counted, suggested = twins.count(optimizer, grad_dtype), ours.count_all(params)
    found = report.Found(counted, suggested, [(rival, rival.memory(params)) for rival in RIVALS])
    if json_output:
        click.echo(json.dumps(report.as_json(subject, found), indent=1))
    else:
        report.print_report(subject, found)
    return 0


@contextmanager
def _refusals(rule: str) -> Iterator[None]:
    """What the optimizer refuses as one line; advice on low-precision state is for training."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except (RuntimeError, TypeError, ValueError) as error:
            raise BadInput(f"{rule}: {error}") from None


def _sharding(world: int | None, shard: str | None) -> Sharding | None:
    from fusedopt.memory.share import Sharding

    if world is None:
        if shard is not None:
            raise BadInput("--shard says how --world ranks share the model: give --world too")
        return None
    try:
        return Sharding.of(world, (shard or "fsdp").lower())
    except ValueError as error:
        raise BadInput(f"--{error}") from None


def _model(model: str | None, module: str | None, dtype: torch.dtype | None) -> tuple[str, Sequence[torch.Tensor]]:
    """A title and parameters on the meta device."""
    if module is None:
        built_in = MODELS[known("model", (model or "llama3-8b").lower(), tuple(MODELS))]
        return built_in.title, list(built_in.parameters(dtype or torch.float32).values())
    if model is not None:
        raise BadInput("--model names a built-in model, --module one of yours: give one of them")
    from fusedopt.memory.held import cast
    from fusedopt.memory.module import load

    made = load(module)
    params = list(made.parameters())
    if not params:
        raise BadInput(f"{module!r} makes a model without parameters")
    if dtype is not None:
        params = cast(params, dtype)
    return module, params


def _dtype(name: str | None) -> torch.dtype | None:
    if name is None:
        return None
    return getattr(torch, DTYPES.get(name.lower()) or known("dtype", name.lower(), tuple(DTYPES.values())))
