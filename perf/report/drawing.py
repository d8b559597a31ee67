"""How plots look: white, quiet axes, a title that says what is seen, a line below it that says how it is known."""

import io
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from PIL import Image

BLUE, INK, QUIET, GREY, FAINT = "#0b62c4", "#24292f", "#6e7781", "#8c959f", "#d0d7de"
DPI = 120
WIDTH = 8.4
"""Inches; 1008 pixels, as wide as a README is shown."""


def figure(title: str, subtitle: str, height: float, **margins: float) -> Figure:
    """An empty one. Inches; margins as `Figure.subplots_adjust` takes them."""
    made = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor="white")
    FigureCanvasAgg(made)
    made.subplots_adjust(**{"left": 0.085, "right": 0.97, "top": 1 - 0.85 / height, "bottom": 0.55 / height, **margins})
    made.text(0.02, 1 - 0.12 / height, title, fontsize=12, weight="bold", color=INK, va="top")
    made.text(0.02, 1 - 0.40 / height, subtitle, fontsize=9, color=QUIET, va="top")
    return made


def save(made: Figure, path: Path) -> None:
    """As a PNG file of 64 colours, which keeps it small."""
    buffer = io.BytesIO()
    made.savefig(buffer, dpi=DPI)
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(64).save(path, optimize=True)


def clean(axes: Axes, x: str = "", y: str = "") -> Axes:
    """Axes without a box, with quiet labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=QUIET, labelsize=8.5, which="both")
    axes.set_xlabel(x, fontsize=9, color=QUIET)
    axes.set_ylabel(y, fontsize=9, color=QUIET)
    return axes


def apart(values: Iterable[float], factor: float) -> list[float]:
    """Those of some values that lie so far apart on a logarithmic axis, from the largest down."""
    kept: list[float] = []
    for x in sorted(values, reverse=True):
        if not kept or x * factor <= kept[-1]:
            kept.append(x)
    return kept


def ticks(axis: Any, values: Iterable[float]) -> None:
    """Ticks of a logarithmic axis: these only, as plain numbers."""
    axis.set_major_locator(FixedLocator(list(values)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


class Label(NamedTuple):
    """What stands beside a point, in data coordinates."""

    x: float
    y: float
    text: str
    ours: bool


AWAY = tuple(product((9, 18, 28, 38, 50, 62), (8, 18, 32, 48)))
"""Vertical and horizontal distances that are tried, in points."""


def label(axes: Axes, labels: Iterable[Label], avoid: Iterable[tuple[float, float]] = (), up: bool = False) -> None:
    """Write each beside its point where it covers no other label and no point: ours to the upper right, others to the
    lower left unless ``up``, farther away where it is crowded. Labels of one point share a line. avoid: more points.
    """
    axes.autoscale_view()  # limits are only settled when they are asked for
    labels = _joined(axes, labels)
    marks = axes.transData.transform([*((each.x, each.y) for each in labels), *avoid])
    renderer: Any = getattr(axes.figure.canvas, "get_renderer")()  # noqa: B009 only Agg's canvas has one
    taken: list[Any] = []
    for each in sorted(labels, key=lambda each: (not each.ours, each.x)):
        sides = ((1, 1), (-1, 1)) if each.ours or up else ((-1, -1), (1, 1))
        for (right, above), (dy, dx) in product(sides, AWAY):
            text = axes.annotate(
                each.text, (each.x, each.y), (right * dx, above * dy),
                textcoords="offset points", ha="left" if right > 0 else "right", va="center", **_written(each.ours),
                arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.7, "shrinkA": 0, "shrinkB": 4},
            )  # fmt: skip
            text.update_positions(renderer)
            box = Text.get_window_extent(text, renderer)  # an annotation's own has its arrow in it
            inside = box.x0 > axes.bbox.x0 + 4 and box.x1 < axes.bbox.x1 + 4 and box.y0 > axes.bbox.y0 + 4
            if inside and not box.count_overlaps(taken) and not any(box.padded(6).contains(*mark) for mark in marks):
                taken.append(box)
                break
            text.remove()


def _joined(axes: Axes, labels: Iterable[Label]) -> list[Label]:
    """One label for each place, to a few pixels."""
    found: dict[Any, Label] = {}
    for each in labels:
        key = (each.ours, *(round(float(x) / 5) for x in axes.transData.transform((each.x, each.y))))
        text = f"{found[key].text}, {each.text}" if key in found else each.text
        found[key] = found.get(key, each)._replace(text=text)
    return list(found.values())


def _written(ours: bool) -> dict[str, Any]:
    return {"fontsize": 8.5, "color": BLUE if ours else QUIET, "weight": "bold" if ours else "normal"}


def ends(axes: Axes, labels: Sequence[Label], gap: float = 11) -> None:
    """Write each to the right of where its line ends, pushed upwards so far that none covers another. gap: points."""
    axes.autoscale_view()
    pixels = gap * DPI / 72
    lowest = float("-inf")
    for each in sorted(labels, key=lambda each: each.y):
        _, at = axes.transData.transform((each.x, each.y))
        lowest = max(at, lowest + pixels)
        axes.annotate(
            each.text, (each.x, each.y), (6, (lowest - at) * 72 / DPI), textcoords="offset points",
            va="center", annotation_clip=False, **_written(each.ours),
        )  # fmt: skip
