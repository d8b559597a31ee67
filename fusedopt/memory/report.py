"""The report of `fusedopt memory`: tables for people, JSON for programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fusedopt.memory.held import Memory
from fusedopt.memory.ours import Suggestion
from fusedopt.memory.rivals import Package, Rival

WIDTH = 110
"""Columns of the tables at their widest."""

UNITS = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}


@dataclass(frozen=True)
class Subject:
    """model: its title. rule, arguments: the optimizer. dtypes: of the parameters, by torch's names."""

    model: str
    rule: str
    arguments: Mapping[str, Any]
    dtypes: tuple[str, ...]

    @property
    def configuration(self) -> str:
        """The optimizer in words."""
        return self.rule + "".join(f", {name}={value}" for name, value in self.arguments.items())


@dataclass(frozen=True)
class Found:
    """What was counted: the configuration asked for, others of this package, and other packages' formats."""

    counted: Memory
    ours: Sequence[tuple[Suggestion, Memory]]
    rivals: Sequence[tuple[Rival, Memory]]


def of_subject(subject: Subject) -> dict[str, Any]:
    """Model and optimizer."""
    about = {"rule": subject.rule, "arguments": subject.arguments, "param_dtypes": subject.dtypes}
    return {"model": subject.model, "configuration": about}


def as_json(subject: Subject, found: Found) -> dict[str, Any]:
    """Everything that was counted, in bytes."""
    return {
        **of_subject(subject),
        "memory": found.counted.as_json(),
        "ours": [
            {"name": each.name, "arguments": each.options, "memory": memory.as_json()} for each, memory in found.ours
        ],
        "rivals": [
            {"name": rival.name, "format": vars(rival.package), "memory": memory.as_json()}
            for rival, memory in found.rivals
        ],
    }


def print_report(subject: Subject, found: Found) -> None:
    """The same for a reader, on stdout."""
    console = begin(subject, found.counted)
    console.print(_component_table(found.counted))
    console.print(_rival_table(found))
    console.print(_source_table({rival.package: None for rival, _ in found.rivals}))
    console.print(
        "Held from step to step. Not counted: activations, the model's buffers, the kernels' tables, and what an "
        "allocator rounds up.",
        style="dim",
    )


def begin(subject: Subject, counted: Memory) -> Console:
    """Say what is counted, and return where the rest is printed."""
    console = Console(highlight=False)
    if console.width < WIDTH or not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    frozen = "" if counted.trainable == counted.parameters else f", {counted.trainable:,} of them trained"
    console.print(f"{subject.model}: {counted.parameters:,} parameters in {counted.tensors:,} tensors{frozen}")
    console.print(f"{subject.configuration}; {', '.join(subject.dtypes)} parameters; nothing was allocated")
    return console


def size(count: int, unit: str) -> str:
    """Bytes in a unit."""
    return f"{count / UNITS[unit]:,.2f}" if unit != "B" else str(count)


def unit_of(largest: int) -> str:
    """The largest unit of which this is ten or more, for a column."""
    return next(name for name, bytes_ in UNITS.items() if largest >= 10 * bytes_ or name == "B")


def components(counted: Memory) -> dict[str, int]:
    """What there is, by the name that the table gives it."""
    rows = {"weights": counted.weights, "gradients": counted.gradients}
    rows |= {f"state {slot}": bytes_ for slot, bytes_ in counted.state.items()}
    rest = {"scales": counted.scales, "masters": counted.masters, "average": counted.ema, "counts": counted.counters}
    return rows | {name: bytes_ for name, bytes_ in rest.items() if bytes_}


def new_table(title: str) -> Table:
    """One without columns yet, as all of them look."""
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _component_table(counted: Memory) -> Table:
    unit = unit_of(counted.total)
    table = new_table("This configuration")
    table.add_column("component", no_wrap=True)
    for heading in ("B/param", unit):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, bytes_ in components(counted).items():
        table.add_row(name, f"{counted.per_parameter(bytes_):.3f}", size(bytes_, unit))
    table.add_section()
    table.add_row("total", f"{counted.per_parameter():.3f}", size(counted.total, unit), style="bold")
    return table


def _rival_table(found: Found) -> Table:
    """Bytes per parameter, the sum, and its share of the first rival's."""
    rows = [("this configuration", found.counted), *((each.name, memory) for each, memory in found.ours)]
    rows += [(rival.name, memory) for rival, memory in found.rivals]
    unit = unit_of(max(memory.total for _, memory in rows))
    table = new_table("Beside AdamW, here and by other packages' published formats; bytes per parameter")
    table.add_column("optimizer", no_wrap=True)
    for heading in ("weights", "grads", "state", "scales", "masters, avg.", "sum", unit, "of fp32"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = found.rivals[0][1].total
    for i, (name, memory) in enumerate(rows):
        other = memory.masters + memory.ema
        parts = (memory.weights, memory.gradients, sum(memory.state.values()), memory.scales + memory.counters, other)
        cells = [f"{memory.per_parameter(part):.3f}" for part in parts]
        cells += [f"{memory.per_parameter():.3f}", size(memory.total, unit), f"{memory.total / base:.1%}"]
        table.add_row(name, *cells, style=None if i else "bold", end_section=i in (0, len(found.ours)))
    return table


def _source_table(packages: Iterable[Package]) -> Table:
    table = new_table("What they hold beside weights and gradients, and where that is read")
    for heading in ("package", "format", "source"):
        table.add_column(heading, no_wrap=heading != "format")
    for package in packages:
        table.add_row(package.name, package.format, package.source, style="dim")
    return table
