"""What each format of weights and state loses over 10⁴ steps: ``python -m perf.studies.drift``.

Decay alone, the way of float64 under the same gradients, the final loss on a noisy quadratic, and gradients of every
size; `drift_studies` says how each is measured. Everything runs on eager twins, whose bits kernels share (AdamW on
wide state and all weights; compiled quantised state may differ by a code in a thousand). Rows go into
``results/drift.jsonl``, tables into ``notes/drift.md``. Six minutes on two free cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

import fusedopt
from perf import marked
from perf.studies.drift_studies import DECAY, LR, MAGNITUDES, RATES, STUDIES, Row

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- tables of perf.studies.drift: begin -->", "<!-- tables of perf.studies.drift: end -->"
DECAYED = ("torch bf16", "bf16", "float32", "split16", "split8", "split8-nearest", "kahan", "stochastic")
WEIGHTS = tuple(f"{name}+float32" for name in ("bf16", *DECAYED[2:]))
STATES = (
    "float32", "bfloat16", "bfloat16-random", "float16", "int8", "int8-random", "float8_e4m3", "float8_e4m3-random",
    "float8_e5m2", "int4", "int4-random",
)  # fmt: skip
BOTH = ("split8+int8", "kahan+int8", "stochastic+int8", "split8+float8_e4m3", "split8+int4")
FORMATS = ("fp32", "torch bf16", "bf16", *WEIGHTS, *(f"fp32+{name}" for name in STATES[1:]), *BOTH)
"""Weights+state. fp32 is what torch.optim does with fp32 weights, and what the others are measured by."""
SEEDS = 4
"""Noises under which fp32 runs, to show how much a final loss says."""

LION = ("bf16", "split8", "kahan")
"""Weights that Lion decays too: decay is the same code whatever the rule."""
Job = tuple[str, tuple[Any, ...]]
"""(study, its arguments)."""


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description="What each format of weights and state loses over many steps.")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES), help="(all)")
    parser.add_argument("--steps", type=int, default=10_000, help="of decay and of the quadratic (10000)")
    parser.add_argument("--short", type=int, default=100, help="steps for each size of gradients (100)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (2)")
    parser.add_argument("--folder", type=Path, default=ROOT / "perf", help="where results/ and notes/ are (perf)")
    parser.add_argument("--table", action="store_true", help="measure nothing, make the tables of what is there")
    options = parser.parse_args()
    if min(options.steps, options.short, options.workers) < 1:
        parser.error("--steps, --short and --workers must be at least 1")
    results = options.folder / "results" / "drift.jsonl"
    if not options.table:
        results.parent.mkdir(parents=True, exist_ok=True)
        with results.open("w") as file:
            for row in measure(options):
                print(json.dumps(row), file=file, flush=True)
    elif not results.exists():
        parser.error(f"--table: there is no {results} yet")
    text = show([json.loads(line) for line in results.read_text().splitlines()])
    write(options.folder / "notes" / "drift.md", text)
    print(text)


def jobs(options: argparse.Namespace) -> list[Job]:
    """What is to be run."""
    steps, short = options.steps, options.short
    made: dict[str, Iterable[tuple[Any, ...]]] = {
        "decay": [("AdamW", name, steps) for name in DECAYED] + [("Lion", name, steps) for name in LION],
        "follow": [(FORMATS[n :: options.workers], steps) for n in range(options.workers)],
        "closed": [(name, steps) for name in FORMATS] + [("fp32", steps, seed) for seed in range(1, SEEDS)],
        "magnitudes": [(name, short) for name in STATES],
        "half scales": [(short,)],
    }
    return [(name, arguments) for name in options.studies for arguments in made[name]]


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """What the numbers depend on, then all rows in the order of the jobs."""
    yield header(options)
    with ProcessPoolExecutor(options.workers, get_context("spawn"), _prepare) as pool:
        for future in [pool.submit(_run, *job) for job in jobs(options)]:
            yield from future.result()


def _prepare() -> None:
    torch.set_num_threads(1)


def _run(study: str, arguments: tuple[Any, ...]) -> list[Row]:
    with warnings.catch_warnings():  # that averages get stuck in bf16 is what is shown
        warnings.filterwarnings("ignore", "state 'exp_avg_sq' takes its parameter's dtype", UserWarning)
        return STUDIES[study](*arguments)


def header(options: argparse.Namespace) -> Row:
    """What the numbers depend on."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    versions = {"fusedopt": fusedopt.__version__, "torch": torch.__version__, "triton": triton.__version__}
    row: Row = {"study": "header", "commit": commit or "unknown", "python": platform.python_version(), **versions}
    return {**row, "machine": platform.machine(), "cores": os.cpu_count(), "steps": options.steps}


