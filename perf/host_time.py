"""Python time of a step: ``python -m perf.host_time``.

Tensors of at most four elements, so that a step is all host work. Ours runs with a launcher that starts nothing; every
validation is in, and so is the upload of the pointer table, which on the CPU is a copy in memory. Gradients lie at
new addresses in every step. torch's optimizers run as they are: their kernels take 1 µs a tensor and less here.

Around the update: torch clips, unscales and averages in functions of its own, which are timed with its fused step.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any, NamedTuple

import torch

import fusedopt
from fusedopt.metrics import NAMES
from fusedopt.rules import RULES
from fusedopt_kernels import launch

from .interleaved import Times, machine, measure

COUNTS = (291, 1164)
SHAPES = ((4,), (2, 2), (), (3,), (1, 4), (1,))
CLIP: dict[str, Any] = {"clip_grad_norm": 1.0}
BASE, CLIPPED, SCALED, AVERAGED = (
    "torch fused AdamW", "torch clip + fused", "torch scaler + clip + fused", "torch clip + fused + swa_utils",
)  # fmt: skip


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


class Case(NamedTuple):
    """A model of its own, its optimizer, and what is timed."""

    model: Model
    optimizer: Any
    step: Callable[[], object]


def theirs(count: int, name: str) -> Case:
    """One of torch's cases."""
    model = Model(count)
    foreach = "foreach" in name
    optimizer = torch.optim.AdamW(model.params, foreach=foreach, fused=not foreach)
    if name == SCALED:
        return Case(model, optimizer, under(torch.amp.GradScaler("cpu", init_scale=1.0), optimizer, model.params))
    weights = [p.detach() for p in model.params]
    averages = [p.clone() for p in weights]
    renew = torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)

    def step() -> None:
        if name in (CLIPPED, AVERAGED):
            torch.nn.utils.clip_grad_norm_(model.params, 1.0)
        optimizer.step()
        if name == AVERAGED:
            renew(averages, weights, 1)

    return Case(model, optimizer, step)


def under(scaler: torch.amp.GradScaler, optimizer: Any, clipped: list[torch.nn.Parameter] | None) -> Callable[[], None]:
    """A step and an update of a scaler; ``clipped``: gradients are unscaled and clipped before, as torch's recipe."""
    scaler.scale(torch.ones(()))  # it makes its tensors then

    def step() -> None:
        if clipped is not None:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(clipped, 1.0)
        scaler.step(optimizer)
        scaler.update()

    return step


def ours(count: int, row: Row) -> Case:
    """One of our cases."""
    model = Model(count)
    optimizer = getattr(fusedopt, RULES[row.rule])(model.params, backend="triton", **row.options)
    optimizer._launcher = Silent()
    scaler = fusedopt.GradScaler("cpu", init_scale=1.0)
    return Case(model, optimizer, under(scaler, optimizer, None) if row.scaled else optimizer.step)


def run(count: int, rounds: int) -> Times:
    """Times of a step with ``count`` tensors.

    Raises:
        AssertionError: a step did something else than its launches and one upload of gradient addresses.
    """
    seconds: dict[str, list[float]] = {}
    for names in (ALONE, AROUND):
        made = {name: ours(count, ROWS[name]) if name in ROWS else theirs(count, name) for name in names}
        calls = {name: case.step for name, case in made.items()}
        seconds.update(measure(calls, rounds, prepare=lambda name, made=made: made[name].model.backward()).seconds)
        for name in made.keys() & ROWS.keys():
            check(made[name].optimizer, ROWS[name].launches, rounds + 2)
    return Times(seconds)


def check(optimizer: Any, launches: int, steps: int) -> None:
    """Every step was its launches and one upload of gradient addresses."""
    (tables,) = optimizer._tables
    assert optimizer._launcher.launches == launches * steps and optimizer._launcher.compiles == launches
    assert tables.grads.uploads == steps


def show(count: int, times: Times) -> None:
    """One line per case, with its ratio to torch's case beside it."""
    head = f"{count:,} tensors"
    print(f"\n{head:32}{'best':>10}{'median':>12}{'per tensor':>13}{'ratio of bests':>17}{'of medians':>13}")
    for name in times.seconds:
        row = ROWS.get(name)
        best, (ratio, median) = times.best(name), times.ratio(name, row.base if row else BASE)
        compared = f"   of {row.base}" + (f" (allowed: {row.limit:g})" if row.limit else "") if row else ""
        print(
            f"{name:32}{best * 1e6:7,.0f} µs{times.median(name) * 1e6:9,.0f} µs{best / count * 1e6:10.2f} µs"
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
        seconds = {count: times.seconds for count, times in measured.items()}
        print(json.dumps({"machine": machine(), "arguments": vars(args), "seconds": seconds}))
        return
    print(machine())
    for count, times in measured.items():
        show(count, times)


if __name__ == "__main__":
    main()
