"""Python time of steps on tensors of at most four elements, so that a step is all host work: rows of kind host.

Ours runs with a launcher that starts nothing; every validation is in, and so is the upload of the pointer table, which
on the CPU is a copy in memory. Gradients lie at new addresses in every step. Others run as they are: torch's kernels
take 1 µs a tensor and less here.
"""

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedopt
from fusedopt_kernels import launch
from perf.cases import CASES
from perf.clock import Sample, Times, turns
from perf.contenders import CONTENDERS, FUSEDOPT, Setup
from perf.contenders.ours import build
from perf.results import Writer, rounded
from perf.work import FORMATS, WORKS

SHAPES = ((4,), (2, 2), (), (3,), (1, 4), (1,))


class Silent(launch.Recorder):
    """Counts launches; starts none and keeps nothing."""

    def first(self, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> Any:
        return spec.fn

    def again(self, kernel: Any, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
        pass


class Model:
    """Tiny parameters, and three sets of gradients that take turns."""

    def __init__(self, count: int) -> None:
        shapes = list(islice(cycle(SHAPES), count))
        self.params = [torch.nn.Parameter(torch.ones(s)) for s in shapes]
        sets = [[torch.ones(s) for s in shapes] for _ in range(3)]
        self._sets: Iterator[list[torch.Tensor]] = cycle(sets)

    def backward(self) -> None:
        """Gradients at other addresses than in the step before."""
        for p, grad in zip(self.params, next(self._sets), strict=True):
            p.grad = grad

    def setup(self, work: str) -> Setup:
        """What a contender is given."""
        return Setup(self.params, FORMATS["fp32"], WORKS[work])


class Case(NamedTuple):
    """A model of its own, what is timed, and the optimizer if it is ours."""

    model: Model
    step: Callable[[], object]
    optimizer: Any = None

    def __call__(self) -> object:
        return self.step()


def ours(model: Model, optimizer: Any, scaled: bool) -> Case:
    """An optimizer of ours, its launches stubbed. scaled: under `fusedopt.GradScaler`."""
    optimizer._launcher = Silent()
    if not scaled:
        return Case(model, optimizer.step, optimizer)
    scaler = fusedopt.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))  # it makes its tensors then

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return Case(model, step, optimizer)


def contender(name: str, work: str, count: int) -> Case:
    """What `python -m perf` measures, over ``count`` tiny tensors."""
    model = Model(count)
    if name == FUSEDOPT.name:
        return ours(model, build(model.setup(work), backend="triton"), WORKS[work].scaled)
    return Case(model, CONTENDERS[name].make(model.setup(work)))


def check(optimizer: Any, launches: int, steps: int) -> None:
    """Every step was its launches and one upload of gradient addresses."""
    (tables,) = optimizer._tables
    found, uploads = optimizer._launcher.launches, tables.grads.uploads
    assert found == launches * steps, f"{found} launches in {steps} steps, {launches} in each expected"
    assert optimizer._launcher.compiles == launches, f"{optimizer._launcher.compiles} kernels, {launches} expected"
    assert uploads == steps, f"{uploads} uploads in {steps} steps"


COUNTED = ("gpt2", "resnet50", "llama3-8b", "vit-h-14", "tiny-1000", "tiny-10000", "qwen3-30b-a3b")
"""Cases whose numbers of tensors are measured."""
GRAD_SCALE = "torch fused, clipping by grad_scale"
TURNS = (
    (FUSEDOPT.name, "step"), ("torch fused", "step"), ("torch foreach", "step"), (GRAD_SCALE, "clip"),
    (FUSEDOPT.name, "clip"), ("torch fused", "clip"), ("torch foreach", "clip"),
    (FUSEDOPT.name, "amp"), ("torch fused", "amp"), (GRAD_SCALE, "amp"),
)  # fmt: skip
"""Contenders and works in the order in which they take turns: ours apart, so that its code has left the caches."""
WARM = 2
"""Rounds before those that count."""
LAUNCHES = {"step": 2, "clip": 3, "amp": 3}


class Clock:
    """Host time of a case's step on new gradients. cold: with what a backward pass leaves of the caches, nothing."""

    def __init__(self, cold: bool = True) -> None:
        self._flush = np.zeros(2**23 if cold else 0, np.uint8)  # not torch's, whose threads would go on to spin

    def sample(self, call: Any) -> Sample:
        call.model.backward()
        self._flush += 1
        begin = time.perf_counter()
        call.step()
        seconds = time.perf_counter() - begin
        return Sample(seconds, seconds, seconds)


class Allocations(TorchDispatchMode):
    """Counts tensors that operators allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = (t for t in tree_leaves(result) if isinstance(t, torch.Tensor))
        self.count += sum(t.untyped_storage().data_ptr() not in known for t in made)
        return result


def allocations(case: Case) -> int:
    """Tensors that one step allocates, after steps that made what stays."""
    with Allocations() as seen:  # plans are of the mode that they were made in
        for _ in range(3):
            case.model.backward()
            case.step()
        seen.count = 0
        case.model.backward()
        case.step()
    return seen.count


def rows(writer: Writer, names: Sequence[str] = COUNTED, rounds: int = 40, seconds: float = 12.0) -> None:
    """Host times with as many tensors as these cases have: so many rounds of each, or what the seconds allow."""
    for name in names:
        fitted = CASES[name].fitted(math.inf)
        assert fitted is not None
        try:
            _rows(writer, name, fitted.tensors, (rounds, seconds))
        except Exception as failure:  # of this number of tensors only
            writer.add("red", contender="all", case=name, why=f"host time: {type(failure).__name__}: {failure}"[:300])
        gc.collect()


def _rows(writer: Writer, name: str, count: int, limits: tuple[int, float]) -> None:
    cases = {f"{who} {work}": contender(who, work, count) for who, work in TURNS}
    times = turns(cases, Clock(), *limits, warm=WARM)
    for who, work in TURNS:
        key = f"{who} {work}"
        writer.add("host", **fields(cases[key], times, key), case=name, tensors=count, work=work, contender=who)


def fields(case: Case, times: Times, key: str) -> dict[str, Any]:
    """What a row says of a case.

    Raises:
        AssertionError: a step of ours did something else than its launches and one upload, or allocated.
    """
    found: dict[str, Any] = {"device": "cpu", "format": "fp32", "rounds": len(times.samples[key])}
    found["host_us"] = {name: rounded(1e6 * value, 4) for name, value in times.spread(key, "host").items()}
    work = key.rpartition(" ")[2]
    if case.optimizer is None:
        ratio = times.ratio(f"{FUSEDOPT.name} {work}", key, "host")
        return {
            **found,
            "ratio": {name: rounded(value, 4) for name, value in ratio.items()},
            "allocations": allocations(case),
        }
    check(case.optimizer, LAUNCHES[work], len(times.samples[key]) + WARM)
    made = allocations(case)
    assert made == 0, f"{key}: a step allocates {made} tensors"
    return {**found, "launches": LAUNCHES[work], "allocations": made}