# --------------------------------------------------------------------------------------------------------- tables
def show(rows: list[Row]) -> str:
    """The tables as Markdown."""
    head = rows[0]
    made = [
        f"{name(own)}\n\n{text}"
        for study, name, table in TABLES
        if (own := [row for row in rows if row["study"] in study]) and (text := table(own))
    ]
    versions = ", ".join(f"{key} {head[key]}" for key in ("python", "fusedopt", "torch", "triton"))
    return "\n\n".join([*made, f"{versions}; {head['machine']}; eager backend; commit {head['commit']}."])


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def percent(x: float | None) -> str:
    """In %, with as many digits as say something; "inf" where a number overflowed."""
    if x is None:
        return "inf"
    small = abs(x) < 0.001
    return f"{100 * x:.1g} %" if small else f"{100 * x:.{2 if abs(x) < 0.1 else 1 if abs(x) < 10 else 0}f} %"


def decay_table(rows: list[Row]) -> str:
    """Share of the decay that was done, by format and rate."""
    of = {(row["rule"], row["format"], row["rate"]): row for row in rows}
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    lines = []
    for rule in rules:
        for name in dict.fromkeys(row["format"] for row in rows if row["rule"] == rule):
            found = [of[rule, name, rate] for rate in RATES]
            lines.append([rule, name, *(f"{percent(r['share'])} ± {percent(r['deviation'])}" for r in found)])
    exact = [percent(of[rules[0], lines[0][1], rate]["exact"]) for rate in RATES]
    return _table(["rule", "weights", *(f"lr·wd = {rate:g}" for rate in RATES)], [["", "exact", *exact], *lines])


def long_table(rows: list[Row]) -> str:
    """Distance from float64, and the final loss against fp32's, by format."""
    closed = {row["format"]: row for row in rows if row["study"] == "closed" and row["seed"] == 0}
    follow = {row["format"]: row for row in rows if row["study"] == "follow"}
    spread = [row["loss"] for row in rows if row["study"] == "closed" and row["format"] == "fp32"]
    lines = []
    for name in dict.fromkeys((*follow, *closed)):
        cells = ["", "", ""]
        if name in follow:
            cells = [percent(follow[name][key]) for key in ("error", "share", "forward")]
        size, ratios = "", ["", ""]
        if "fp32" in closed and name in closed:
            size = f"{closed[name]['bytes']:.2f}"
            ratios = [f"{closed[name][key] / closed['fp32']['loss']:.4f}" for key in ("held", "loss")]
        lines.append([name, size, *cells, *ratios])
    head = ["weights+state", "B/parameter", "error", "share of the way", "error of the weights", "final loss, held"]
    table = _table([*head, "final loss, weights"], lines)
    if len(spread) > 1:
        deviation = statistics.stdev(spread) / statistics.fmean(spread)
        table += f"\n\nfp32 under {len(spread)} noises: final loss ± {percent(deviation)} (standard deviation)."
    return table


def magnitude_table(rows: list[Row]) -> str:
    """Error of the way by format of state and size of the gradients."""
    kept = [row for row in rows if row["study"] == "magnitudes"]
    lines = []
    for name in dict.fromkeys(row["state"] for row in kept):
        own = [row for row in kept if row["state"] == name]
        same = "all" if all(row["same bits"] for row in own) else "no"
        lines.append([name, *(percent(row["error"]) for row in own), same])
    if half := [row for row in rows if row["study"] == "half scales"]:
        lines.append(["(a scale in fp16 alone)", *(percent(row["error"]) for row in half), "no"])
    return _table(["state", *(f"{x:g}" for x in MAGNITUDES), "same bits"], lines)


TABLES: tuple[tuple[tuple[str, ...], Callable[[list[Row]], str], Callable[[list[Row]], str]], ...] = (
    (
        ("decay",),
        lambda rows: (
            f"**Decay alone**, {rows[0]['steps']} steps: share of the exact decay 1 − (1 − lr·wd)ⁿ that was done, mean "
            "over the elements ± deviation of one element."
        ),
        decay_table,
    ),
    (
        ("follow", "closed"),
        lambda rows: (
            f"**AdamW, {rows[0]['steps']} steps**, lr {LR:g} with cosine to 0, weight decay {DECAY:g}. Error, share of "
            "the way: against float64 under the same gradients. Final loss: on a noisy quadratic, over fp32's."
        ),
        long_table,
    ),
    (
        ("magnitudes", "half scales"),
        lambda rows: f"**Sizes of gradients**, {rows[0]['steps']} steps of AdamW, ε = 1e-30: error of the way.",
        magnitude_table,
    ),
)
"""Studies, heading and table."""


def write(notes: Path, text: str) -> None:
    """Put the tables between their markers in `notes`, at the end when there are none."""
    marked.write(notes, text, (BEGIN, END), "Drift")


if __name__ == "__main__":
    main()
