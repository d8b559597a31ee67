"""Step and bytes over the number of GPUs."""

from matplotlib.figure import Figure

from perf.predict import hardware
from perf.report.drawing import BLUE, GREY, INK, Label, clean, ends, figure, ticks
from perf.scale.page import Plan
from perf.scale.simulate import OURS, SMALL, TORCH, WAYS

LOOKS = {OURS: (BLUE, "-"), SMALL: (BLUE, "--"), TORCH: (GREY, "-")}


def draw(plan: Plan) -> Figure:
    """Left: times of clipping and step, hollow because predicted. Right: bytes that the fullest rank holds, exact."""
    simulation, worlds = plan.simulation, list(plan.worlds)
    made = figure(
        "Sharded over more GPUs, the step shrinks; Python does not",
        f"{simulation.model} under fully_shard on {simulation.gpu}s. Left: predicted, not measured. Right: exact",
        4.2, wspace=0.62, right=0.86, bottom=0.19,
    )  # fmt: skip
    left, right = made.add_subplot(1, 2, 1), made.add_subplot(1, 2, 2)
    for axes, title in ((left, "clip + step, milliseconds, predicted"), (right, "held by the fullest rank, GB")):
        clean(axes, "GPUs").set(xscale="log", yscale="log")
        axes.set_title(title, fontsize=9.5, color=INK, loc="left")
        ticks(axes.xaxis, worlds)
    labels: tuple[list[Label], list[Label]] = ([], [])
    for way in WAYS:
        colour, style = LOOKS[way]
        steps = [simulation.step(way, world) for world in worlds]
        y = [1e3 * step.device for step in steps]
        left.plot(worlds, y, f"{style}o", color=colour, markersize=4.5, markerfacecolor="white")
        labels[0].append(Label(worlds[-1], y[-1], way.title, way is not TORCH))
        if way is not SMALL:
            host = [1e3 * step.host for step in steps]
            left.plot(worlds, host, ":", color=colour, linewidth=1.2)
            labels[0].append(Label(worlds[-1], host[-1], f"{way.title.partition(',')[0]}: Python", way is not TORCH))
    limit = 10 * simulation.cluster.compute(simulation.parameters, plan.tokens)
    left.plot(worlds, [limit] * len(worlds), color=INK, linewidth=0.8)
    labels[0].append(Label(worlds[-1], limit, "1 % of an iteration", False))
    for way, name in ((OURS, "fp32, anybody's"), (SMALL, "split8 + int8")):
        held = [simulation.bytes_of(way, world).fullest[1].total / 1e9 for world in worlds]
        right.plot(worlds, held, f"{LOOKS[way][1]}o", color=GREY if way is OURS else BLUE, markersize=4.5)
        labels[1].append(Label(worlds[-1], held[-1], name, way is not OURS))
    capacity = hardware.HARDWARE[simulation.gpu].memory / 1e9
    right.plot(worlds, [capacity] * len(worlds), color=INK, linewidth=0.8)
    labels[1].append(Label(worlds[-1], capacity, f"an {simulation.gpu}", False))
    for axes, wanted in zip((left, right), labels, strict=True):
        axes.minorticks_off()
        ticks(axes.yaxis, [a * 10.0**k for k in range(-1, 4) for a in (1, 3)])
        axes.tick_params(axis="x", labelrotation=45)
        made.canvas.draw()
        ends(axes, wanted)
    return made
