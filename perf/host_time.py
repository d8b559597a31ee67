"""Python time of a step with more rules and options: ``python -m perf.host_time``. What is timed and how: ``host.py``.

Here caches are not overwritten between steps: they hold what the other cases, which take turns, have left of them.
Around the update: torch clips, unscales and averages in functions of its own, which are timed with its fused step.
"""

import argparse
import json
import math
from typing import Any, NamedTuple

import torch

import fusedopt
from fusedopt.metrics import NAMES
from fusedopt.rules import RULES
from perf import host
from perf.clock import Times, turns
from perf.results import machine

COUNTS = (291, 1164)
CLIP: dict[str, Any] = {"clip_grad_norm": 1.0}
BASE, CLIPPED, SCALED, AVERAGED = (
    "torch fused AdamW", "torch clip + fused", "torch scaler + clip + fused", "torch clip + fused + swa_utils",
)  # fmt: skip
THEIRS = {
    BASE: ("torch fused", "step"), "torch foreach AdamW": ("torch foreach", "step"), CLIPPED: ("torch fused", "clip"),
    SCALED: ("torch fused", "amp"), AVERAGED: ("torch fused", "clip"),
}  # fmt: skip
"""torch's cases: contender and work."""


class Row(NamedTuple):
    """A case of ours. rule, options: what steps; base: torch's case beside it; launches: kernels per step.

    limit: the share of the base's time that it may take. scaled: under `fusedopt.GradScaler`.
    """

    rule: str
    options: dict[str, Any]
    base: str
    launches: int
    limit: float | None = None
    scaled: bool = False


ROWS = {
    "fusedopt AdamW": Row("adamw", {}, BASE, 2, 0.4),
    "fusedopt Adam": Row("adam", {}, BASE, 2),
    "fusedopt SGD": Row("sgd", {"momentum": 0.9}, BASE, 2),
    "fusedopt AdamW, clip": Row("adamw", CLIP, CLIPPED, 3, 0.25),
    "fusedopt AdamW, clip, metrics": Row("adamw", {**CLIP, "metrics": NAMES}, CLIPPED, 3),
    "fusedopt AdamW, scaler, clip": Row("adamw", CLIP, SCALED, 3, None, True),
    "fusedopt AdamW, clip, EMA": Row("adamw", {**CLIP, "ema_decay": 0.999}, AVERAGED, 3),
}
"""Limits are for 291 tensors and more."""
ALONE = (BASE, "torch foreach AdamW", "fusedopt AdamW", "fusedopt Adam", "fusedopt SGD")
AROUND = (
    CLIPPED, "fusedopt AdamW, clip", SCALED, "fusedopt AdamW, scaler, clip", AVERAGED,
    "fusedopt AdamW, clip, EMA", "fusedopt AdamW, clip, metrics",
)  # fmt: skip
"""Cases that take turns with one another, so that none finds warm caches."""


def case(count: int, name: str) -> host.Case:
    """By the name of one of `ROWS` or `THEIRS`."""
    if name in THEIRS:
        made = host.contender(*THEIRS[name], count)
        return averaged(made) if name == AVERAGED else made
    row, model = ROWS[name], host.Model(count)
    optimizer = getattr(fusedopt, RULES[row.rule])(model.params, backend="triton", **row.options)
    return host.ours(model, optimizer, row.scaled)


def averaged(case: host.Case) -> host.Case:
    """A case that renews torch's average of the weights after each step."""
    weights = [p.detach() for p in case.model.params]
    averages = [p.clone() for p in weights]
    renew = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)

    def step() -> None:
        case.step()
        renew(averages, weights, 1)

    return host.Case(case.model, step)


def run(count: int, rounds: int) -> Times:
    """Times of a step with ``count`` tensors.

    Raises:
        AssertionError: a step did something else than its launches and one upload of gradient addresses.
    """
    found = Times({})
    for names in (ALONE, AROUND):
        made = {name: case(count, name) for name in names}
        found.samples.update(turns(made, host.Clock(cold=False), rounds, math.inf).samples)
        for name in made.keys() & ROWS.keys():
            host.check(made[name].optimizer, ROWS[name].launches, rounds + 2)
    return found


def show(count: int, times: Times) -> None:
    """One line per case, with its ratio to torch's case beside it."""
    head = f"{count:,} tensors"
    print(f"\n{head:32}{'best':>10}{'median':>12}{'per tensor':>13}{'ratio of bests':>17}{'of medians':>13}")
    for name in times.samples:
        row = ROWS.get(name)
        base = row.base if row else BASE
        best, usual = times.best(name, "host"), times.spread(name, "host")["median"]
        median = times.ratio(name, base, "host")["median"]
        ratio = best / times.best(base, "host")
        compared = f"   of {row.base}" + (f" (allowed: {row.limit:g})" if row.limit else "") if row else ""
        print(
            f"{name:32}{best * 1e6:7,.0f} µs{usual * 1e6:9,.0f} µs{best / count * 1e6:10.2f} µs"
            f"{ratio:17.3f}{median:13.3f}{compared}"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Python time of a step on tensors of at most four elements.")
    parser.add_argument("--count", type=int, nargs="+", default=list(COUNTS), help="numbers of tensors (291 1164)")
    parser.add_argument("--rounds", type=int, default=100, help="rounds measured (100)")
    parser.add_argument("--json", action="store_true", help="print the seconds of every round as JSON")
    args = parser.parse_args()
    measured = {count: run(count, args.rounds) for count in args.count}
    if args.json:
        seconds = {n: {c: [s.host for s in t.samples[c]] for c in t.samples} for n, t in measured.items()}
        print(json.dumps({"machine": machine(), "arguments": vars(args), "seconds": seconds}))
        return
    print(", ".join(f"{name} {value}" for name, value in machine().items()))
    for count, times in measured.items():
        show(count, times)


if __name__ == "__main__":
    main()
