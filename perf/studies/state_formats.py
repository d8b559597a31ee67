"""Which code for optimizer state loses least: ``python -m perf.studies.state_formats``.

State of the default training job is coded once (error of the slot and of Adam's update, also with outlier columns and
with gradients of other magnitudes), and coded again in each of 3000 steps on recorded gradients. Codes are simulated
with plain tensors; for training with the real ones see `perf.studies.losses`. Piped output is Markdown; `--out` keeps
all rows.
"""

import argparse
import json
import platform
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from perf.studies import state_tables
from perf.studies.recorded import RUNS, record
from perf.studies.state_codes import SCALES, Format
from perf.studies.state_studies import Replay, Row, magnitudes, once, outliers

ROUNDINGS = ("nearest", "stochastic", "sequence")
REPLAYED = {
    (8, "nonnegative"): ("square root, no 0", "4th root, no 0", "log e4m4", "integer log e4m4"),
    (4, "nonnegative"): ("linear, no 0", "square root, no 0", "4th root, no 0", "integer log e3m1", "integer log e4m0"),
    (8, "signed"): ("linear", "square root", "softsign", "float e3m4"),
    (4, "signed"): ("linear", "square root", "softsign"),
}
"""Codes that are followed over time."""
RATES = {"nonnegative": (0.999, 0.95, 1.0), "signed": (0.9, 0.99)}
"""Decay of the averages that are replayed; 1 is Adagrad's sum."""

LINEAR_8, ROOT_8 = Format(8, "signed", "linear"), Format(8, "signed", "square root")
LINEAR_4, FOURTH_8 = Format(4, "signed", "linear"), Format(8, "nonnegative", "4th root, no 0")
FLOAT_8 = Format(8, "nonnegative", "float e4m3, no 0")


def replays(seed: int) -> Iterator[Replay]:
    """Codes by decay, for the first also with outlier columns; types of scale; sizes of group."""
    for rounding in ROUNDINGS:
        for (bits, kind), names in REPLAYED.items():
            for how in (Format(bits, kind, name) for name in names):
                yield from (Replay(how, rate, False, rounding, seed) for rate in RATES[kind])
                yield Replay(how, RATES[kind][0], True, rounding, seed)
        for scale in list(SCALES)[1:]:
            yield Replay(FOURTH_8._replace(scale=scale), 0.999, False, rounding, seed)
        for scale in ("fp32", "bf16, up"):
            scaled = FLOAT_8._replace(scale=scale)
            yield from (Replay(scaled, rate, False, rounding, seed) for rate in RATES["nonnegative"][:2])
        for how in (LINEAR_8, ROOT_8, LINEAR_4):
            for size in (32, 64):
                scaled = how._replace(scale="bf16, up", group=size)
                yield from (Replay(scaled, rate, False, rounding, seed) for rate in RATES["signed"])
        for size in (16, 32, 128):
            yield Replay(FOURTH_8._replace(group=size), 0.999, False, rounding, seed)
            yield Replay(LINEAR_8._replace(group=size), 0.9, False, rounding, seed)


def from_run(name: str, steps: int, seed: int) -> tuple[list[Row], Any]:
    """What is measured on the state of one run, and its gradients from half-way on."""
    recording = record(name, steps, seed)
    rows = list(once(recording))
    if name == "adamw":
        rows += [*outliers(recording, seed), *magnitudes(recording)]
    return rows, recording.gradients[steps // 2 :].numpy()


def measure(args: argparse.Namespace) -> list[Row]:
    """All rows, by processes of one thread each."""
    with ProcessPoolExecutor(args.workers, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        runs = {name: pool.submit(from_run, name, args.steps, args.seed) for name in args.runs}
        _, gradients = runs["adamw"].result()
        jobs = [pool.submit(replay.run, gradients, args.replay_steps) for replay in replays(args.seed)]
        return [row for future in runs.values() for row in future.result()[0]] + [job.result() for job in jobs]


def header(args: argparse.Namespace) -> Row:
    """What the numbers depend on."""
    found = subprocess.run(("git", "rev-parse", "HEAD"), cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "study": "header", "commit": found.stdout.strip() or None, "python": platform.python_version(),
        "torch": torch.__version__, "processor": platform.machine(), "seed": args.seed, "steps": args.steps,
        "replay_steps": args.replay_steps, "runs": args.runs,
    }  # fmt: skip


def shortened(row: Row) -> Row:
    """Numbers with five digits."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description="Which code for optimizer state loses least.")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS), help="optimizers to record (all)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the training job (100)")
    parser.add_argument("--replay-steps", type=int, default=3000, help="steps of the replay (3000)")
    parser.add_argument("--seed", type=int, default=0, help="of the job and of all random numbers (0)")
    parser.add_argument("--workers", type=int, default=2, help="processes (2)")
    parser.add_argument("--out", type=Path, help="JSON lines to write, one row each")
    parser.add_argument("--show", type=Path, help="print the tables of such a file instead of measuring")
    args = parser.parse_args()
    if "adamw" not in args.runs:
        parser.error("--runs: adamw must be among them, because its state and gradients are used throughout")
    if args.steps < 20 or args.replay_steps < 30:
        parser.error("--steps must be at least 20 and --replay-steps at least 30")
    if args.show:
        rows = [json.loads(line) for line in args.show.read_text().splitlines()]
    else:
        rows = [header(args), *measure(args)]
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("".join(json.dumps(shortened(row)) + "\n" for row in rows))
    state_tables.show(rows)


if __name__ == "__main__":
    main()
