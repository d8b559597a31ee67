"""Final validation losses of the main job over formats of weights and state: ``python -m perf.studies.losses``.

Every run is `fusedopt train` as it is (1000 steps on Python's own sources), on one thread; equal seeds see the same
weights and data. A finished run is a line of ``results/losses.jsonl``, so that ``--resume`` goes on where a table was
interrupted; the table, made of the newest line of each format and seed, goes into ``notes/losses.md``.
Arguments after ``--`` are added to every run; tables of different ones are kept apart.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from fusedopt.train import checkpoint, metrics
from perf import marked

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- table of perf.studies.losses: begin -->", "<!-- table of perf.studies.losses: end -->"
LAST = 100
"""The training loss is the mean over so many last steps: one batch says little."""


def _bf16(master: str, state: str, *more: str) -> tuple[str, ...]:
    return ("--dtype", "bf16", "--master", master, "--state", state, *more)


RANDOM_STATE = ("--state-rounding", "stochastic")
FORMATS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "fp32-perturbed": ("--optimizer-arg", "eps=1.01e-8"),
    "bf16": ("--dtype", "bf16"),
    "float32+float32": _bf16("float32", "float32"),
    "split16+float32": _bf16("split16", "float32"),
    "split16+int8": _bf16("split16", "int8"),
    "split16+bfloat16-random": _bf16("split16", "bfloat16", *RANDOM_STATE),
    "split8+int8": _bf16("split8", "int8"),
    "split8+int8-random": _bf16("split8", "int8", *RANDOM_STATE),
    "split8-nearest+int8": _bf16("split8", "int8", "--master-rounding", "nearest"),
    "kahan+int8": _bf16("kahan", "int8"),
    "stochastic+int8": _bf16("stochastic", "int8"),
    "split8+float8": _bf16("split8", "float8"),
    "split8+int4": _bf16("split8", "int4"),
    "split8+int4-random": _bf16("split8", "int4", *RANDOM_STATE),
}
"""Name → arguments of `fusedopt train`. Names are master+state, both of bf16 weights; "fp32-perturbed" changes
last bits only, and shows what that alone does to a run; "bf16" is what torch.optim does."""
REFERENCE, EXACT = "fp32", "float32+float32"
SEEDS = {REFERENCE: (0, 1, 2, 3, 4)}
"""More seeds where the spread is taken from."""

Row = dict[str, Any]
Table = dict[str, dict[int, Row]]
"""Format → seed → its newest row."""


def main() -> int:
    """Run what is missing, then print and write the table. 1 when a run failed."""
    parser = argparse.ArgumentParser(description="Final validation losses of the main job over formats.")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME",
                        help=f"formats to run (all): {', '.join(FORMATS)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds of every format (0 1 2; fp32: 0 to 4)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (2)")
    parser.add_argument("--resume", action="store_true", help="leave out what has a line already")
    parser.add_argument("--table", action="store_true", help="run nothing, make the table")
    parser.add_argument("--folder", type=Path, default=ROOT / "perf", help="where results/ and notes/ are (perf)")
    parser.add_argument("arguments", nargs="*", help="after --: arguments of fusedopt train for every run")
    options = parser.parse_args()
    results = options.folder / "results" / "losses.jsonl"
    failed = [] if options.table else run_all(options, results)
    table = select(read(results), options.arguments)
    text = show(table) if REFERENCE in table else "no fp32 runs yet: no table\n"
    print(text)
    if REFERENCE in table and not options.arguments:
        write(options.folder / "notes" / "losses.md", text)
    for name in failed:
        print(f"failed: {name}", file=sys.stderr)
    return 1 if failed else 0


def run_all(options: argparse.Namespace, results: Path) -> list[str]:
    """Run the chosen formats and seeds, seed by seed, so that every format has one before any has two. What failed."""
    have = select(read(results), options.arguments) if options.resume else {}
    chosen = {name: options.seeds or SEEDS.get(name, (0, 1, 2)) for name in options.formats}
    seeds = sorted({seed for own in chosen.values() for seed in own})
    jobs = [(name, seed) for seed in seeds for name in chosen if seed in chosen[name]]
    jobs = [(name, seed) for name, seed in jobs if seed not in have.get(name, {})]
    results.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(options.jobs) as pool:
        done = list(pool.map(lambda job: run(job[0], job[1], options.arguments, results), jobs))
    return [f"{name}, seed {seed}: {error}" for (name, seed), error in zip(jobs, done, strict=True) if error]


def run(name: str, seed: int, arguments: Sequence[str], results: Path) -> str:
    """One run; its row is appended to `results`. A run that diverged is a result, any other failure is returned."""
    with tempfile.TemporaryDirectory() as folder:
        settings = ["--device", "cpu", "--backend", "eager", "--seed", str(seed), "--out", folder]
        command = [sys.executable, "-m", "fusedopt.cli", "train", *FORMATS[name], *arguments, *settings]
        path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        before, start = commit(), time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        last = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        if done.returncode and not (done.returncode == 1 and "try a lower --lr" in last[0]):
            return last[0]
        row: Row = {
            "format": name,
            "seed": seed,
            "arguments": list(arguments),
            **outcome(Path(folder), done.returncode),
        }
        row |= {"seconds": round(time.perf_counter() - start), "commit": before if before == commit() else "changed"}
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    loss = "diverged" if row["val_loss"] is None else f"{row['val_loss']:.4f}"
    print(f"{name}, seed {seed}: {loss} ({row['seconds']} s)", flush=True)
    return ""


def outcome(folder: Path, status: int) -> Row:
    """What a run's folder says: losses (None when it diverged), bytes, settings, and what its bits depend on."""
    rows = metrics.read(folder)
    validation = [row["val_loss"] for row in rows if "val_loss" in row]
    training = [row["loss"] for row in rows if "loss" in row]
    row: Row = {
        "val_loss": None if status else validation[-1],
        "val_loss_best": min(validation),
        "train_loss": None if status else statistics.fmean(training[-LAST:]),
        "settings": json.loads((folder / "config.json").read_text()),
    }
    row["settings"].pop("out")
    if not status:
        row["bytes_per_parameter"] = json.loads((folder / "summary.json").read_text())["runs"]["fusedopt"][
            "bytes_per_parameter"
        ]
    saved = checkpoint.load(folder)
    return {**row, "environment": saved["environment"] if saved else None}


