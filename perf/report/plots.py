"""Plots of results: ours in one strong colour, others in greys. What is predicted is hollow, and the plot says so."""

import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fusedopt.inspect.roofline import BANDWIDTH, ISSUE_RATES
from fusedopt.memory import Memory, estimate
from fusedopt.memory.ours import SUGGESTIONS
from fusedopt.memory.rivals import RIVALS
from fusedopt.shapes import MODELS
from perf.report.drawing import BLUE, FAINT, GREY, INK, QUIET, Label, apart, clean, ends, figure, label, save, ticks
from perf.report.rows import FUSED, by_place, of, predictions, steps
from perf.report.shown import OURS, inverse, median
from perf.report.targets import BILLION
from perf.results import Row
from perf.work import WORKS


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every plot that there are rows for, as PNG files of a folder. One that fails is told of on stderr."""
    written = []
    for name, make in PLOTS.items():
        try:
            made = make(rows)
            if made is not None:
                folder.mkdir(parents=True, exist_ok=True)
                save(made, folder / f"{name}.png")
                written.append(folder / f"{name}.png")
        except Exception as failure:  # of rows that another version wrote, say; the other plots matter no less
            print(f"plot {name}: {type(failure).__name__}: {failure}", file=sys.stderr)
    return written


NAMED = {
    ("torch fused", "fp32"): "torch fused",
    ("torch fused, clipping by grad_scale", "fp32"): "torch fused, grad_scale trick",
    ("torch foreach", "fp32"): "torch foreach",
    ("torch.compile of clip + step", "fp32"): "torch.compile",
    ("FlashOptim FlashAdamW", "int8"): "FlashOptim, int8 step",
    ("bitsandbytes AdamW8bit", "int8"): "bitsandbytes 8-bit step, bf16 weights",
    ("torchao AdamW4bit", "int8"): "torchao 4-bit, bf16 weights",
}
"""Which of the others have a label, and what it says; all of them have a dot."""


class Point(NamedTuple):
    """bytes: per parameter. rate: 10⁹ parameters per second. limit: what issuing alone would allow; of ours."""

    bytes: float
    rate: float
    name: str
    ours: bool
    predicted: bool
    limit: float | None


def roofline(rows: Sequence[Row]) -> Figure | None:
    """Parameters per second over bytes per parameter, under what memory and issuing allow."""
    points = _points(rows)
    if not points:
        return None
    gpus = ", ".join(by_place(of(rows, "measured", device="cuda")))
    known = f"filled: measured on {gpus}; hollow: predicted" if gpus else "predicted, not measured on a GPU"
    copied = [x for row in of(rows, "measured", device="cuda") if (x := median(row.get("ceiling_gb_s")))]
    ceiling = statistics.median(copied) if copied else BANDWIDTH / 1e9
    bound = all(p.limit is None or p.limit > ceiling / p.bytes for p in points)
    title = "Fewer bytes, faster steps" + (": memory is the limit, not arithmetic" if bound else "")
    made = figure(title, f"AdamW under an H200's ceilings, on {BILLION}; {known}. Grey without a name: others", 4.8)
    axes = clean(made.add_subplot(), "bytes moved per parameter", "10⁹ parameters per second")
    low, high = (f(p.bytes for p in points) * by for f, by in ((min, 0.72), (max, 1.25)))
    tops = [p.limit or p.rate for p in points]
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(0.8 * ceiling / high, 1.35 * max(tops)))
    ticks(axes.xaxis, (10, 12, 14, 20, 28, 32, 40, 50, 70, 100))
    ticks(axes.yaxis, (30, 50, 100, 200, 300, 500, 1000))
    x = np.geomspace(low, high, 2)
    axes.plot(x, ceiling / x, color=INK, linewidth=1.4, zorder=1)
    ends_of_line = axes.transData.transform(np.column_stack([x, ceiling / x]))
    slope = np.degrees(np.arctan2(*(ends_of_line[1] - ends_of_line[0])[::-1]))
    axes.annotate(
        f"a plain copy, {ceiling / 1e3:.2g} TB/s", (72, ceiling / 72), (0, 9), textcoords="offset points",
        fontsize=9, color=INK, rotation=slope, rotation_mode="anchor", ha="center",
    )  # fmt: skip
    for p in points:
        colour = BLUE if p.ours else GREY
        axes.plot(p.bytes, p.rate, "o", markersize=7, color=colour, markerfacecolor="white" if p.predicted else colour)
    _limits(axes, points)
    limits = [(p.bytes, p.limit) for p in points if p.limit is not None]
    label(axes, [Label(p.bytes, p.rate, p.name, p.ours) for p in points if p.name], limits)
    return made


def _limits(axes: Axes, points: Sequence[Point]) -> None:
    """What issuing instructions alone would allow each step of ours, as a dash above its point."""
    limited = [(p.bytes, p.limit) for p in points if p.limit is not None]
    for x, limit in limited:
        axes.plot(x, limit, "_", markersize=13, markeredgewidth=1.6, color=BLUE, alpha=0.45)
    if limited:
        axes.annotate(
            "what issuing its instructions alone would allow", max(limited), (12, 0), textcoords="offset points",
            fontsize=8.5, color=BLUE, alpha=0.7, va="center",
        )  # fmt: skip


def _points(rows: Sequence[Row]) -> list[Point]:
    """Steps by themselves on the case of a billion parameters, measured where they were, of others only clip + step in
    fp32 and what keeps low-bit moments.
    """
    issued = {
        key[:2]: sum(median(k.get("instructions")) or 0 for k in kernels)
        for key, kernels in steps(rows).items() if key[2] == "sm_90"
    }  # fmt: skip
    found: dict[tuple[Any, ...], Point] = {}
    for row in (*predictions(rows), *of(rows, "measured", device="cuda")):  # measured ones take the place
        time, moved, job = median(row.get("device_ms")), median(row.get("bytes")), (row["format"], row["work"])
        ours = row.get("contender") == OURS
        if not time or not moved or row.get("case") != BILLION or row.get("graph"):
            continue
        if (ours and job[1] != "amp") or job in (("fp32", "clip"), ("int8", "step")):
            limit = ISSUE_RATES["sm_90"] / 1e9 / issued[job] if ours and issued.get(job) else None
            name = f"{job[0]} {WORKS[job[1]].title}" if ours else NAMED.get((row["contender"], job[0]), "")
            rate = row["elements"] / time / 1e6
            found[job, row["contender"]] = Point(moved, rate, name, ours, row["kind"] == "predicted", limit)
    return list(found.values())


def tensors(rows: Sequence[Row]) -> Figure | None:
    """Host time over the number of tensors, a panel for each kind of work."""
    host = [row for row in of(rows, "host") if median(row.get("host_us")) and row.get("tensors")]
    works = [name for name in WORKS if of(host, "host", work=name)]
    if not works:
        return None
    where = ", ".join(by_place(host))
    made = figure("Python time of a step", f"Measured on {where}; our launches stubbed", 3.9, right=0.87, wspace=0.62)
    counts = sorted({row["tensors"] for row in host})
    first = None
    for i, name in enumerate(works):
        axes = made.add_subplot(1, len(works), i + 1, sharex=first, sharey=first)
        first = clean(axes, "tensors", "" if i else "milliseconds") if first is None else clean(axes, "tensors")
        axes.set(xscale="log", yscale="log")
        axes.set_title(WORKS[name].title, fontsize=9.5, color=INK, loc="left")
        axes.grid(axis="y", color=FAINT, linewidth=0.5)
        if i:
            axes.tick_params(labelleft=False)
        for who, (x, y) in _lines(of(host, "host", work=name)).items():
            ours = who == OURS
            axes.plot(x, y, "-o", markersize=3.5, linewidth=2.2 if ours else 1.2, color=BLUE if ours else GREY)
        ticks(axes.xaxis, apart(counts, 4))
    assert first is not None
    ticks(first.yaxis, [a * 10.0**k for k in range(-2, 4) for a in (1, 3)])
    made.canvas.draw()
    for axes, name in zip(made.axes, works, strict=True):
        lines = _lines(of(host, "host", work=name))
        ends(axes, [Label(x[-1], y[-1], _short(who), who == OURS) for who, (x, y) in lines.items()])
    return made


def _short(contender: str) -> str:
    return contender.removeprefix("torch ").replace("fused, clipping by grad_scale", "grad_scale")


def _lines(rows: Iterable[Row]) -> dict[str, tuple[list[int], list[float]]]:
    """Contender → (tensors, milliseconds)."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in sorted(rows, key=lambda row: row["tensors"]):
        x, y = found.setdefault(str(row["contender"]), ([], []))
        x.append(row["tensors"])
        y.append((median(row["host_us"]) or 0.0) / 1e3)
    return found


