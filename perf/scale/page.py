"""The tables and verdicts of ``fusedopt/docs/scale.md``, each block between markers of its own; the prose stays."""

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from fusedopt.shapes import MODELS
from perf import marked
from perf.predict import hardware
from perf.report.shown import markdown, median, number, percent, times
from perf.scale.cluster import SOURCES
from perf.scale.simulate import OURS, SMALL, TORCH, WAYS, WORK, Simulation

PAGE = Path(__file__).parents[2] / "fusedopt" / "docs" / "scale.md"


class Plan(NamedTuple):
    """worlds: numbers of GPUs. tokens: on each of them in a step. batch: of a step in all, where that is fixed."""

    simulation: Simulation
    worlds: Sequence[int]
    tokens: int = 8192
    batch: int = 2**24


def write(page: Path, plan: Plan) -> None:
    """Renew every block."""
    for name, make in BLOCKS.items():
        marks = f"<!-- {name}, by perf.scale: begin -->", f"<!-- {name}, by perf.scale: end -->"
        marked.write(page, make(plan), marks, "On many GPUs")


def memory(plan: Plan) -> str:
    """What a rank holds: exact."""
    simulation = plan.simulation
    capacity = hardware.HARDWARE[simulation.gpu].memory
    lines = []
    for world in plan.worlds:
        wide, small = (simulation.bytes_of(way, world) for way in (OURS, SMALL))
        cells = [f"{world:,}"]
        for ranks in (wide, small):
            most, least = (held.total for _, held in (ranks.fullest, ranks.emptiest))
            cells += [_gb(most), "the same" if least == most else _gb(least), percent(most / capacity)]
        lines.append([*cells, f"{wide.empty:,}"])
    heads = [
        f"{name}: {what}"
        for name in ("fp32", "split8 + int8")
        for what in ("GB", "emptiest, GB", f"of {simulation.gpu}")
    ]
    table = markdown(("GPUs", *heads, "tensors empty on the last"), lines)
    return f"Exact, of {MODELS[simulation.model].title} with AdamW under `fully_shard`. GB: 10⁹ bytes.\n\n{table}"


def traffic(plan: Plan) -> str:
    """What goes between the GPUs: bytes exact, seconds predicted."""
    simulation, cluster = plan.simulation, plan.simulation.cluster
    lines = []
    for world in plan.worlds:
        moved, passes = simulation.traffic(world), cluster.compute(simulation.parameters, plan.tokens)
        seconds = (moved.seconds, moved.calls * cluster.ring_latency(world), passes)
        latency = 1e6 * cluster.all_reduce(world)
        lines.append([f"{world:,}", _gb(moved.received(world)), *map(number, seconds), number(latency)])
    heads = ("GPUs", "GB in, and out, exact", "s, predicted", "of it latency, s, predicted",
             "forward and backward, s, predicted",
             "the norm's all-reduce, µs, predicted")  # fmt: skip
    calls = simulation.traffic(plan.worlds[0]).calls
    text = f"A step and rank; {calls} all-gathers and reduce-scatters; {plan.tokens:,} tokens on each GPU."
    return "\n\n".join(filter(None, (text, markdown(heads, lines), _norms(simulation))))


def _norms(simulation: Simulation) -> str:
    """What the norm costs beside its latency: counted, and measured on a CPU."""
    tensors, lines = len(simulation.shapes), []
    for way in (OURS, TORCH):
        row, plain = (simulation.sharded(way.contender, WORK, tensors, dtensor) for dtensor in (True, False))
        if row is not None and plain is not None:
            micro = [median(each["host_us"]) or 0.0 for each in (row, plain)]
            cells = [way.contender, number(row["all_reduces"]), f"{row['payload']:,}", *map(number, micro)]
            lines.append([*cells, times(micro[0] / micro[1])])
    if not lines:
        return ""
    heads = ("clip + step", "all-reduces, counted", "payload, bytes, counted", "Python over DTensors, µs, measured",
             "over plain tensors, µs, measured", "DTensors ÷ plain")  # fmt: skip
    return f"{_source(simulation)}\n\n{markdown(heads, lines)}"


def _source(simulation: Simulation) -> str:
    """Where the rows of kind sharded come from."""
    row = simulation.sharded(TORCH.contender, WORK, len(simulation.shapes))
    assert row is not None
    machine = row["machine"]
    return (
        f"Norm, clipping and step over {row['tensors']:,} tiny tensors, measured on {machine['cpu']}, "
        f"{machine['cores']} cores, torch {machine['torch']}, commit {row['commit']}; our launches stubbed."
    )


def steps(plan: Plan) -> str:
    """Clipping and step: predicted."""
    lines, sources = [], {}
    for world in plan.worlds:
        found = {way: plan.simulation.step(way, world) for way in WAYS}
        cells = [number(1e3 * seconds) for step in found.values() for seconds in (step.device, step.host)]
        ratios = [times(found[TORCH].device / found[way].device) for way in (OURS, SMALL)]
        lines.append([f"{world:,}", *cells, *ratios])
        sources |= dict.fromkeys(source for step in found.values() for source in step.sources)
    heads = [f"{way.title}: {what}" for way in WAYS for what in ("device ms", "host ms")]
    heads += [f"torch fused ÷ {way.title}, device" for way in (OURS, SMALL)]
    known = f"corrected by what was measured on {'; '.join(sources)}" if sources else "no GPU was measured"
    text = f"**All of it predicted** for an {plan.simulation.gpu}; {known}."
    return f"{text}\n\n{markdown(('GPUs', *heads), lines)}"


