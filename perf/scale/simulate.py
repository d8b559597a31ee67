"""One training step of a model on N GPUs under `fully_shard`: bytes, traffic and times of the fullest rank."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import log, prod
from typing import NamedTuple

from fusedopt.memory import Ranks, per_rank
from fusedopt.memory.share import Share
from fusedopt.shapes import MODELS, Shapes
from perf.cases import Case, Fitted, _layer
from perf.contenders import CONTENDERS, FUSEDOPT
from perf.contenders.ours import OPTIONS
from perf.predict import hardware, known
from perf.predict.model import GAP, LAUNCH, Model, predict
from perf.report.shown import median
from perf.results import Row
from perf.scale.cluster import BF16, Cluster
from perf.scale.measured import factor
from perf.work import FORMATS, WORKS

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
WORK = "clip"


class Way(NamedTuple):
    """Who steps, in which format. title: for readers."""

    title: str
    contender: str
    format: str


OURS, SMALL, TORCH = WAYS = (
    Way("ours, fp32", FUSEDOPT.name, "fp32"),
    Way("ours, split8 + int8", FUSEDOPT.name, "int8"),
    Way("torch fused, fp32", "torch fused", "fp32"),
)


class Traffic(NamedTuple):
    """Of one step and rank. gathered, reduced: bytes of all all-gathers and reduce-scatters, of which a rank receives,
    and sends, (N−1)/N. calls: how many of them. seconds: in which they are done if nothing else goes on.
    """

    gathered: int
    reduced: int
    calls: int
    seconds: float

    def received(self, world: int) -> float:
        """Bytes by a rank; it sends as many."""
        return (self.gathered + self.reduced) * (world - 1) / world


class Step(NamedTuple):
    """Seconds of clipping and step. sweeps: bytes over bandwidth; rest: of the device's, launches, idle blocks, joins;
    reduce: the norm's all-reduce; host: Python and launches. sources: of measured rows that corrected them.
    """

    sweeps: float
    rest: float
    reduce: float
    host: float
    sources: tuple[str, ...]

    @property
    def device(self) -> float:
        """From the first kernel to the last, were the host never late."""
        return self.sweeps + self.rest + self.reduce

    @property
    def wall(self) -> float:
        """Until the last kernel is done."""
        return max(self.device, self.host)

    @property
    def limit(self) -> str:
        """What takes most of it."""
        if self.host > self.device:
            return "host"
        return "bandwidth" if self.sweeps >= self.device / 2 else "latency"


@dataclass(frozen=True)
class Simulation:
    """model: of ``fusedopt.shapes``. rows: of kinds code, host, sharded and measured, from which times are taken."""

    model: str
    gpu: str
    rows: Sequence[Row]
    cluster: Cluster = field(default_factory=Cluster)

    @cached_property
    def shapes(self) -> Shapes:
        """Of all parameters."""
        return MODELS[self.model].shapes()

    @cached_property
    def parameters(self) -> int:
        """Elements."""
        return MODELS[self.model].count

    @cached_property
    def times(self) -> Model:
        """The bandwidth model."""
        return Model.of(known(self.rows), hardware.HARDWARE[self.gpu])

    def bytes_of(self, way: Way, world: int) -> Ranks:
        """What ranks hold: exact."""
        params = list(MODELS[self.model].parameters(FORMATS[way.format].dtype).values())
        return per_rank(params, "adamw", world, **OPTIONS[way.format])

    def traffic(self, world: int) -> Traffic:
        """Every block is gathered for forward and again for backward, what is outside of blocks once; all gradients are
        reduced once. In bf16, padded to ranks of one size.
        """
        blocks: dict[int | None, int] = {}
        for name, shape in self.shapes.items():
            local = Share(0, world).rows(shape[0]) * prod(shape[1:])
            blocks[_layer(name)] = blocks.get(_layer(name), 0) + BF16 * world * local
        once, twice = blocks.pop(None, 0), sum(blocks.values())
        calls = 3 * len(blocks) + 2 * bool(once)
        gathered, reduced = 2 * twice + once, twice + once
        seconds = self.cluster.gathering(world, gathered + reduced) + calls * self.cluster.ring_latency(world)
        return Traffic(gathered, reduced, calls, seconds)

    @cached_property
    def _steps(self) -> dict[tuple[Way, int], Step]:
        return {}

    def step(self, way: Way, world: int) -> Step:
        """Of the fullest rank, which holds the first rows of every parameter.

        Raises:
            ValueError: rows of kind host or launches that it would rest on are nowhere.
        """
        if (way, world) not in self._steps:
            self._steps[way, world] = self._step(way, world)
        return self._steps[way, world]

    def _step(self, way: Way, world: int) -> Step:
        shapes = {name: (Share(0, world).rows(s[0]), *s[1:]) for name, s in self.shapes.items()}
        fitted = Fitted(Case(f"{self.model} / {world}", "", lambda: shapes), shapes, "whole")
        found = predict(self.times, CONTENDERS[way.contender], fitted, FORMATS[way.format], WORKS[WORK])
        if found is None or found.launches is None or found.host is None:
            raise ValueError(f"the bandwidth model knows too little of {way.title}: rows of kind host are missing")
        job = (way.contender, way.format, WORK)
        device = factor(self.rows, job, self.gpu, ("elements", fitted.elements), "device_ms")
        python = factor(self.rows, job, self.gpu, ("tensors", fitted.tensors), "host_us")
        rest = found.gaps + found.idle + found.joins + GAP
        host = self._over_dtensors(way, fitted.tensors, found.launches + 1) or found.host
        return Step(
            device.value * found.sweeps, device.value * rest, self.cluster.all_reduce(world), python.value * host,
            tuple(f.source for f in (device, python) if f.source),
        )  # fmt: skip

    def _over_dtensors(self, way: Way, tensors: int, launches: int) -> float | None:
        """Host time by the row of kind sharded that is nearest; None without any, and over plain tensors it is then."""
        row, base = self.sharded(way.contender, WORK, tensors), self.times.host.get(("torch fused", "step"))
        if row is None or base is None:
            return None
        return (median(row["ratio"]) or 0.0) * (base[0] + base[1] * tensors) + LAUNCH * launches

    def sharded(self, contender: str, work: str, tensors: int, dtensor: bool = True) -> Row | None:
        """The row of kind sharded with the nearest number of tensors."""
        wanted = {"kind": "sharded", "contender": contender, "work": work, "dtensor": dtensor}
        rows = [row for row in self.rows if all(row.get(key) == value for key, value in wanted.items())]
        return min(rows, key=lambda row: abs(log(row["tensors"] / tensors)), default=None)

    def share(self, way: Way, world: int, tokens: float) -> float:
        """Of an iteration with so many tokens on each GPU that is the step. Traffic and the passes overlap."""
        step = self.step(way, world).wall
        return step / (step + max(self.cluster.compute(self.parameters, tokens), self.traffic(world).seconds))
