"""Numbers about a step, from what it computed anyway or was asked to sum up on its way: see `collect`.

Nothing is read back from the device. A step leaves norms in its tables; sums over parameters are made here, on
request.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusedopt_kernels import table

if TYPE_CHECKING:
    from .rule import Rule
    from .stepper import Stepper

NAMES = (
    "grad_norm", "clip_coefficient", "clipped_share", "param_norm", "update_norm", "update_ratio", "nonfinite_grads",
    "nonfinite_steps", "skipped_steps",
)  # fmt: skip
"""Every metric, see `collect`."""
CHANGE = {"param_norm", "update_norm", "update_ratio"}
PER = ("model", "group", "tensor")


class Metrics:
    """What is to be measured. norm: of all gradients; single: of each; change: of parameters and their update."""

    def __init__(self, names: Sequence[str]) -> None:
        """Raises:
        TypeError: one string instead of a sequence. ValueError: a name that is not in `NAMES`.
        """
        if isinstance(names, str) or not isinstance(names, Iterable):
            raise TypeError(f"metrics must be a sequence of names, such as ('grad_norm',), got {names!r}")
        names = tuple(names)
        for name in names:
            if name not in NAMES:
                raise ValueError(f"metrics: {name!r} is not known; choose from {', '.join(NAMES)}")
        self.names = names
        self.norm = bool({"grad_norm", "nonfinite_grads", "nonfinite_steps"} & set(names))
        self.single = bool({"grad_norm", "nonfinite_grads"} & set(names))
        self.change = bool(CHANGE & set(names))

    def check(self, rule: "Rule", sparse: bool = False) -> None:
        """Refuse what cannot be measured.

        Raises:
            ValueError: norms of parameters or updates under a rule that does not measure them, or of sparse gradients.
        """
        if self.change and (sparse or not rule.measures):
            names = ", ".join(name for name in self.names if name in CHANGE)
            raise ValueError(
                f"metrics {names}: norms of parameters and updates are not measured "
                f"{'with sparse gradients' if sparse else 'under ' + rule.name}; leave them out"
            )


class Report(NamedTuple):
    """What one part of a step measured, on one device. norm: 0-dim; the rest with a row per parameter, or None.

    own: norms of gradients; clip: coefficients; change: sums of squares of the new weights and of their change.
    """

    params: list[Tensor]
    norm: Tensor | None
    kind: int
    own: Tensor | None
    clip: Tensor | None
    change: Tensor | None


def collect(optimizer: "Stepper", per: str) -> dict[str, Tensor]:
    """Metrics of the last step, see `FusedOptimizer.metrics`.

    ========================  ======================================================================================
    ``grad_norm``             norm of the gradients before clipping, after unscaling
    ``clip_coefficient``      what norm clipping multiplied with, the smallest of any parameter; NaN for a norm of NaN
    ``clipped_share``         share of the steps so far that clipped; skipped steps do not count. With several
                              devices or rules: that clipped a parameter of the first
    ``param_norm``            2-norm of the parameters that had a gradient, after the step
    ``update_norm``           2-norm of their change as stored, weight decay included; 0 for a skipped step
    ``update_ratio``          update_norm / param_norm
    ``nonfinite_grads``       number of gradients that held inf or NaN (fp64: or whose norm is beyond fp64)
    ``nonfinite_steps``       number of steps so far whose gradients did
    ``skipped_steps``         number of steps so far that were skipped
    ========================  ======================================================================================

    ``skipped_steps`` is always there; with clipping or skipping so are the first three and ``nonfinite_steps``. The
    norms of parameters and updates cost no memory traffic, those of gradients a pass over them unless there is one.
    A step without any gradient measures nothing and is not counted.
    """
    if per not in PER:
        raise ValueError(f"per must be {', '.join(map(repr, PER))}, got {per!r}")
    parts = optimizer._reported
    if parts is None:
        raise RuntimeError("metrics() describes the last step, and there was none yet: call step() before it")
    reports = [part.report() for part in (*parts.tables, *parts.eager)]
    asked = optimizer._metrics.names
    rows = _Rows.of(reports, "clip_coefficient" in asked)
    if per == "model":
        out, norm = rows.summary(), reports[0].norm if reports else None
        if norm is not None:
            out["grad_norm"] = norm
        tallies = list(optimizer._shared.tallies.values())
        return {**out, **_running(tallies, norm is not None, "clipped_share" in asked)}
    places = {p: place for place, p in enumerate(p for report in reports for p in report.params)}
    if per == "group":
        members = [[places[p] for p in group["params"] if p in places] for group in optimizer.param_groups]
        sets = {str(number): rows.pick(few).summary() for number, few in enumerate(members) if few}
    else:
        each = {name: values.unbind() for name, values in rows.each().summary().items()}
        labels = {name: places[p] for name, p in _names(optimizer.param_groups) if p in places}
        sets = {label: {name: values[i] for name, values in each.items()} for label, i in labels.items()}
    return {f"{name}/{label}": value for label, found in sets.items() for name, value in found.items()}


def _names(groups: Sequence[dict[str, Any]]) -> Iterator[tuple[str, Tensor]]:
    for number, group in enumerate(groups):
        names, count = group.get("param_names", ()), len(group["params"])
        if len(names) != count:  # no names, or those of what DeepSpeed has put other parameters in place of
            names = [f"{number}.{i}" for i in range(count)]
        yield from zip(names, group["params"], strict=True)


def _running(tallies: Sequence[Tensor], with_norm: bool, share_asked: bool) -> dict[str, Tensor]:
    """Running counts since the optimizer was made."""
    if not tallies:
        return {}
    steps, clipped, skipped, bad = torch.stack([t.to(tallies[0].device) for t in tallies]).sum(0).unbind()
    out = {"skipped_steps": skipped}
    if with_norm:
        out["nonfinite_steps"] = bad
    if with_norm or share_asked:
        out["clipped_share"] = clipped / (steps - skipped).clamp(min=1.0)
    return out


class _Rows(NamedTuple):
    """What all parts measured, on one device, parameters along dim 0; None: something that a part did not measure."""

    kind: int
    own: Tensor | None
    clip: Tensor | None
    change: Tensor | None

    @classmethod
    def of(cls, reports: Sequence[Report], clip_asked: bool) -> "_Rows":
        """clip_asked: a step that does not clip has coefficients too."""
        if not reports:
            return cls(0, None, None, None)
        own, clip, change = (_joined([getattr(r, name) for r in reports]) for name in ("own", "clip", "change"))
        if clip is None and clip_asked:
            device = reports[0].params[0].device
            clip = torch.ones(sum(len(r.params) for r in reports), dtype=torch.float64, device=device)
        return cls(reports[0].kind, own, clip, change)

    def pick(self, rows: Sequence[int]) -> "_Rows":
        """Some parameters; by slices, for an index would have to go to the device."""
        ends = [i for i in range(1, len(rows) + 1) if i == len(rows) or rows[i] != rows[i - 1] + 1]
        runs = [slice(rows[a], rows[b - 1] + 1) for a, b in zip([0, *ends], ends, strict=False)]
        return self._map(lambda x: torch.cat([x[run] for run in runs]))

    def each(self) -> "_Rows":
        """Every parameter for itself, for a `summary` of vectors."""
        return self._map(lambda x: x[None])

    def _map(self, change: Callable[[Tensor], Tensor]) -> "_Rows":
        return _Rows(self.kind, *(None if x is None else change(x) for x in self[1:]))

    def summary(self) -> dict[str, Tensor]:
        """Metrics over dim 0."""
        out: dict[str, Tensor] = {}
        if self.own is not None:
            out["grad_norm"] = _norm(self.own, self.kind)
            out["nonfinite_grads"] = (~torch.isfinite(self.own)).sum(0, dtype=torch.float64)
        if self.clip is not None:
            out["clip_coefficient"] = self.clip.amin(0)
        if self.change is not None:
            weights, changes = self.change.sum(0).sqrt().unbind(-1)
            out.update(param_norm=weights, update_norm=changes, update_ratio=changes / weights)
        return out


def _joined(columns: Sequence[Tensor | None]) -> Tensor | None:
    """One column of all parts; None where a part lacks it."""
    here = [x for x in columns if x is not None]
    return torch.cat([x.to(here[0].device) for x in here]) if len(here) == len(columns) else None


def _norm(own: Tensor, kind: int) -> Tensor:
    """Norm of all, from those of each along dim 0."""
    if kind == table.NORM_TWO.value:
        return own.square().sum(0).sqrt()
    return own.sum(0) if kind == table.NORM_ONE.value else own.amax(0)


def of_numbers(
    params: list[Tensor], norm: float | None, clips: Sequence[float] | None, own: Sequence[float] | None,
    change: Sequence[Sequence[float]] | None, kind: int,
) -> Report:  # fmt: skip
    """A report from Python numbers, those of eager twins."""

    def tensor(x: Any) -> Tensor | None:
        return None if x is None else torch.tensor(x, dtype=torch.float64, device="cpu")

    return Report(params, tensor(norm), kind, tensor(own), tensor(clips), tensor(change))
