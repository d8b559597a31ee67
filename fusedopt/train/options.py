"""The options of `fusedopt train`, in the sections of its help. None stands for a default: see `config.resolve`."""

from __future__ import annotations

from typing import Any

import click

from .config import DEFAULT_OUT, DTYPES, MASTERS, ROUNDINGS, STATES
from .sizes import COMMON, SIZES
from .task import TASKS


class SectionOption(click.Option):
    """An option that names its section of the help."""

    def __init__(self, *args: Any, section: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.section = section


class SectionCommand(click.Command):
    """Prints options by section, and reads `--text a b c` as `--text a --text b --text c`."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record:
                sections.setdefault(getattr(parameter, "section", "Other"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, repeat_option("--text", args))


def repeat_option(name: str, args: list[str]) -> list[str]:
    """Put `name` before each value that follows it, up to the next option."""
    result: list[str] = []
    values = -1  # of `name` read so far; -1 outside its list
    for argument in args:
        if argument.startswith("-"):
            values = 0 if argument == name else -1
        elif values >= 0:
            if values > 0:
                result.append(name)
            values += 1
        result.append(argument)
    return result


class BatchSize(click.ParamType):
    """A number, or "full"."""

    name = "integer or full"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        """Refuse everything else."""
        try:
            return value if value == "full" else int(str(value))
        except ValueError:
            self.fail(f"{value!r} is neither a whole number nor full.", param, ctx)


def by_machine(name: str) -> str:
    """The defaults of a size, as the help shows them: those of the tasks, if they differ, and on each machine."""
    parts = []
    for task in TASKS:
        values = [{**COMMON[task], **SIZES[task][machine]}[name] for machine in ("cpu", "gpu", "interpreter")]
        cpu, gpu, interpreted = values
        parts.append(f"{cpu}" if cpu == gpu == interpreted else f"{cpu}; on a GPU {gpu}; interpreted {interpreted}")
    first, *others = parts
    named = [f"{task}: {part}" for task, part in zip(list(TASKS)[1:], others, strict=True) if part != first]
    return f"[{'; '.join([first, *named])}]"


def _option(name: str, text: str, type: Any = str, **settings: Any) -> dict[str, Any]:
    return dict(param_decls=[name], help=text, type=type, **settings)


def _flag(name: str, text: str) -> dict[str, Any]:
    return dict(param_decls=[name], help=text, is_flag=True)


def _choice(*names: str) -> click.Choice:
    return click.Choice(names)


SECTIONS: dict[str, list[dict[str, Any]]] = {
    "Data": [
        _option("--task", f"{'; '.join(f'{name}: {what}' for name, what in TASKS.items())}. [text]", metavar="NAME"),
        _option("--text", "Train on these files. The last tenth of each is held out. [Python's own source files]",
                multiple=True, metavar="FILE..."),
        _option("--tokenizer", "How translate cuts text: bpe, learnt from the training part, or bytes. [bpe]",
                _choice("bpe", "bytes")),
        _option("--vocabulary-size", "Tokens of bpe. Less for little text, where rare tokens are hardly learnt. "
                f"[{COMMON['translate']['vocabulary_size']}]", int),
    ],
    "Model": [
        _option("--hidden-size", f"Width of the model. {by_machine('hidden_size')}", int),
        _option("--num-layers", "Transformer blocks; with translate of the encoder and of the decoder each. "
                f"{by_machine('num_layers')}", int),
        _option("--num-heads", f"Attention heads; must divide the width. {by_machine('num_heads')}", int),
        _option("--max-seq-len", f"Bytes, or tokens, per sequence. {by_machine('max_seq_len')}", int),
        _option("--dropout", f"Dropout probability. {by_machine('dropout')}", float),
    ],
    "Training": [
        _option("--steps", f"Optimizer steps. {by_machine('steps')}", int),
        _option("--epochs", "Passes over the training examples, instead of --steps; rounded up to whole steps.", float),
        _option("--batch-size", f"Sequences per step; full = all training examples. {by_machine('batch_size')}",
                BatchSize()),
        _option("--seed", "Seed of weights, data order, dropout and random rounding. [0]", int),
        _option("--dtype", "Data type of the weights. [fp32]", _choice(*DTYPES)),
        _option("--amp", "Autocast of the forward pass; fp16 with a dynamic loss scale (slow without a GPU). [off; on "
                "a GPU bf16]", _choice("off", "bf16", "fp16")),
        _option("--label-smoothing", "Share of each target that is spread over all tokens, in training only. "
                f"{by_machine('label_smoothing')}", float),
        _option("--l1", "L1 penalty: adds this times sign(w) to the gradient of matrices; 0 = off. [0]", float),
        _option("--clip", "Clip the gradient to this global norm, in the optimizer's step; 0 = off. [1]", float,
                metavar="NORM"),
        _option("--ema", "Average the weights with this decay, in the optimizer's step, and validate the average too; "
                "0 = off. It starts smaller. [0]", float, metavar="DECAY"),
        _option("--patience", "Stop after this many validations without a new lowest loss, and restore the weights "
                "of the lowest; 0 = never. [0]", int, metavar="VALIDATIONS"),
        _option("--device", "Where to train. [auto: a GPU if there is one]", _choice("auto", "cpu", "cuda")),
    ],
    "Optimizer": [
        _option("--optimizer", "Update rule, such as adamw, adam or sgd. [adamw]", metavar="NAME"),
        _option("--lr", "Peak learning rate. [adam, adamw and muon 0.002, sgd 0.1, others 0.001]", float),
        _option("--lr-scaling", "Multiply --lr by k (linear, for SGD) or its square root (sqrt, for Adam), k being "
                "--batch-size over --base-batch-size. [none]", _choice("none", "linear", "sqrt")),
        _option("--base-batch-size", "Batch size that --lr was chosen for; needs --lr-scaling. [the default batch "
                "size]", int),
        _option("--schedule", "How the learning rate changes; `fusedopt schedules` lists and draws them. [cosine]",
                metavar="NAME"),
        _option("--schedule-arg", "An argument of the schedule, such as gamma=0.5; repeatable. [`fusedopt "
                "schedules` shows them]", multiple=True, metavar="NAME=VALUE"),
        _option("--lr-file", "Watch this file: a learning rate written into it holds from the next step on. "
                "[none]", metavar="FILE"),
        _option("--warmup-steps", "Steps of linear warm-up. [5 % of the steps; one_cycle has its own]", int),
        _option("--min-lr", "Learning rate at the end of those that fall to one, lower limit of others. [lr / 10; "
                "0]", float),
        _option("--weight-decay", "Weight decay of the matrices. [adamw 0.1, others 0]", float),
        _option("--decay", "Kind of weight decay: l2 adds to the gradient, decoupled shrinks the weights beside the "
                "step, own is the optimizer's. [own]", _choice("own", "l2", "decoupled")),
        _option("--master", "How bf16 weights keep what rounding would lose: in an fp32 copy, 16 (exact) or 8 bits "
                "beside them, Kahan's compensation, or by rounding at random. [off]", _choice(*MASTERS)),
        _option("--master-rounding", "How --master split8 rounds to its 24 bits. [stochastic]", _choice(*ROUNDINGS)),
        _option("--state", "How the optimizer's averages are stored. [auto: like the weights, fp32 with --master]",
                _choice(*STATES)),
        _option("--state-rounding", "How a --state below fp32 is rounded. [nearest]", _choice(*ROUNDINGS)),
        _option("--optimizer-arg", "Another argument of the optimizer's class, such as betas=(0.9,0.99); repeatable. "
                "[sgd: momentum=0.9]", multiple=True, metavar="NAME=VALUE"),
        _option("--backend", "auto: triton on a GPU, else eager. triton without a GPU runs the kernels in Triton's "
                "interpreter. [auto]", _choice("auto", "eager", "triton")),
        _option("--compare", "Train the same seed with torch.optim's class as well; report parameter difference, "
                "losses and step times. Norms of weights and updates are not measured then. [none]",
                _choice("none", "torch")),
    ],
    "Run": [
        _option("--config", "Settings from a JSON file: a run's config.json or the best of `fusedopt tune`. Options "
                "given here win. [none]", metavar="FILE"),
        _option("--parallel", "Under torchrun: a copy of the model on every rank (ddp), or parts of it (fsdp). "
                "--batch-size is that of all ranks together. [one process]", _choice("ddp", "fsdp")),
        _option("--out", f"Output folder. [{DEFAULT_OUT}]", metavar="FOLDER"),
        _flag("--resume", "Continue from the checkpoint in the output folder, with its settings; start anew when "
              "there is none."),
        _flag("--overwrite", "Start anew even if the output folder holds a run."),
        _flag("--allow-inexact", "Resume although text, settings, versions or thread count differ, and then the bits "
              "may too."),
        _option("--checkpoint-interval", "Steps between checkpoints. [steps / 10]", int, metavar="STEPS"),
        _option("--val-interval", "Steps between validations. [steps / 10]", int, metavar="STEPS"),
        _option("--log-interval", "Steps between readings of loss and metrics. [1; on a GPU 10]", int,
                metavar="STEPS"),
        _option("--val-batches", "Batches per validation. [8 of the default size, as many examples of any other]", int),
    ],
}  # fmt: skip
OPTIONS: list[click.Parameter] = [
    SectionOption(section=section, **settings) for section, options in SECTIONS.items() for settings in options
]


def shared(*sections: str, without: tuple[str, ...] = ()) -> list[click.Parameter]:
    """Options of some sections, for commands that train many times; `without` those with these names."""
    found = [parameter for parameter in OPTIONS if getattr(parameter, "section", None) in sections]
    return [parameter for parameter in found if parameter.name not in without]
