"""The eager backend against torch.optim on CPU tensors: ``python -m perf.eager_cpu``.

20 fp32 tensors of a million elements, the same for all. torch.optim's default on the CPU is its for-loop; its fused
form is one C++ kernel and moves the least memory there is: 28 bytes per parameter for Adam and AdamW. Ours runs the
twin operation by operation. Correctness first: after two steps from the same state the results must agree.
"""

import argparse
import json
from typing import Any

import torch

import fusedopt
from fusedopt.rules import RULES

from .interleaved import Times, machine, measure

OPTIONS: dict[str, dict[str, Any]] = {"adamw": {}, "adam": {}, "sgd": {"momentum": 0.9}}
BYTES = {"adamw": 28, "adam": 28, "sgd": 20}
"""Bytes per fp32 parameter that a step must move: gradient read, parameter and state read and written."""
LIMIT = 4.0
"""The eager backend may take this many times as long as torch's fused form."""


def optimizers(rule: str, tensors: int, elements: int) -> dict[str, Any]:
    """torch's for-loop and fused optimizers and ours, each over its own copy of the same parameters and gradients."""
    theirs, ours = getattr(torch.optim, RULES[rule]), getattr(fusedopt, RULES[rule])
    makers = {
        "torch for-loop": lambda p: theirs(p, **OPTIONS[rule]),
        "torch fused": lambda p: theirs(p, fused=True, **OPTIONS[rule]),
        "fusedopt eager": lambda p: ours(p, backend="eager", **OPTIONS[rule]),
    }
    made = {}
    for name, make in makers.items():
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(elements, generator=generator)) for _ in range(tensors)]
        for p in params:
            p.grad = torch.randn(elements, generator=generator)
        made[name] = make(params)
    return made


def check(made: dict[str, Any]) -> float:
    """Step all twice; the largest difference of a parameter from torch's for-loop.

    Raises:
        ArithmeticError: it exceeds what a few roundings explain.
    """
    for optimizer in made.values():
        optimizer.step()
        optimizer.step()
    params = {name: o.param_groups[0]["params"] for name, o in made.items()}
    pairs = zip(params["fusedopt eager"], params["torch for-loop"], strict=True)
    worst = max(float((a.detach() - b.detach()).abs().max()) for a, b in pairs)
    if not worst < 4e-6:  # a few roundings of numbers up to 8
        raise ArithmeticError(f"the eager step is off by {worst:.3g}; nothing was measured")
    return worst


def show(times: Times, gigabytes: float) -> None:
    """One line per optimizer, then the two ratios that count."""
    print(f"\n{'':18}{'best':>10}{'median':>10}{'best':>12}")
    for name in times.seconds:
        best, median = times.best(name), times.median(name)
        print(f"{name:18}{best * 1e3:7.1f} ms{median * 1e3:7.1f} ms{gigabytes / best:7.1f} GB/s")
    print(f"\n{'fusedopt eager to':18}{'of bests':>10}{'median':>10}")
    for base, limit in (("torch for-loop", 1.0), ("torch fused", LIMIT)):
        of_bests, median = times.ratio("fusedopt eager", base)
        print(f"{base:18}{of_bests:10.2f}{median:10.2f}   (allowed: {limit:g})")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="The eager backend against torch.optim on CPU tensors.")
    parser.add_argument("--rule", choices=sorted(OPTIONS), default="adamw")
    parser.add_argument("--tensors", type=int, default=20, help="number of tensors (20)")
    parser.add_argument("--elements", type=int, default=1_000_000, help="elements of each (1,000,000)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds measured (15)")
    parser.add_argument("--threads", type=int, help="threads (torch's default)")
    parser.add_argument("--json", action="store_true", help="print the seconds of every round as JSON")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    made = optimizers(args.rule, args.tensors, args.elements)
    worst = check(made)
    times = measure({name: o.step for name, o in made.items()}, args.rounds)
    if args.json:
        print(json.dumps({"machine": machine(), "arguments": vars(args), "seconds": times.seconds}))
        return
    print(machine())
    print(f"{RULES[args.rule]}, {args.tensors} fp32 tensors of {args.elements:,} elements, {args.rounds} rounds")
    print(f"largest difference from torch's for-loop after two steps: {worst:.2g}")
    show(times, BYTES[args.rule] * args.tensors * args.elements / 1e9)


if __name__ == "__main__":
    main()