def wall(rows: Sequence[Row]) -> Figure | None:
    """Wall time of clip + step, a line of dots for each case; more tensors lower down."""
    found = [r for r in of(rows, "measured", device="cuda", format="fp32", work="clip") if not r.get("graph")]
    found = [r for r in found if median(r.get("wall_ms"))]
    cases = {r["case"]: r["tensors"] for r in sorted(found, key=lambda r: r["tensors"], reverse=True)}
    if not cases:
        return None
    made = figure(
        "Wall time of clip + step, fp32", f"Measured on {', '.join(by_place(found))}. Grey without a name: others",
        2.1 + 0.4 * len(cases), left=0.235, right=0.87,
    )  # fmt: skip
    axes = clean(made.add_subplot(), "milliseconds")
    axes.set(xscale="log", yticks=range(len(cases)), ylim=(-0.6, len(cases) + 0.9))
    axes.set_yticklabels([f"{name}, {count:,} tensors" for name, count in cases.items()])
    axes.grid(axis="y", color=FAINT, linewidth=0.5)
    names = []
    for row in found:
        time, y, ours = median(row["wall_ms"]) or 0.0, list(cases).index(row["case"]), row["contender"] == OURS
        axes.plot(time, y, "o", markersize=8 if ours else 6, color=BLUE if ours else GREY, zorder=3 if ours else 2)
        name = row["contender"] if ours or row["contender"] in (FUSED, "torch foreach") else ""
        if name and y == len(cases) - 1:
            names.append(Label(time, y, name, ours))
        if row["contender"] == FUSED and (ratio := inverse(row.get("ratio_wall"))):
            axes.text(
                1.01,
                y,
                f"{ratio.median:.1f} ×",
                transform=axes.get_yaxis_transform(),
                fontsize=9,
                color=INK,
                va="center",
            )
    axes.text(
        1.01, len(cases) - 0.45, f"{FUSED}\nto ours", transform=axes.get_yaxis_transform(), fontsize=8.5, color=QUIET
    )
    ticks(axes.xaxis, [a * 10.0**k for k in range(-2, 4) for a in (1, 3)])
    label(axes, names, up=True)
    return made


