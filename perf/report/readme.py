"""The README's section on speed: small tables, each with how its numbers are known and the command that finds them."""

from collections.abc import Iterator, Sequence

from perf.report.rows import FUSED, Beside, beside, by_place, longer, of, predictions, provenance, steps, work
from perf.report.sections import step
from perf.report.shown import OURS, markdown, number, percent, times
from perf.report.targets import verdicts
from perf.results import Row
from perf.run import FIRST
from perf.work import FORMATS

MEASURE, COUNT = "python -m perf --all --minutes 9", "python -m perf --device cpu"
MOST = 12
"""Lines of a table of times."""

LEGEND = """\
{fused} ÷ ours and the like: their time divided by ours; 2 × means that ours takes half, below 1 × ours is slower.
Formats: {formats} (ours and FlashOptim's keep 8 more bits of each weight, the others nothing). What each contender
keeps: [perf/REPORT.md](perf/REPORT.md#what-each-keeps)."""


def section(rows: Sequence[Row], images: Sequence[str]) -> str:
    """In Markdown. images: addresses of plots."""
    tables = [text for part in (_times, _goals, _code, _host, _cpu) if (text := part(rows))]
    pictures = "\n\n".join(f"![{address.rpartition('/')[2].partition('.')[0]}]({address})" for address in images)
    pictures += (
        f"\n\nPlots by `{COUNT}`, and with measured times by `{MEASURE}`; each says which it shows." if images else ""
    )
    formats = "; ".join(f"**{form.name}**: {form.title}" for form in FORMATS.values())
    formats = LEGEND.format(fused=FUSED, formats=formats)
    more = (
        "This section is written by `python -m perf.report perf/results/no-gpu.jsonl --readme`, with files of GPUs "
        "beside it. How it is measured and predicted: [perf/notes/bench.md](perf/notes/bench.md). Other cases, who is "
        "missing: [perf/REPORT.md](perf/REPORT.md)."
    )
    return "\n\n".join(["## Speed", formats, *tables, *filter(None, [pictures]), more])


def _times(rows: Sequence[Row]) -> str:
    """Of the jobs that tell most: measured, or else predicted."""
    measured = of(rows, "measured", device="cuda", graph=False)
    word = "" if measured else " predicted"
    lines = []
    for line in _first(measured or predictions(rows)):
        mine, fused, best = line
        share = percent(mine.get("share")) if measured else ""
        device, wall = (f"{times(longer(fused, mine, f))}{word}" if fused else "" for f in ("device_ms", "wall_ms"))
        other = f"{times(longer(best, mine))}{word}: {best['contender']}" if best else ""
        part = "" if mine.get("part") in (None, "whole") else f", {mine['part']}"
        name = (mine["case"] + part, mine["format"], work(mine))
        lines.append((*name, f"{number(mine.get('device_ms'))} ms{word}", share, device, wall, other))
    if not lines:
        return ""
    head = f"**Predicted for an H200 from bytes, instructions and launches, not measured**, by `{COUNT}`."
    if measured:
        again = "python -m perf --case CASE --format FORMAT --work WORK"
        head = f"**Measured on {', '.join(by_place(measured))}**, by `{MEASURE}`; a line again by `{again}`. "
        head += f"{provenance(measured)}."
    columns = (
        "case",
        "format",
        "work",
        "fusedopt, device",
        "of a copy",
        f"{FUSED} ÷ ours, device",
        "wall",
        "best other ÷ ours",
    )
    return f"{head}\n\n{markdown(columns, lines)}"


def _first(rows: Sequence[Row]) -> Iterator[Beside]:
    """In the order in which they are measured, some lines only."""
    found = {(mine["case"], mine["format"], mine["work"]): line for line in beside(rows) if (mine := line.mine)}
    jobs = [key[:3] for key in FIRST if key[:3] in found and not key[3]]
    return (found[job] for job in jobs[:MOST])


def _goals(rows: Sequence[Row]) -> str:
    known = [verdict for verdict in verdicts(rows) if verdict.value is not None]
    if not known:
        return ""
    lines = [(v.target.title, f"≥ {v.target.text(v.limit)}", v.text) for v in known]
    head = f"**Targets on an H200**: measured by `{MEASURE}`, predicted by `{COUNT}`."
    return f"{head}\n\n{markdown(('target', 'limit', 'verdict'), lines)}"


def _code(rows: Sequence[Row]) -> str:
    lines = [
        (form, work(kernels[0]), *step(kernels)[:5])
        for (form, _, arch), kernels in steps(rows).items() if arch == "sm_90"
    ]  # fmt: skip
    if not lines:
        return ""
    head = f"**Counted in the machine code for sm_90**, by `{COUNT}`; nothing was run."
    columns = ("format", "work", "launches", "B/param", "instructions/param", "registers of each kernel", "spills")
    return f"{head}\n\n{markdown(columns, lines)}"


def _host(rows: Sequence[Row]) -> str:
    """Of torch's fused step to ours, by number of tensors."""
    parts = []
    for where, here in by_place(of(rows, "host")).items():
        lines = [line for line in beside(here) if line.fused]
        counts = sorted({line.mine["tensors"] for line in lines})
        cells = [
            (work(own[0].mine), *(_at(own, count) for count in counts))
            for name in dict.fromkeys(line.mine["work"] for line in lines)
            if (own := [line for line in lines if line.mine["work"] == name])
        ]
        head = (
            f"**Python time of a step: {FUSED} ÷ ours**, measured on {where}, by `{COUNT}`, caches overwritten before "
        )
        head += "each step. Our launches are stubbed; torch's kernels run, about 1 µs a tensor."
        if cells:
            parts.append(
                f"{head} {provenance(here)}.\n\n{markdown(('work', *(f'{n:,} tensors' for n in counts)), cells)}"
            )
    return "\n\n".join(parts)


def _at(lines: Sequence[Beside], count: int) -> str:
    found = next((line for line in lines if line.mine["tensors"] == count), None)
    return times(longer(found.fused, found.mine)) if found and found.fused else ""


def _cpu(rows: Sequence[Row]) -> str:
    """The eager backend beside torch's optimizers."""
    parts = []
    for where, here in by_place(of(rows, "measured", device="cpu", graph=False)).items():
        lines = []
        for job in dict.fromkeys((row["case"], row["format"], row["work"]) for row in here):
            own = [row for row in here if (row["case"], row["format"], row["work"]) == job]
            mine = next((row for row in own if row["contender"] == OURS), None)
            if mine is not None:
                rest = [f"{r['contender']} {times(longer(r, mine))}" for r in own if r is not mine and longer(r, mine)]
                lines.append((*job[:2], work(mine), f"{number(mine.get('wall_ms'))} ms", ", ".join(rest)))
        head = f"**On a CPU (eager backend)**, measured on {where}, by `{COUNT}`. {provenance(here)}."
        if lines:
            parts.append(f"{head}\n\n{markdown(('case', 'format', 'work', 'fusedopt', 'others ÷ ours'), lines)}")
    return "\n\n".join(parts)
