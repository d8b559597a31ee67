"""The tables of `perf.studies.state_formats`."""

from collections.abc import Callable
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]
PHASES = ("steady", "grown", "shrunk")


def percent(x: float) -> str:
    """A share in %, or a factor from 1 on."""
    return f"{100 * x:.2f}" if x < 1 else f"{x:.1f} ×" if x < 10 else f"{x:,.0f} ×"


class Printer:
    """Tables on a terminal, Markdown where output is piped."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=250)

    def select(self, **wanted: Any) -> list[Row]:
        """Rows with these values."""
        return [row for row in self.rows if all(row.get(name) == value for name, value in wanted.items())]

    def table(self, title: str, columns: list[str], lines: list[list[str]]) -> None:
        """The first column is text, the others are numbers."""
        terminal = self.console.is_terminal
        table = Table(box=box.SIMPLE_HEAD if terminal else box.MARKDOWN)
        for i, column in enumerate(columns):
            table.add_column(column, justify="right" if i else "left", no_wrap=not terminal)
        for line in lines:
            table.add_row(*line)
        self.console.print(f"\n{title}", soft_wrap=True)
        self.console.print(table)

    def pivot(self, title: str, rows: list[Row], across: Callable[[Row], str], value: Callable[[Row], str]) -> None:
        """One line per code, one column per value of ``across``, in the order in which they come."""
        columns = list(dict.fromkeys(across(row) for row in rows))
        lines: dict[str, dict[str, str]] = {}
        for row in rows:
            lines.setdefault(row["code"], {})[across(row)] = value(row)
        cells = [[code, *(found.get(column, "") for column in columns)] for code, found in lines.items()]
        self.table(title, ["code", *columns], cells)


def show(rows: list[Row]) -> None:
    """All tables."""
    printer = Printer(rows)
    (header,) = printer.select(study="header")
    printer.console.print(
        ", ".join(f"{k}: {v}" for k, v in header.items() if k not in ("study", "runs")), soft_wrap=True
    )
    for bits in (8, 4):
        _slots(printer, bits, header["steps"])
        _updates(printer, bits, header["steps"])
    _outliers(printer)
    _magnitudes(printer)
    _replays(printer)


def _slots(printer: Printer, bits: int, last: int) -> None:
    for kind, field, what in (
        ("signed", "slot_error", "error of the slot"),
        ("nonnegative", "root_error", "error of 1/√v"),
    ):
        rows = printer.select(study="once", bits=bits, kind=kind, group=64, step=last)
        title = f"{bits} bits, {kind}: {what}, rms, %, at the last step, groups of 64"
        printer.pivot(title, rows, lambda r: f"{r['run']} {r['slot']}", lambda r, f=field: percent(r[f]))


def _updates(printer: Printer, bits: int, last: int) -> None:
    for kind in ("signed", "nonnegative"):
        rows = printer.select(study="once", bits=bits, kind=kind, run="adamw", step=last)
        lines = []
        for code in dict.fromkeys(row["code"] for row in rows):
            by_group = {row["group"]: row for row in rows if row["code"] == code}
            every = [r for r in printer.select(study="once", bits=bits, code=code, group=64) if "update_error" in r]
            every = [r for r in every if r["kind"] == kind]
            row = by_group[64]
            lines.append(
                [
                    code, *(percent(by_group[g]["update_error"]) for g in (16, 32, 64, 128)),
                    percent(max(r["update_error"] for r in every)), f"{max(r['worst'] for r in every):.2g}",
                    percent(row["median"]), percent(row["over_10"]), percent(row["doubled"]),
                ]
            )  # fmt: skip
        title = (
            f"{bits} bits, {'m' if kind == 'signed' else 'v'} coded: error of Adam's update, rms, %, by size "
            "of group. For groups of 64: highest of all steps and betas, largest single error over rms, median, share "
            "of elements that change by > 10 %, by > 2 ×"
        )
        printer.table(title, ["code", "16", "32", "64", "128", "highest", "largest", "median", ">10 %", ">2 ×"], lines)
    both = printer.select(study="pair", bits=bits)
    printer.pivot(
        f"{bits} bits, m and v coded: error of the update, rms, %, groups of 64", both,
        lambda r: f"{r['run']}, step {r['step']}", lambda r: percent(r["update_error"]),
    )  # fmt: skip


def _outliers(printer: Printer) -> None:
    for bits in (8, 4):
        for kind in ("signed", "nonnegative"):
            rows = printer.select(study="outliers", bits=bits, kind=kind)
            title = f"{bits} bits, {kind}: error of Adam's update, rms, %, when one column in 64 has larger gradients"
            printer.pivot(title, rows, lambda r: f"× {r['factor']}", lambda r: percent(r["update_error"]))


def _magnitudes(printer: Printer) -> None:
    for slot in "mv":
        rows = [{**row, "code": row["scale"]} for row in printer.select(study="magnitudes")]
        title = (
            f"{slot}: share of elements, %, whose update changes by > 10 %, by rms of the gradients and type of scale"
        )
        printer.pivot(title, rows, lambda r: f"{r['magnitude']:.0e}", lambda r, s=slot: percent(r[f"lost_{s}"]))


def _replays(printer: Printer) -> None:
    found = printer.select(study="replay")
    plain = [row for row in found if row["scale"] == "fp32" and row["group"] == 64]
    other = [row for row in found if row not in plain]
    for bits in (8, 4):
        v = [row for row in plain if (row["bits"], row["kind"]) == (bits, "nonnegative")]
        for rate, wide in dict.fromkeys((row["rate"], row["outliers"]) for row in v):
            rows = [row for row in v if (row["rate"], row["outliers"]) == (rate, wide)]
            what = (
                "the sum of squares (Adagrad)" if rate == 1 else f"v, β₂ {rate:g}{', outlier columns' if wide else ''}"
            )
            _over_time(printer, f"{bits} bits, {what}", rows)
        _averages(printer, bits, [row for row in plain if (row["bits"], row["kind"]) == (bits, "signed")])
    v, m = ([row for row in other if row["kind"] == kind] for kind in ("nonnegative", "signed"))
    _over_time(printer, "8 bits, v with other scales and sizes of group", list(map(_named, v)))
    for bits in (8, 4):
        _averages(printer, bits, [_named(row) for row in m if row["bits"] == bits])


def _named(row: Row) -> Row:
    rate = "" if row["kind"] == "signed" else f", β₂ {row['rate']:g}"
    return {**row, "code": f"{row['code']}, {row['scale']}, groups of {row['group']}{rate}"}


def _averages(printer: Printer, bits: int, rows: list[Row]) -> None:
    rows = [{**row, "code": f"{row['code']}, {row['rounding']}"} for row in rows]
    printer.pivot(
        f"{bits} bits, m over time: rms error, %, in the steady state (slope on the exact one)",
        rows, lambda r: f"β₁ {r['rate']:g}{', outlier columns' if r['outliers'] else ''}",
        lambda r: f"{percent(r['steady_error'])} ({r['steady_slope']:.3f})",
    )  # fmt: skip


def _over_time(printer: Printer, title: str, rows: list[Row]) -> None:
    legend = (
        "√v over its exact value, mean ± deviation (least … most), when steady, grown tenfold, shrunk a hundredfold"
    )
    lines = []
    for row in rows:
        cells = [
            f"{row[f'{phase}_mean']:.3f} ± {row[f'{phase}_deviation']:.3f} "
            f"({row[f'{phase}_least']:.2f} … {row[f'{phase}_most']:.2f})"
            for phase in PHASES
        ]
        lines.append([f"{row['code']}, {row['rounding']}", *cells])
    printer.table(f"{title}: {legend}", ["code", *PHASES], lines)