def commit() -> str:
    """The checkout's commit, with "-dirty" when files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def read(results: Path) -> list[Row]:
    """The rows so far; a line that was cut short is left out."""
    rows = []
    for line in results.read_text().splitlines() if results.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def select(rows: Iterable[Row], arguments: Sequence[str]) -> Table:
    """The newest row of each format and seed among those with these arguments.

    Raises:
        SystemExit: they were not all trained on the same text.
    """
    table: Table = {}
    for row in rows:
        if row["arguments"] == list(arguments) and row["format"] in FORMATS:
            table.setdefault(row["format"], {})[row["seed"]] = row
    texts = {row["environment"]["text"] for own in table.values() for row in own.values() if row["environment"]}
    if len(texts) > 1:
        raise SystemExit(
            "perf.studies.losses: the rows are of different texts (Python versions): keep them in other --folders"
        )
    return {name: table[name] for name in FORMATS if name in table}


def show(table: Table) -> str:
    """The table as Markdown, with what it is measured by."""
    losses = {name: {seed: row["val_loss"] for seed, row in sorted(own.items())} for name, own in table.items()}
    reference = [loss for loss in losses[REFERENCE].values() if loss is not None]
    spread = max(reference) - min(reference)
    deviation = statistics.stdev(reference) if len(reference) > 1 else math.nan
    lines = [
        f"Spread of fp32 over {len(reference)} seeds: mean {statistics.fmean(reference):.4f}, range {spread:.4f} "
        f"({min(reference):.4f} to {max(reference):.4f}), standard deviation {deviation:.4f} nats per byte.",
        "Within: on average over the seeds no more than one standard deviation above fp32 of the same seed, and for no "
        "seed more than the range.",
        "",
        "| weights + state | B per parameter | final validation loss, mean | each seed | − fp32 of the same seed, "
        "mean ± std | in std of fp32 | largest | − exact bf16, mean | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in losses.items():
        held = next((row["bytes_per_parameter"] for row in table[name].values() if "bytes_per_parameter" in row), {})
        size = f"{sum(held.values()):.2f}" if held else ""
        each = ", ".join("diverged" if loss is None else f"{loss:.4f}" for loss in own.values())
        finished = [loss for loss in own.values() if loss is not None]
        mean = f"{statistics.fmean(finished):.4f}" if finished else ""
        cells = [name, size, mean, each, *comparison(name, losses, deviation, spread)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", provenance(table), ""])


def comparison(name: str, losses: dict[str, dict[int, float | None]], deviation: float, spread: float) -> list[str]:
    """The last five cells: differences of equal seeds to fp32 and to bf16 with an exact optimizer, and the verdict."""
    if name == REFERENCE:
        return ["", "", "", "", "reference"]
    if None in losses[name].values():
        return ["", "", "", "", "**outside**: diverged"]
    pairs = differences(losses[name], losses[REFERENCE])
    if not pairs:
        return ["", "", "", "", "no seed in common"]
    comparable = "--dtype" in FORMATS[name] and name != EXACT
    exact = differences(losses[name], losses.get(EXACT, {})) if comparable else []
    mean, largest = statistics.fmean(pairs), max(pairs)
    scatter = f" ± {statistics.stdev(pairs):.4f}" if len(pairs) > 1 else ""
    verdict = "within" if mean <= deviation and largest <= spread else "**outside**"
    few = "" if len(pairs) > 2 else f", of {len(pairs)} seeds only"
    if math.isnan(deviation):
        verdict, few = "one seed of fp32 has no spread", ""
    to_exact = f"{statistics.fmean(exact):+.4f}" if exact else ""
    return [f"{mean:+.4f}{scatter}", f"{mean / deviation:+.2f}", f"{largest:+.4f}", to_exact, verdict + few]


def differences(ours: dict[int, float | None], theirs: dict[int, float | None]) -> list[float]:
    """Ours − theirs, of the seeds that both have."""
    pairs = ((loss, theirs.get(seed)) for seed, loss in ours.items())
    return [a - b for a, b in pairs if a is not None and b is not None]


def provenance(table: Table) -> str:
    """Job, machine, versions and commits of the rows shown."""
    rows = [row for own in table.values() for row in own.values()]
    settings = rows[0]["settings"]
    machines = sorted({row["environment"]["processor"] for row in rows if row["environment"]})
    keys = ("fusedopt", "torch", "numpy")
    versions = sorted(
        {", ".join(f"{k} {row['environment'][f'version of {k}']}" for k in keys) for row in rows if row["environment"]}
    )
    return (
        f"`fusedopt train`: {settings['optimizer']}, {settings['steps']} steps of {settings['batch_size']} x "
        f"{settings['max_seq_len']} bytes, hidden size {settings['hidden_size']}, {settings['num_layers']} layers; "
        f"{'; '.join(machines)}, one thread, eager backend; {'; '.join(versions)}; commits "
        f"{', '.join(sorted({row['commit'] for row in rows}))}."
    )


def write(notes: Path, text: str) -> None:
    """Put the table between its markers in `notes`, at the end when there are none."""
    marked.write(notes, text, (BEGIN, END), "Final losses over formats")


if __name__ == "__main__":
    sys.exit(main())
