"""What takes part: one entry for each way in which a package can do the work."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from perf.work import Format, Work


@dataclass(frozen=True)
class Setup:
    """What a contender is given: parameters with gradients, which may be written to by whoever does so in real use.

    scale: the loss scale that the gradients of scaled work carry. graph: the step is going to be captured. params keep
    their identity; each contender has its own.
    """

    params: Sequence[torch.nn.Parameter]
    form: Format
    work: Work
    scale: float = 1.0
    graph: bool = False

    @property
    def device(self) -> torch.device:
        """Of all parameters."""
        return self.params[0].device


Step = Callable[[], object]
"""One step on the gradients that ``p.grad`` hold then. Scaled work includes the scaler's step and update."""


@dataclass(frozen=True)
class Contender:
    """name: as reports call it. package: what must be importable; install: how to get it. devices: kinds it runs on.

    make: builds the optimizer and returns its step. formats: name of a format → what the contender keeps in it.
    works: names of what it can do. graph: whether its step can be captured. traffic: (format, work) names → bytes per
    parameter that it moves, and how that is known: "counted" in its code, or "derived" from its passes. most_tensors:
    with more of them it is left out, because it takes minutes. tolerances: by format, where what is kept is
    coarser than the format's own tolerance allows for.
    """

    name: str
    package: str
    install: str
    make: Callable[[Setup], Step]
    formats: Mapping[str, str]
    works: tuple[str, ...] = ("step", "clip", "amp")
    devices: tuple[str, ...] = ("cuda",)
    graph: bool = False
    traffic: Callable[[str, str], tuple[float, str] | None] = lambda form, work: None
    most_tensors: int | None = None
    tolerances: Mapping[str, float] = field(default_factory=dict)

    def tolerance(self, form: Format) -> float:
        """Largest error that `check.error` may find."""
        return self.tolerances.get(form.name, form.tolerance)

    @property
    def installed(self) -> bool:
        """Whether its package can be imported; nothing is imported by asking."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except (ImportError, ValueError):
            return False

    def takes(self, form: Format, work: Work, device: str, graph: bool = False) -> bool:
        """Whether it does this work in this format there."""
        fits = form.name in self.formats and work.name in self.works and device in self.devices
        return fits and (self.graph or not graph)


def table(rows: Mapping[tuple[str, str], float], how: str = "derived") -> Callable[[str, str], Any]:
    """A `Contender.traffic` from a table of (format, work) → bytes per parameter."""
    return lambda form, work: (rows[form, work], how) if (form, work) in rows else None
