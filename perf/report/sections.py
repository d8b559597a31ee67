"""Sections of the report, each from the rows that it is about; empty where there are none."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from perf.cases import CASES
from perf.contenders import CONTENDERS
from perf.report.rows import GPU, by_place, longer, of, predictions, provenance, steps, who, work
from perf.report.shown import OURS, gib, inverse, markdown, median, number, percent, ranged, times
from perf.report.targets import verdicts
from perf.results import Row
from perf.work import FORMATS, WORKS

Section = Callable[[list[Row]], str]


def goals(rows: list[Row]) -> str:
    """Verdicts; nothing where there is nothing that they are about."""
    found = verdicts(rows)
    if all(verdict.value is None for verdict in found):
        return ""
    lines = [(v.target.title, f"≥ {v.target.text(v.limit)}", v.text) for v in found]
    return f"## Targets on an {GPU}\n\n" + markdown(("target", "limit", "verdict"), lines)


MEASURED = (
    "contender", "format", "work", "device ms (p20–p80)", "host µs", "wall ms (p20–p80)", "launches", "B/param", "GB/s",
    "of copy", "held GiB", "peak GiB", "÷ ours (p20–p80)",
)  # fmt: skip


def measured(rows: list[Row]) -> str:
    """The table that nobody publishes, one for each machine and case."""
    parts = []
    for where, here in by_place(of(rows, "measured")).items():
        copies = sorted(x for row in here if (x := median(row.get("ceiling_gb_s"))) is not None)
        text = f"## Measured on {where}\n\n{provenance(here)}."
        if copies:
            text += f" A plain copy in the same rounds: {number(copies[0])} to {number(copies[-1])} GB/s."
        parts.append(text)
        for case in dict.fromkeys((row["case"], row.get("part"), row.get("tensors")) for row in here):
            own = [row for row in here if (row["case"], row.get("part"), row.get("tensors")) == case]
            parts.append(f"### {_case(own[0])}\n\n{markdown(MEASURED, map(_measured, own))}")
    return "\n\n".join(parts) + ("\n\n" + LEGEND if parts else "")


LEGEND = """\
B/param: counted in our code, or derived (d) from the passes that the others make. GB/s: those bytes over device time;
of copy: over what a plain copy moved in the same rounds. Held: between steps, gradients included; peak: during a step.
Device time of a step that waits for the device (foreach under a GradScaler) has the wait in it.
÷ ours: their time to ours in the same round (device time; on a CPU wall time): 2 × means that ours takes half."""


def _case(row: Row) -> str:
    case = row["case"]
    title = f"{case}: {CASES[case].title}" if case in CASES else case
    part = "" if row.get("part") in (None, "whole") else f", {row['part']}"
    count = row.get("tensors", 0)
    return f"{title}{part} ({count:,} tensor{'s' * (count != 1)}, {row.get('elements', 0):,} elements)"


def _measured(row: Row) -> list[str]:
    on_gpu = row.get("device") == "cuda"
    moved = number(row.get("bytes"), 4) + (" (d)" if row.get("bytes_from") == "derived" else "")
    return [
        who(row), row.get("format", ""), work(row), ranged(row.get("device_ms")) if on_gpu else "",
        number(row.get("host_us")) if on_gpu else "", ranged(row.get("wall_ms")), number(row.get("launches"), 9),
        moved, number(row.get("gb_s"), 4), percent(row.get("share")), gib(row.get("held_bytes")),
        gib(row.get("peak_bytes")), ranged(inverse(row.get("ratio"))),
    ]  # fmt: skip


def kept(rows: list[Row]) -> str:
    """What those that appear keep of weights and moments: it differs within a format."""
    names = {row.get("contender") for row in (*of(rows, "measured"), *of(rows, "predicted"))}
    found = [contender for name, contender in CONTENDERS.items() if name in names]
    if not found:
        return ""
    lines = [
        (f"**{c.name}**" if c.name == OURS else c.name, *(c.formats.get(form, "") for form in FORMATS)) for c in found
    ]
    return f"## What each keeps\n\n{markdown(('contender', *FORMATS), lines, left=True)}"


def predicted(rows: list[Row]) -> str:
    """What the model says, beside what was measured since; a table for each case."""
    parts = []
    real = {_about(row): row for row in of(rows, "measured", device="cuda", graph=False)}
    for title in dict.fromkeys(_case(row) for row in predictions(rows)):
        lines: dict[tuple[str, str], dict[str, str]] = {}
        for row in predictions(rows):
            if _case(row) == title:
                line = lines.setdefault((who(row), row["format"]), {})
                line[row["work"]] = _guess(row, real.get(_about(row)))
        columns = ("contender", "format", *(f"{each.title}, ms" for each in WORKS.values()), "")
        cells = [(*key, *(line.get(name, "") for name in WORKS), "predicted") for key, line in lines.items()]
        parts.append(f"### {title}\n\n{markdown(columns, cells)}")
    head = f"## Predicted, not measured: times on an {GPU}\n\n{PREDICTION}"
    return "\n\n".join([head, *parts]) if parts else ""


PREDICTION = """\
Device time / wall time, as `perf/predict/` has them from bytes, instructions, launches and the bandwidth of a copy.
Behind it, where there is one, what was measured, and in brackets measured device time over predicted."""


def _about(row: Row) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in ("case", "part", "tensors", "format", "work", "contender"))


def _guess(row: Row, real: Row | None) -> str:
    def pair(found: Row) -> str:
        return " / ".join(filter(None, (number(found.get("device_ms")), number(found.get("wall_ms")))))

    guess, found = median(row.get("device_ms")), median((real or {}).get("device_ms"))
    if not guess or not found or real is None:
        return pair(row)
    return f"{pair(row)}; {pair(real)} measured ({times(found / guess)})"


def code(rows: list[Row]) -> str:
    """From machine code: nothing was run."""
    found = steps(rows)
    if not found:
        return ""
    columns = (
        "format",
        "work",
        "arch",
        "launches",
        "B/param",
        "instructions/param",
        "registers",
        "spills",
        "widths, bit",
    )
    lines = [[form, work(kernels[0]), arch, *step(kernels)] for (form, _, arch), kernels in found.items()]
    made = provenance(of(rows, "code"))
    return (
        f"## Compiled code\n\nOur AdamW, read from machine code ({made}). Per parameter of aligned full chunks.\n\n"
        + (markdown(columns, lines))
    )


def step(kernels: Sequence[Row]) -> list[str]:
    """Launches, bytes, instructions, registers, spills and widths of the kernels of a step."""

    def total(name: str, digits: int) -> str:
        found = [x for k in kernels if (x := median(k.get(name))) is not None]
        return number(sum(found), digits) if found else ""

    registers = " / ".join(str(k["registers"]) for k in kernels if k.get("registers") is not None)
    widths = sorted({w for k in kernels for w in _widths(k.get("widths"))}, reverse=True)
    return [
        number(kernels[0].get("launches", len(kernels)), 9), total("bytes", 4), total("instructions", 3), registers,
        total("spills", 9), ", ".join(map(str, widths)),
    ]  # fmt: skip


def _widths(found: Any) -> Iterable[Any]:
    return found if isinstance(found, list | dict) else () if found is None else (found,)


def host(rows: list[Row]) -> str:
    """Microseconds by number of tensors, and what each takes of ours."""
    parts = []
    for where, here in by_place(of(rows, "host")).items():
        counts = sorted({row["tensors"] for row in here})
        lines = []
        for key in dict.fromkeys((row.get("work"), row.get("contender")) for row in here):
            own = {row["tensors"]: row for row in here if (row.get("work"), row.get("contender")) == key}
            first = next(iter(own.values()))
            lines.append([who(first), work(first), *(_beside_ours(own.get(n), here) for n in counts)])
        head = ("contender", "work", *(f"{n:,} tensors, µs" for n in counts))
        parts.append(
            f"## Host time of a step, on {where}\n\n{provenance(here)}. Our launches are stubbed; in brackets how many "
            f"times ours.\n\n{markdown(head, lines)}"
        )
    return "\n\n".join(parts)


def _beside_ours(row: Row | None, rows: list[Row]) -> str:
    if row is None:
        return ""
    ours = of(rows, "host", contender=OURS, work=row.get("work"), tensors=row["tensors"])
    found = longer(row, ours[0]) if ours and ours[0] is not row else None
    return number(row.get("host_us")) + (f" ({times(found)})" if found else "")


def simple(kind: str, title: str, columns: dict[str, Callable[[Row], str]], needed: str = "kind") -> Section:
    """A section that is one table: a line for each row of a kind that has the field that is needed."""

    def section(rows: list[Row]) -> str:
        found = [row for row in of(rows, kind) if needed in row]
        lines = [[cell(row) for cell in columns.values()] for row in found]
        return f"## {title}\n\n{_made(found)}{markdown(tuple(columns), lines)}" if found else ""

    return section


def _made(rows: Sequence[Row]) -> str:
    """Where and by what, for each machine, unless that says nothing."""
    if rows[0]["kind"] in ("missing", "red"):
        return ""
    return "".join(f"On {where}: {provenance(here)}.\n\n" for where, here in by_place(rows).items())


def text(name: str) -> Callable[[Row], str]:
    """A field as it is."""
    return lambda row: "" if row.get(name) is None else str(row[name])


def value(name: str, digits: int = 3) -> Callable[[Row], str]:
    """A number with its percentiles."""
    return lambda row: ranged(row.get(name), digits)


def outcome(row: Row) -> str:
    """Of a stage."""
    return "not run" if row.get("ok") is None else "passed" if row["ok"] else "FAILED"


SECTIONS: tuple[Section, ...] = (
    goals,
    measured,
    kept,
    simple("train", "A training step of a Transformer", {
        "contender": who, "format": text("format"), "tokens/s": value("tokens_per_s", 4), "step ms": value("step_ms"),
        "of it the optimizer": lambda row: percent(row.get("optimizer_share")),
        "peak GiB": lambda row: gib(row.get("peak_bytes")),
    }),
    simple("first", "The first step in a new process", {
        "contender": who, "format": text("format"), "work": work, "s, nothing compiled": value("cold_s"),
        "s, compiled before": value("warm_s"),
    }),
    simple("tune", "Launch shapes tried", {
        "row of the table": text("row"), "shape": text("name"), "case": text("case"),
        "device ms (p20–p80)": value("device_ms"), "÷ the present shape's": value("ratio"),
    }, needed="device_ms"),
    predicted,
    code,
    simple("compile", "Seconds to compile a step's kernels", {
        "format": text("format"), "work": work, "arch": text("arch"), "s, cold": value("cold_s"),
        "s, warm": value("warm_s"),
    }),
    host,
    simple("copy", "Bandwidth of a plain copy", {"device": text("device"), "GB/s": value("gb_s", 4)}),
    simple("stage", "Tests and tools that ran beside", {
        "name": text("name"), "": outcome, "s": value("seconds"),
        "last line": text("line"),
    }),
    simple("red", "Not measured, because the result was wrong or it failed", {
        "contender": who, "case": text("case"), "format": text("format"), "work": work, "why": text("why"),
    }),
    simple("missing", "Not installed here", {
        "contender": who, "how to install it": lambda row: f"`{row.get('install', '')}`",
    }),
)  # fmt: skip
"""In the order of the report; an empty one is left out."""