def shares(plan: Plan) -> str:
    """Which part of an iteration the step is: predicted."""

    def cells(world: int) -> list[str]:
        batches = (plan.tokens, plan.batch / world)
        return [_percent(plan.simulation.share(way, world, tokens)) for tokens in batches for way in WAYS]

    heads = [f"{way.title}: {name}" for name in (f"{plan.tokens:,} a GPU", f"{plan.batch:,} in all") for way in WAYS]
    table = markdown(("GPUs", *heads), ([f"{world:,}", *cells(world)] for world in plan.worlds))
    return f"**Predicted**, by the tokens of a step.\n\n{table}"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %"


def verdicts(plan: Plan) -> str:
    """What dominates, in words that follow the numbers."""
    said = (*_limits(plan), *_slower(plan), _below(plan), _replicated(plan), _fits(plan))
    return "\n".join(f"- {line}" for line in said)


def _limits(plan: Plan) -> list[str]:
    """Runs of GPU numbers with one limit."""
    lines = []
    for way in WAYS:
        limits = [(plan.simulation.step(way, world).limit, world) for world in plan.worlds]
        runs = [(limit, [world for _, world in run]) for limit, run in groupby(limits, key=lambda each: each[0])]
        said = "; ".join(f"{limit} {_range(worlds, plan.worlds)}" for limit, worlds in runs)
        lines.append(f"What takes most of a step, {way.title}, predicted: {said}.")
    return lines


def _range(worlds: Sequence[int], every: Sequence[int]) -> str:
    if list(worlds) == list(every):
        return "at every number of GPUs"
    return f"on {worlds[0]:,}" + (f" to {worlds[-1]:,}" if worlds[-1] != worlds[0] else "") + " GPUs"


def _slower(plan: Plan) -> list[str]:
    """Where ours takes longer on the device, in the same format."""
    worlds = [w for w in plan.worlds if plan.simulation.step(OURS, w).device > plan.simulation.step(TORCH, w).device]
    if not worlds:
        return []
    step = plan.simulation.step(OURS, worlds[0])
    return [
        f"On the device {OURS.title}, takes longer than {TORCH.title} {_range(worlds, plan.worlds)}, predicted: "
        f"{number(1e3 * step.rest)} of {number(1e3 * step.device)} ms on {worlds[0]:,} are launches and joining norms."
    ]


def _below(plan: Plan) -> str:
    """From where on the step is less than a hundredth of an iteration."""
    found = {way: [plan.simulation.share(way, world, plan.tokens) for world in plan.worlds] for way in WAYS}
    said = []
    for way, parts in found.items():
        last = max((world for world, part in zip(plan.worlds, parts, strict=True) if part >= 0.01), default=0)
        said.append(_from(way.title, [world for world in plan.worlds if world > last]))
    saved = max(a - b for a, b in zip(found[TORCH], found[SMALL], strict=True))
    return (
        f"Less than 1 % of an iteration of {plan.tokens:,} tokens on each GPU, predicted: {'; '.join(said)}. The most "
        f"that {SMALL.title} saves of it beside torch fused is {_percent(saved)}."
    )


def _from(name: str, worlds: Sequence[int]) -> str:
    return f"{name}, from {worlds[0]:,} GPUs on" if worlds else f"{name}, nowhere"


def _replicated(plan: Plan) -> str:
    """The same where every GPU steps everything."""
    parts = [f"{way.title}, {_percent(plan.simulation.share(way, 1, plan.tokens))}" for way in WAYS]
    return (
        f"Where every GPU updates all parameters (DDP), predicted: {'; '.join(parts)} of an iteration of as many "
        "tokens on each, on any number of GPUs, and for other large models about the same: forward, backward and "
        "step grow alike. Sharded over K ranks (HSDP) it is about a K-th of that."
    )


def _fits(plan: Plan) -> str:
    capacity, said = hardware.HARDWARE[plan.simulation.gpu].memory, []
    for way in (OURS, SMALL):
        fitting = [w for w in plan.worlds if plan.simulation.bytes_of(way, w).fullest[1].total < capacity]
        said.append(_from(way.title.removeprefix("ours, "), fitting))
    text = f"What is held from step to step is less than an {plan.simulation.gpu} has, {capacity / 1e9:g} GB, exact"
    return f"{text}: {'; '.join(said)}."


def assumptions(plan: Plan) -> str:
    """What the times rest on."""
    gpu = hardware.HARDWARE[plan.simulation.gpu]
    lines = [("bandwidth of the GPU's memory", f"{gpu.bandwidth / 1e12:g} TB/s", gpu.source), *SOURCES]
    return markdown(("assumed", "value", "source"), lines, left=True)


def _gb(count: float) -> str:
    return number(count / 1e9, 4)


BLOCKS: dict[str, Callable[[Plan], str]] = {
    "memory": memory, "traffic": traffic, "steps": steps, "shares": shares, "verdicts": verdicts,
    "assumptions": assumptions,
}  # fmt: skip
"""By the name that their markers have."""
