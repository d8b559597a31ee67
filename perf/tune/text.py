"""What `python -m perf.tune` prints and puts into the note, in Markdown."""

from collections.abc import Iterable, Iterator, Sequence
from math import prod

from fusedopt_kernels import table
from perf.cases import CASES
from perf.report.shown import markdown, number, ranged
from perf.results import Row
from perf.tune.choice import Choice, by_row, from_code, from_times, mean, rank, ratios, refused
from perf.tune.code import CHIPS, MAIN
from perf.tune.trials import CHUNKS, PRESENT, TRIALS


def of_code(rows: Sequence[Row]) -> str:
    """Rows that were read from code."""
    arch = MAIN if any(row["arch"] == MAIN for row in rows) else rows[0]["arch"]
    head = f"`python -m perf.tune` without a GPU, Triton {rows[0]['machine']['triton']}, {arch}. **Predictions.**"
    return "\n\n".join([head, *_code(rows, arch), _choices(from_code(rows, arch))])


def of_times(rows: Sequence[Row]) -> str:
    """Rows that were measured."""
    machine = rows[0]["machine"]
    gpu = machine.get("gpu", machine["cpu"])
    parts = [f"`python -m perf.tune` on {gpu}, Triton {machine['triton']}. Device time as a ratio (p20–p80)."]
    for kind, here in by_row(rows):
        parts += [f"{kind}: {TRIALS[kind].form.title}", _times(here)]
    choices, chunk = from_times(rows, gpu)
    lines = [choice.line for choice in choices]
    if chunk != table.CHUNK:
        lines.append(f"CHUNK = {chunk}  # table.py")
    parts += [_choices(choices), "Rows that follow:", "```python\n" + "\n".join(lines) + "\n```"]
    return "\n\n".join(parts)


def _choices(choices: Iterable[Choice]) -> str:
    return "\n".join(f"* {c.kind}: {c.name}; {c.why}." for c in choices)


def _code(rows: Sequence[Row], arch: str) -> Iterator[str]:
    for kind, here in by_row(rows):
        if own := [row for row in here if row["arch"] == arch]:
            yield f"{kind}: {TRIALS[kind].form.title}"
            yield _candidates(own)
    others = [row for row in rows if row["arch"] != arch and row["name"] == PRESENT]
    if others:
        yield "The present shapes on other architectures:"
        yield _elsewhere(others)
    fp32 = [row for row in rows if (row["row"], row["name"], row["arch"]) == ("fp32", PRESENT, arch)]
    if fp32:
        yield "How often the chunks of a model fill the GPU with programs, by how long they are:"
        yield _waves(fp32[0])


def _candidates(rows: Sequence[Row]) -> str:
    """The present one first, then as ranked, then those refused."""
    columns = ("shape", "registers", "programs", "KB in flight", "instr.", "tail", "memory ps", "issue ps", "")
    order = sorted(rows, key=lambda row: (row["name"] != PRESENT, bool(refused(row)), *rank(row)))
    return markdown(columns, [(_title(r), *_numbers(r), refused(r)) for r in order])


def _numbers(row: Row) -> tuple[str, ...]:
    flight, instructions = f"{row['in_flight'] / 1e3:.0f}", f"{row['instructions']:.1f}"
    counted = (str(row["registers"]), str(row["programs_per_sm"]), flight, instructions)
    tail = "" if row["tail_instructions"] is None else f"{row['tail_instructions']:.0f}"
    return (*counted, tail, f"{row['memory_ps']:.2f}", f"{row['issue_ps']:.2f}")


def _elsewhere(rows: Iterable[Row]) -> str:
    columns = ("", "registers", "programs", "KB in flight", "instr.", "tail", "memory ps", "issue ps", "needed KB")
    lines = [(f"{r['row']}, {r['arch']}", *_numbers(r), f"{r['needed'] / 1e3:.0f}") for r in rows]
    return markdown(columns, lines)


def _waves(row: Row) -> str:
    chip = CHIPS[row["arch"]]
    held = row["programs_per_sm"] * chip.multiprocessors
    sizes = sorted({table.CHUNK, *CHUNKS})
    lines = []
    for name in dict.fromkeys(case for trial in TRIALS.values() for case in trial.cases):
        shapes = CASES[name].shapes().values()
        lines.append((name, *(f"{sum(-(-prod(s) // n) for s in shapes) / held:.2f}" for n in sizes)))
    return markdown((f"fp32, {held:,} programs at once", *(f"{n:,}" for n in sizes)), lines)


def _times(rows: Sequence[Row]) -> str:
    """Case by case, the present one first, then the fastest."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    found = {(row["name"], row["case"]): row for row in rows}
    lines = []
    for name, own in sorted(ratios(rows).items(), key=lambda item: (item[0] != PRESENT, mean(item[1]))):
        cells = [_time(found.get((name, case))) for case in cases]
        lines.append((_title(next(row for row in rows if row["name"] == name)), *cells, number(mean(own))))
    return markdown(("shape", *cases, "mean"), lines)


def _time(row: Row | None) -> str:
    if row is None:
        return ""
    return f"{ranged(row['device_ms'])} ms" if row["name"] == PRESENT else ranged(row["ratio"])


def _title(row: Row) -> str:
    if row["name"] != PRESENT:
        return row["name"]
    return f"**present**: {row['block']} / {row['tail']}, {row['warps']} warps"
