"""Which jobs are measured, and in which order: those first that decide whether somebody switches."""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from perf.cases import CASES
from perf.contenders import CONTENDERS, Contender
from perf.instances import Job
from perf.measure import Bench, measure
from perf.results import Row, Writer
from perf.work import FORMATS, WORKS

FIRST = (
    ("llama3.2-1b", "fp32", "clip", False),
    ("gpt2", "fp32", "clip", False),
    ("llama3.2-1b", "fp32", "amp", False),
    ("llama3.2-1b", "int8", "step", False),
    ("llama3.2-1b", "fp32", "step", False),
    ("tiny-1000", "fp32", "clip", False),
    ("gpt2", "fp32", "step", False),
    ("gpt2", "fp32", "amp", False),
    ("llama3-8b", "fp32", "clip", False),
    ("llama3.2-1b", "bf16", "clip", False),
    ("gpt2", "fp32", "clip", True),
    ("llama3-8b", "int8", "clip", False),
    ("tiny-1000", "fp32", "step", True),
    ("over-int32", "fp32", "step", False),
    ("qwen3-30b-a3b", "int8", "clip", False),
    ("tiny-10000", "fp32", "clip", False),
    ("resnet50", "fp32", "amp", False),
    ("vit-h-14", "half", "clip", False),
    ("embedding", "fp32", "clip", False),
)
"""(case, format, work, graph): every target, every case and every format once; then all the rest."""
ON_CPU = (("gpt2", "fp32", "step", False), ("gpt2", "fp32", "clip", False), ("tiny-1000", "fp32", "clip", False))


Key = tuple[str, str, str, bool]
"""Case, format, work, graph."""


@dataclass(frozen=True)
class Selection:
    """Names; an empty one is everything. graph: only captured steps, only plain ones, or both."""

    cases: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    works: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    graph: bool | None = None

    @property
    def is_empty(self) -> bool:
        """Whether nothing was chosen."""
        return self == Selection()

    def takes(self, key: Key) -> bool:
        """Whether a job is among them."""
        chosen = (self.cases, self.formats, self.works)
        named = all(not names or name in names for names, name in zip(chosen, key, strict=False))
        return named and self.graph in (None, key[3])

    def who(self) -> list[Contender]:
        """Those who take part. Ours always does: ratios are to it."""
        return [
            c for name, c in CONTENDERS.items() if not self.contenders or name in self.contenders or name == "fusedopt"
        ]


def order(device: str, selection: Selection) -> Iterator[Key]:
    """Jobs by their names. On the CPU a few, unless something was chosen."""
    if device == "cpu":
        everything = ON_CPU if selection.is_empty else tuple(product(CASES, FORMATS, WORKS, (False,)))
    else:
        everything = FIRST + tuple(key for key in product(CASES, FORMATS, WORKS, (False, True)) if key not in FIRST)
    return (key for key in everything if selection.takes(key))


def measure_jobs(
    bench: Bench,
    deadline: float = float("inf"),
    selection: Selection = Selection(),
    tell: Callable[[str], object] = print,
    skip: Iterable[Key] = (),
) -> list[Key]:
    """Measure job after job until `time.monotonic()` passes the deadline; returns those that were begun.

    No job is begun for which there is less time than the last one took.
    """
    done: list[Key] = []
    last, who, left_out = 0.0, selection.who(), set(skip)
    for key in order(bench.device, selection):
        if key in left_out:
            continue
        if time.monotonic() + last > deadline:
            tell(f"out of time: the rest from {' '.join(map(str, key[:3]))} on was not measured")
            break
        begin = time.monotonic()
        for line in _measure_one(bench, key, who, selection.contenders):
            tell(line)
        last = time.monotonic() - begin
        done.append(key)
    return done


def _measure_one(bench: Bench, key: Key, who: Sequence[Contender], named: Collection[str] = ()) -> Iterator[str]:
    """Lines about a job as it is measured. named: who was asked for by name."""
    case, form, work = CASES[key[0]], FORMATS[key[1]], WORKS[key[2]]
    fitted = case.fitted(bench.memory / 2 / form.held)
    head = f"{case.name}, {form.name}, {work.title}{', captured' if key[3] else ''}"
    if fitted is None:
        about = {"case": case.name, "format": form.name, "work": work.name, "graph": key[3]}
        bench.writer.add("red", contender="all", **about, why="does not fit")
        yield f"{head}: does not fit in {bench.memory / 2**30:.0f} GiB twice"
        return
    yield f"{head} ({fitted.part}, {fitted.tensors:,} tensors, {fitted.elements:,} elements)"
    job = Job(fitted, form, work, bench.device, key[3])
    if idle := [c.name for c in who if c.name in named and not c.takes(form, work, bench.device, key[3])]:
        yield f"    not done by {', '.join(idle)}"
    for row in measure(bench, job, who):
        yield f"    {line(row)}"


def line(row: Row) -> str:
    """A measured row for the terminal."""
    device, wall = row["device_ms"], row["wall_ms"]
    text = f"{row['contender']:38}{device['median']:10.3f} ms"
    if row["device"] == "cuda":
        text += f"{row['host_us']['median']:10,.0f} µs host{wall['median']:10.3f} ms wall"
    if "share" in row:
        text += f"{row['share']:7.0%} of a copy"
    return text + (f"   fusedopt takes {row['ratio']['median']:.2f} of it" if "ratio" in row else "")


def missing(writer: Writer, selection: Selection = Selection()) -> list[Row]:
    """A row for each contender whose package is not here."""
    return [
        writer.add("missing", contender=c.name, package=c.package, install=c.install)
        for c in selection.who()
        if not c.installed
    ]