def _beside(axes: Axes, y: float, text: str, color: str) -> None:
    axes.text(1.015, y, text, transform=axes.get_yaxis_transform(), fontsize=8.5, va="center", color=color)


COMPONENTS: dict[str, Callable[[Memory], int]] = {
    "weights": lambda held: held.weights,
    "gradients": lambda held: held.gradients,
    "moments": lambda held: sum(held.state.values()),
    "scales": lambda held: held.scales,
    "kept beside bf16 weights": lambda held: held.masters,
}
SHADES = (
    ("#0b62c4", "#8c959f"),
    ("#5b9be0", "#b6bdc5"),
    ("#0a4a94", "#6e7781"),
    ("#062a54", "#424a53"),
    ("#9cc5f0", "#d5dade"),
)
"""Of each component, in ours and in others."""
SHOWN = (
    "torch fused, fp32", "Megatron-LM, bf16, fp32 copy", "apex FusedAdam, bf16, fp32 copy", "optimi, bf16, Kahan",
    "FlashAdamW, bf16, 32-bit", "FlashAdamW, bf16, 24-bit", "torch fused, bf16", "bitsandbytes 8bit, bf16",
    "torchao, 4-bit, bf16",
)  # fmt: skip
"""Of other packages' formats, one of each kind."""


def memory(rows: Sequence[Row]) -> Figure:
    """Bytes per parameter by component, ours and others': from their formats, whatever the rows."""
    model = MODELS["llama3-8b"]
    params = list(model.parameters(torch.bfloat16).values())
    bars = {f"{OURS}, fp32": estimate(list(model.parameters().values()), "adamw")}
    bars |= {s.name: estimate(params, "adamw", **s.options) for s in SUGGESTIONS}
    bars |= {rival.name: rival.memory(params) for rival in RIVALS if rival.name in SHOWN}
    ranked = sorted(bars.items(), key=lambda bar: (round(bar[1].per_parameter(), 3), bar[0].startswith(OURS)))
    made = figure(
        "Bytes that training holds per parameter, AdamW",
        f"Computed from formats, not measured, for {model.title}. Dark slivers: scales. *: nothing beside bf16 weights",
        1.45 + 0.28 * len(ranked), left=0.275, right=0.94, bottom=0.02,
    )  # fmt: skip
    axes = clean(made.add_subplot())
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set(yticks=range(len(ranked)), xticks=[], ylim=(-0.6, len(ranked) - 0.4))
    axes.tick_params(length=0)
    axes.set_yticklabels([f"{name} *" if _loses(name, held) else name for name, held in ranked])
    for y, (name, held) in enumerate(ranked):
        _bar(axes, y, held, name.startswith(OURS))
    left = 0.0
    longest = ranked[-1][1]
    for name, of_held in COMPONENTS.items():
        width = longest.per_parameter(of_held(longest))
        axes.text(left + width / 2, len(ranked) - 0.5, name if width else "", fontsize=8.5, color=INK, ha="center")
        left += width
    for tick, (name, _) in zip(axes.get_yticklabels(), ranked, strict=True):
        if name.startswith(OURS):
            tick.set(color=BLUE, weight="bold")
    return made


def _loses(name: str, held: Memory) -> bool:
    """Whether bf16 weights are all that is kept of them."""
    return "bf16" in name and not held.masters


def _bar(axes: Axes, y: int, held: Memory, ours: bool) -> None:
    left = 0.0
    for of_held, shades in zip(COMPONENTS.values(), SHADES, strict=True):
        width = held.per_parameter(of_held(held))
        axes.barh(y, width, 0.72, left, color=shades[not ours], edgecolor="white", linewidth=0.8)
        left += width
    axes.text(left + 0.12, y, f"{held.per_parameter():.2f}", fontsize=8.5, va="center",
              color=BLUE if ours else QUIET, weight="bold" if ours else "normal")  # fmt: skip


PLOTS = {"roofline": roofline, "tensors": tensors, "wall": wall, "memory": memory}
"""File name → what draws it, None without rows."""
