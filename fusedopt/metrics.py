"""Numbers about a step, from what it computed anyway or was asked to sum up on its way: see `collect`.

Nothing is read back from the device. A step leaves norms in its tables; sums over parameters are made here, on
request.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedopt_kernels import table

if TYPE_CHECKING:
    from .stepper import Stepper

NAMES = (
    "grad_norm", "clip_coefficient", "clipped_share", "param_norm", "update_norm", "update_ratio", "nonfinite_grads",
    "nonfinite_steps", "skipped_steps",
)  # fmt: skip
"""Every metric, see `collect`."""
PER = ("model", "group", "tensor")


class Metrics:
    """What is to be measured. norm: of all gradients; single: of each; change: of parameters and their update."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises:
        TypeError: one string instead of a sequence. ValueError: a name that is not in `NAMES`.
        """
        if isinstance(names, str):
            raise TypeError(f"metrics must be a sequence of names, such as ({names!r},)")
        for name in names:
            if name not in NAMES:
                raise ValueError(f"metrics: {name!r} is not known; choose from {', '.join(NAMES)}")
        self.names = tuple(names)
        self.norm = bool({"grad_norm", "nonfinite_grads", "nonfinite_steps"} & set(names))
        self.single = bool({"grad_norm", "nonfinite_grads"} & set(names))
        self.change = bool({"param_norm", "update_norm", "update_ratio"} & set(names))


class Report(NamedTuple):
    """What one part of a step measured. norm, skipped, lowest: 0-dim; the rest with a row per parameter, or None.

    own: norms of gradients; clip: coefficients; change: sums of squares of the new weights and of their change.
    """

    params: list[Tensor]
    norm: Tensor | None
    kind: int
    skipped: Tensor
    lowest: Tensor
    own: Tensor | None
    clip: Tensor | None
    change: Tensor | None


def collect(optimizer: "Stepper", per: str) -> dict[str, Tensor]:
    """Metrics of the last step, see `FusedOptimizer.metrics`.

    ========================  ======================================================================================
    ``grad_norm``             norm of the gradients before clipping, after unscaling
    ``clip_coefficient``      what norm clipping multiplied with, the smallest of any parameter
    ``clipped_share``         share of the steps so far that clipped; skipped steps do not count. With several
                              devices or rules: that clipped a parameter of the first
    ``param_norm``            2-norm of the parameters that had a gradient, after the step
    ``update_norm``           2-norm of their change as stored, weight decay included; 0 for a skipped step
    ``update_ratio``          update_norm / param_norm
    ``nonfinite_grads``       number of gradients that held inf or NaN
    ``nonfinite_steps``       number of steps so far whose gradients did
    ``skipped_steps``         number of steps so far that were skipped
    ========================  ======================================================================================

    ``skipped_steps`` is always there; with clipping or skipping so are the first three and ``nonfinite_steps``. The
    norms of parameters and updates cost no memory traffic, those of gradients a pass over them unless there is one.
    """
    parts = optimizer._reported
    if parts is None:
        raise RuntimeError("metrics() describes the last step, and there was none yet: call step() before it")
    tallies = list(optimizer._shared.tallies.values())
    tally = torch.stack([t.to(tallies[0].device) for t in tallies]).sum(0) if tallies else None
    reports = [part.report() for part in (*parts.tables, *parts.eager)]
    if per not in PER:
        raise ValueError(f"per must be {', '.join(map(repr, PER))}, got {per!r}")
    found = _Found(reports)
    if per == "model":
        everything = [(index, row) for index, report in enumerate(reports) for row in range(len(report.params))]
        return {**found.of(everything), **_running(reports, tally)}
    places = {p: place for index, report in enumerate(reports) for place, p in _rows(index, report)}
    out: dict[str, Tensor] = {}
    for number, group in enumerate(optimizer.param_groups):
        params = [p for p in group["params"] if p in places]
        if per == "group":
            sets = {str(number): [places[p] for p in params]} if params else {}
        else:
            names = group.get("param_names") or [f"{number}.{i}" for i in range(len(group["params"]))]
            named = zip(names, group["params"], strict=True)
            sets = {name: [places[p]] for name, p in named if p in places}
        for label, members in sets.items():
            out.update({f"{name}/{label}": value for name, value in found.of(members, whole=False).items()})
    return out


def _rows(index: int, report: Report) -> list[tuple[tuple[int, int], Tensor]]:
    return [((index, row), p) for row, p in enumerate(report.params)]


def _running(reports: Sequence[Report], tally: Tensor | None) -> dict[str, Tensor]:
    """Running counts since the optimizer was made."""
    if tally is None:
        return {}
    steps, clipped, skipped, bad = tally.clone().unbind()
    out = {"skipped_steps": skipped}
    if any(report.norm is not None for report in reports):
        out["nonfinite_steps"] = bad
        out["clipped_share"] = clipped / (steps - skipped).clamp(min=1.0)
    return out


class _Found:
    """Rows of all reports, on one device."""

    def __init__(self, reports: Sequence[Report]) -> None:
        self.reports = reports
        self.device = reports[0].skipped.device if reports else torch.device("cpu")

    def of(self, members: Sequence[tuple[int, int]], whole: bool = True) -> dict[str, Tensor]:
        """Metrics over some parameters; whole: over all of them, where the step has results of its own."""
        out: dict[str, Tensor] = {}
        reports = self.reports
        first = reports[0] if reports else None
        if first is not None and first.norm is not None:
            lowest = torch.stack([r.lowest.to(self.device) for r in reports if r.norm is not None]).min()
            out["grad_norm"], out["clip_coefficient"] = first.norm.clone(), lowest
        own = self._gather(members, lambda r: r.own)
        if not whole:
            clip = self._gather(members, lambda r: r.clip)
            out = {} if clip is None else {"clip_coefficient": clip.min()}
            if own is not None and first is not None:
                out["grad_norm"] = _norm(own, first.kind)
        if own is not None:
            out["nonfinite_grads"] = (~torch.isfinite(own)).sum().double()
        change = self._gather(members, lambda r: r.change)
        if change is not None and first is not None:
            squares = change.sum(0)
            out["param_norm"] = squares[0].sqrt()
            out["update_norm"] = torch.where(first.skipped.to(self.device) != 0.0, 0.0, squares[1].sqrt())
            out["update_ratio"] = out["update_norm"] / out["param_norm"]
        return out

    def _gather(self, members: Sequence[tuple[int, int]], pick: Callable[[Report], Tensor | None]) -> Tensor | None:
        """Rows of the members; None where a part has none."""
        rows: dict[int, list[int]] = {}
        for index, row in members:
            rows.setdefault(index, []).append(row)
        parts = []
        for index, few in rows.items():
            values = pick(self.reports[index])
            if values is None:
                return None
            whole = few == list(range(len(values)))
            picked = values if whole else torch.stack([values[row] for row in few])
            parts.append(picked.to(self.device))
        return torch.cat(parts) if parts else None


def _norm(own: Tensor, kind: int) -> Tensor:
    """Norm of all, from those of each."""
    if kind == table.NORM_TWO.value:
        return own.square().sum().sqrt()
    return own.sum() if kind == table.NORM_ONE.value else own.amax()


def of_numbers(
    params: list[Tensor], step: Any, clips: Sequence[float], own: Sequence[float] | None,
    change: Sequence[Sequence[float]] | None, kind: int,
) -> Report:  # fmt: skip
    """A report from Python numbers, those of eager twins."""

    def tensor(x: Any) -> Tensor:
        return torch.tensor(x, dtype=torch.float64)

    return Report(
        params,
        tensor(step.norm) if step.with_norm else None,
        kind,
        tensor(float(step.skip)),
        tensor(min(clips, default=1.0)),
        None if own is None else tensor(list(own)),
        tensor(list(clips)) if step.with_norm else None,
        None if change is None else tensor(change),
    )
