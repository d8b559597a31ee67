"""Python time of a step over FSDP2's DTensors: ``python -m perf.studies.fsdp_host [--out FILE]``.

One process that pretends to be a rank of eight (torch's fake process group, whose collectives return at once), so that
what is timed is host work alone; parameters of at most four elements here. Gradients are new DTensors at new addresses
in every step, as `fully_shard` makes them. Ours runs with a launcher that starts nothing; torch's fused and foreach
steps and `clip_grad_norm_` run as they are, on the CPU.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from typing import Any

import torch
from torch import distributed, nn

import fusedopt
from perf import host
from perf.clock import turns
from perf.results import machine

WORLD = 8
COUNTS = (148, 291)
SHAPES = ((4,), (2, 2), (1, 4), (3,))


class Sharded:
    """Parameters and three sets of gradients, DTensors on a mesh."""

    def __init__(self, mesh: Any, count: int) -> None:
        from torch.distributed.tensor import DTensor, Shard

        def place(local: torch.Tensor) -> Any:
            shape = torch.Size((WORLD * local.shape[0], *local.shape[1:]))
            return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=shape, stride=local.stride())

        shapes = list(islice(cycle(SHAPES), count))
        self.params = [nn.Parameter(place(torch.ones(s))) for s in shapes]
        sets = [[place(torch.ones(s)) for s in shapes] for _ in range(3)]
        self._sets: Iterator[list[Any]] = cycle(sets)

    def backward(self) -> None:
        """Gradients at other addresses than in the step before."""
        for p, grad in zip(self.params, next(self._sets), strict=True):
            p.grad = grad


def _ours(mesh: Any, count: int, **options: Any) -> host.Case:
    model: Any = Sharded(mesh, count)
    return host.ours(model, fusedopt.AdamW(model.params, backend="triton", **options), False)


def _torch(mesh: Any, count: int, clips: bool, **options: Any) -> host.Case:
    model: Any = Sharded(mesh, count)
    optimizer = torch.optim.AdamW(model.params, **options)

    def clipped() -> None:
        nn.utils.clip_grad_norm_(model.params, 1.0)
        optimizer.step()

    return host.Case(model, clipped if clips else optimizer.step)


CASES: dict[str, Callable[[Any, int], host.Case]] = {
    "fusedopt step": lambda mesh, n: _ours(mesh, n),
    "torch fused step": lambda mesh, n: _torch(mesh, n, False, fused=True),
    "torch foreach step": lambda mesh, n: _torch(mesh, n, False, foreach=True),
    "fusedopt clip + step": lambda mesh, n: _ours(mesh, n, clip_grad_norm=1.0),
    "torch fused clip + step": lambda mesh, n: _torch(mesh, n, True, fused=True),
    "torch foreach clip + step": lambda mesh, n: _torch(mesh, n, True, foreach=True),
}


def measure(rounds: int, seconds: float) -> dict[str, Any]:
    """Median, least and most microseconds of every case by number of parameters, and our share of each of torch's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    found: dict[str, Any] = {"machine": machine(), "world": WORLD, "tensors": {}}
    for count in COUNTS:
        times = turns({name: make(mesh, count) for name, make in CASES.items()}, host.Clock(), rounds, seconds)
        us = {name: [1e6 * x.host for x in times.samples[name]] for name in CASES}
        rows = {name: [round(f(x), 1) for f in (statistics.median, min, max)] for name, x in us.items()}
        work = {"step": "fusedopt step", "clip": "fusedopt clip + step"}
        share = {
            name: round(times.ratio(work["clip" if "clip" in name else "step"], name, "host")["median"], 3)
            for name in CASES if name.startswith("torch")
        }  # fmt: skip
        found["tensors"][count] = {"microseconds": rows, "our_share": share, "rounds": len(us["fusedopt step"])}
    distributed.destroy_process_group()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m perf.studies.fsdp_host", description=__doc__)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of every case (default 30)")
    parser.add_argument("--seconds", type=float, default=60.0, help="or what these allow, per count (default 60)")
    parser.add_argument("--out", help="write the numbers there too, as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(given.rounds, given.seconds)
    text = json.dumps(found, indent=1)
    if given.out:
        with open(given.out, "w") as file:
            file.write(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
