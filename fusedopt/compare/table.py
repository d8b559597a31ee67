"""The tables of a comparison, for the terminal and for the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..schedules import NAMES
from . import classes, results
from .results import Group, Spread

if TYPE_CHECKING:
    import rich.table

LOWEST, NEAR, UNTUNED = "**", "≈", "†"
MEASURED = {"chrf_train": "chrF,\ntraining", "chrf_held_out": "chrF,\nheld out"}
"""Of what a task measures at the end of a run, what the tables show, and its heading."""


class Table(NamedTuple):
    """Cells of text. Columns in which nothing stands are not shown."""

    title: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]

    def shown(self) -> list[list[str]]:
        """The heads and the lines."""
        kept = [i for i in range(len(self.heads)) if i == 0 or any(line[i] for line in self.lines)]
        return [[line[i] for i in kept] for line in (self.heads, *self.lines)]

    def markdown(self) -> str:
        """The table without its title."""
        heads, *lines = self.shown()
        heads = [" ".join(head.split()) for head in heads]
        rule = ["---", *["---:"] * (len(heads) - 1)]
        return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *lines))

    def rich(self) -> rich.table.Table:
        """The table for a terminal; what is marked as the lowest is bold."""
        from rich import box
        from rich.table import Table as RichTable
        from rich.text import Text

        heads, *lines = self.shown()
        table = RichTable(
            title=self.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0)
        )
        for i, head in enumerate(heads):
            table.add_column(head, justify="right" if i else "left", no_wrap=i + 1 < len(heads))
        for line in lines:
            table.add_row(*(Text(cell.replace(LOWEST, ""), "bold" if LOWEST in cell else "") for cell in line))
        return table


def by_class(groups: Sequence[Group], target: float | None) -> list[Table]:
    """One table for each class that occurs."""
    heads = ["optimizer", "schedule", "batch", "lr", "final loss", "lowest loss", *MEASURED.values(),
             "steps to\ntarget", "ms per\nstep", "optimizer,\nms", "MB\nheld", "not finished"]  # fmt: skip
    noise = results.Noise(groups)
    lines: dict[str, list[list[str]]] = {}
    for group in groups:
        held = group.median("held_bytes")
        cells = [
            group.optimizer, group.schedule, batch(group), rate(group), _final(group, noise),
            losses(group.spread("val_loss_best")), *(losses(group.spread(key), 1) for key in MEASURED),
            steps(group, target), number(group.median("step_ms")), number(group.median("optimizer_ms")),
            number(held / 1e6 if held else None), unfinished(group),
        ]  # fmt: skip
        lines.setdefault(classes.class_of(group.optimizer), []).append(cells)
    return [Table(title, heads, lines[title]) for title in classes.CLASSES if title in lines]


def by_schedule(groups: Sequence[Group]) -> Table | None:
    """Final losses, optimizer × schedule; None for a single schedule, or when the batch size is varied, too."""
    if any(group.batch_size is not None for group in groups):
        return None
    columns = [name for name in NAMES if any(group.schedule == name for group in groups)]
    return _crossed("Final validation loss by schedule", groups, columns, (lambda g: g.optimizer, lambda g: g.schedule))


def by_batch_size(groups: Sequence[Group]) -> Table | None:
    """Final losses, optimizer and schedule × batch size; None for a single size."""
    columns = list(dict.fromkeys(batch(group) for group in sorted(groups, key=results.examples)))
    names = (lambda g: f"{g.optimizer} {g.schedule}"), batch
    return _crossed("Final validation loss by batch size", groups, columns, names)


Name = Callable[[Group], str]


def _crossed(title: str, groups: Sequence[Group], columns: Sequence[str], names: tuple[Name, Name]) -> Table | None:
    """names: of the line and of the column that a group stands in."""
    line, column = names
    if len(columns) < 2:
        return None
    noise = results.Noise(groups)
    found: dict[str, dict[str, str]] = {}
    for group in groups:
        found.setdefault(line(group), {})[column(group)] = _final(group, noise) or unfinished(group)
    return Table(title, ["", *columns], [[name, *(own.get(c, "") for c in columns)] for name, own in found.items()])


def legend(groups: Sequence[Group], target: float | None) -> list[str]:
    """What the marks and columns mean, of those that occur."""
    lines = []
    if any(group.done for group in groups):
        lines.append("final loss: of validation, after the last step; lowest loss: of all validations of a run")
        lines.append("bold: the lowest mean final loss of all classes")
    if any(results.Noise(groups).covers(group) for group in groups):
        lines[-1] += (
            f"; {NEAR}: above it by no more than the two standard deviations together, so these runs do not tell them "
            "apart (a deviation below the median of all counts as the median)"
        )
    seeds = {len(group.done) for group in groups}
    if max(seeds, default=0) > 1:
        lines.append(f"±: standard deviation over {'' if len(seeds) == 1 else 'at most '}{max(seeds)} seeds")
    if target is not None:
        lines.append(
            f"steps to target: median of the steps after which validation first gave {target:g} or less (2 of 3: of so "
            "many runs; –: of none)"
        )
    if any(UNTUNED in rate(group) for group in groups):
        lines.append(f"{UNTUNED}: not tuned at this size, the default of fusedopt train")
    return lines


def batch(group: Group) -> str:
    """The batch size where it is an axis."""
    return "" if group.batch_size is None else str(group.batch_size)


def rate(group: Group) -> str:
    """The learning rate, after scaling; marked when it is not a tuned one."""
    rates = [row["config"]["lr"] for row in group.rows if "config" in row]
    rates += [row["own"]["lr"] for row in group.rows if "lr" in row["own"]]
    mark = UNTUNED if any(row["tuned"] is None for row in group.rows) else ""
    return (f"{rates[0]:.3g}" if rates else "") + mark


def _final(group: Group, noise: results.Noise) -> str:
    text = losses(group.spread("val_loss_last"))
    if not text:
        return ""
    if group is noise.lowest:
        return f"{LOWEST}{text}{LOWEST}"
    return f"{NEAR} {text}" if noise.covers(group) else text


def losses(found: Spread | None, digits: int = 3) -> str:
    """Mean ± standard deviation."""
    if found is None:
        return ""
    return f"{found.mean:.{digits}f}" + ("" if found.std is None else f" ± {found.std:.{digits}f}")


def number(value: float | None) -> str:
    """To three digits."""
    return "" if value is None else f"{value:.3g}"


def steps(group: Group, target: float | None) -> str:
    """Median of the steps to the target, and of how many runs if not all came there."""
    reached = [] if target is None else group.steps_to(target)
    if target is None or not group.done:
        return ""
    if not reached:
        return "–"
    of = "" if len(reached) == len(group.rows) else f" ({len(reached)} of {len(group.rows)})"
    return f"{statistics.median_low(reached)}{of}"


def unfinished(group: Group) -> str:
    """How many runs diverged, and when, and how many were refused."""
    diverged = [str(row["step"]) for row in group.rows if row["status"] == "diverged"]
    refused = group.count("refused")
    parts = [f"{len(diverged)} diverged (step {', '.join(diverged)})"] if diverged else []
    return "; ".join(parts + ([f"{refused} refused"] if refused else []))
