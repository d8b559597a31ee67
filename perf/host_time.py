"""Python time of a step: ``python -m perf.host_time``.

Tensors of at most four elements, so that a step is all host work. Ours runs with a launcher that starts nothing; every
validation is in, and so is the upload of the pointer table, which on the CPU is a copy in memory. Gradients lie at
new addresses in every step. torch's optimizers run as they are: their kernels take 1 µs a tensor and less here.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch

import fusedopt
from fusedopt.rules import RULES
from fusedopt_kernels import launch

from .interleaved import Times, machine, measure

COUNTS = (291, 1164)
SHAPES = ((4,), (2, 2), (), (3,), (1, 4), (1,))
OPTIONS: dict[str, dict[str, Any]] = {"adamw": {}, "adam": {}, "sgd": {"momentum": 0.9}}
BASE = "torch fused AdamW"
LIMIT = 0.4
"""A step of our AdamW may take this share of torch's fused one."""


class Silent(launch.Recorder):
    """Counts launches; starts none and keeps nothing."""

    def first(self, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> Any:
        return spec.fn

    def again(self, kernel: Any, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
        pass


class Model:
    """Tiny parameters, and three sets of gradients that take turns."""

    def __init__(self, count: int) -> None:
        shapes = [SHAPES[i % len(SHAPES)] for i in range(count)]
        self.params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
        sets = [[torch.ones(s) for s in shapes] for _ in range(3)]
        self._sets: Iterator[list[torch.Tensor]] = cycle(sets)

    def backward(self) -> None:
        """Gradients at other addresses than in the step before."""
        for p, grad in zip(self.params, next(self._sets), strict=True):
            p.grad = grad


def cases(count: int) -> dict[str, tuple[Model, Any]]:
    """(model, optimizer) of every case, each over parameters of its own."""
    found: dict[str, tuple[Model, Any]] = {}
    theirs: tuple[tuple[str, dict[str, Any]], ...] = (
        (BASE, {"fused": True}),
        ("torch foreach AdamW", {"foreach": True}),
    )
    for label, options in theirs:
        model = Model(count)
        found[label] = model, torch.optim.AdamW(model.params, **options)
    for rule, options in OPTIONS.items():
        model = Model(count)
        optimizer = getattr(fusedopt, RULES[rule])(model.params, backend="triton", **options)
        optimizer._launcher = Silent()
        found[f"fusedopt {RULES[rule]}"] = model, optimizer
    return found


def run(count: int, rounds: int) -> Times:
    """Times of a step with ``count`` tensors.

    Raises:
        AssertionError: a step did something else than two launches and one upload of gradient addresses.
    """
    made = cases(count)

    calls = {name: optimizer.step for name, (_, optimizer) in made.items()}
    times = measure(calls, rounds, prepare=lambda name: made[name][0].backward())
    for name, (_, optimizer) in made.items():
        if name.startswith("fusedopt"):
            (tables,) = optimizer._tables
            steps = rounds + 2
            assert optimizer._launcher.launches == 2 * steps and optimizer._launcher.compiles == 2, name
            assert tables.grads.uploads == steps, name
    return times


def show(count: int, times: Times) -> None:
    """One line per case, with its ratio to torch's fused AdamW."""
    print(f"\n{count:,} tensors{'best':>20}{'median':>12}{'per tensor':>13}{'ratio of bests':>17}{'of medians':>13}")
    for name in times.seconds:
        best, (ratio, median) = times.best(name), times.ratio(name, BASE)
        allowed = f"   (allowed: {LIMIT:g})" if name == "fusedopt AdamW" else ""
        print(
            f"{name:22}{best * 1e6:7,.0f} µs{times.median(name) * 1e6:9,.0f} µs{best / count * 1e6:10.2f} µs"
            f"{ratio:17.3f}{median:13.3f}{allowed}"
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
        seconds = {count: times.seconds for count, times in measured.items()}
        print(json.dumps({"machine": machine(), "arguments": vars(args), "seconds": seconds}))
        return
    print(machine())
    for count, times in measured.items():
        show(count, times)


if __name__ == "__main__":
    main()
