"""What `perf.studies.state_formats` measures; every function gives rows of numbers by name."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perf.studies.recorded import RUNS, Recording
from perf.studies.state_codes import FORMATS, SCALES, Format, formats

Row = dict[str, Any]
GROUPS = (16, 32, 64, 128)
EPS = 1e-8
OUTLIERS = (1, 10, 30, 100)
"""How much larger the gradients of one column in 64 are made."""
MAGNITUDES = tuple(10.0**n for n in range(-12, 5, 2))

PAIRS = {
    8: (("linear", "integer log e4m4"), ("linear", "square root, no 0"), ("square root", "4th root, no 0")),
    4: (("linear", "integer log e3m1"), ("linear", "linear, no 0"), ("square root", "4th root, no 0")),
}
"""Codes of m and v by bits, for the error with both coded."""


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.double().square().mean().sqrt())


def flat(tensors: list[Tensor]) -> Tensor:
    """All elements in one row."""
    return torch.cat([t.flatten() for t in tensors])


@dataclass
class Moments:
    """Adam's state at a step, and its update before the learning rate."""

    m: list[Tensor]
    v: list[Tensor]
    corrections: tuple[float, float]

    @classmethod
    def of(cls, recording: Recording, step: int) -> "Moments":
        """From a recording of AdamW."""
        betas = RUNS[recording.run].get("optimizer_args", {}).get("betas", (0.9, 0.999))
        corrections = (1 - betas[0] ** step, 1 - betas[1] ** step)
        return cls(recording.slots[step, "exp_avg"], recording.slots[step, "exp_avg_sq"], corrections)

    def times(self, factors: list[Tensor]) -> "Moments":
        """As if gradients had been larger by these factors."""
        pairs = zip(self.m, self.v, factors, strict=True)
        m, v = zip(*[(m * f, v * f * f) for m, v, f in pairs], strict=True)
        return Moments(list(m), list(v), self.corrections)

    def update(self, m: list[Tensor] | None = None, v: list[Tensor] | None = None, eps: float = EPS) -> Tensor:
        """m̂ / (√v̂ + ε) of all elements, with other m and v where given."""
        first, second = self.corrections
        return flat(m or self.m) / first / ((flat(v or self.v) / second).sqrt() + eps)

    def error(self, m: Format | None, v: Format | None) -> Row:
        """What coding of m, of v or of both does to the update.

        update_error: rms error over rms. worst: largest error over rms. median: of the relative error of an element.
        over_10, doubled: share of elements whose update changes by more than 10 %, to more than twice as much.
        """
        exact = self.update()
        coded = self.update(m and [m.coded(x) for x in self.m], v and [v.coded(x) for x in self.v])
        off, size = (coded - exact).abs(), exact.abs()
        return {
            "update_error": rms(off) / rms(exact),
            "worst": float(off.max()) / rms(exact),
            "median": float((off / size.clamp_min(1e-30)).median()),
            "over_10": float((off > 0.1 * size).float().mean()),
            "doubled": float((coded.abs() > 2 * size).float().mean()),
        }


def label(how: Format) -> Row:
    """The columns that say which code a row is of."""
    return {"bits": how.bits, "kind": how.kind, "code": how.name, "scale": how.scale, "group": how.group}


def once(recording: Recording) -> Iterator[Row]:
    """State coded once: with AdamW's last every size of group, with others groups of 64."""
    last = recording.steps[-1]
    for (step, key), slots in recording.slots.items():
        kind = recording.kinds[key]
        moments = Moments.of(recording, step) if recording.run.startswith("adamw") else None
        for how in [how for bits in (8, 4) for how in formats(bits, kind)]:
            for size in GROUPS if step == last and moments is not None else (64,):
                how = how._replace(group=size)
                row = {"study": "once", "run": recording.run, "step": step, "slot": key, **label(how)}
                row.update(slot_errors(slots, how))
                if moments is not None:
                    row.update(moments.error(*((how, None) if kind == "signed" else (None, how))))
                yield row
        if moments is not None and kind == "signed":
            yield from pairs(moments, {"study": "pair", "run": recording.run, "step": step})


def slot_errors(slots: list[Tensor], how: Format) -> Row:
    """slot_error: rms error over rms. Of nonnegative slots also the error of 1/√v, on which most updates depend."""
    exact, coded = flat(slots), flat([how.coded(x) for x in slots])
    row = {"slot_error": rms(coded - exact) / rms(exact)}
    if how.kind == "nonnegative":
        ratio = (exact.sqrt() + EPS) / (coded.sqrt() + EPS)
        row.update(root_error=rms(ratio - 1), root_worst=float(ratio.max()))
    return row


def pairs(moments: Moments, row: Row) -> Iterator[Row]:
    """m and v both coded."""
    for bits, names in PAIRS.items():
        for m, v in names:
            error = moments.error(Format(bits, "signed", m), Format(bits, "nonnegative", v))
            yield {**row, "bits": bits, "code": f"{m}; {v}", "group": 64, **error}


def outliers(recording: Recording, seed: int) -> Iterator[Row]:
    """The same when a column in 64 has larger gradients, as with activations that stand out."""
    moments = Moments.of(recording, recording.steps[-1])
    for factor in OUTLIERS:
        generator = torch.Generator().manual_seed(seed)
        raised = [torch.rand(m.shape[1], generator=generator) < 1 / 64 for m in moments.m]
        wide = moments.times([torch.where(columns, float(factor), 1.0) for columns in raised])
        for bits, kind in FORMATS:
            for how in formats(bits, kind):
                error = wide.error(*((how, None) if kind == "signed" else (None, how)))
                yield {"study": "outliers", "factor": factor, **label(how), **error}


def magnitudes(recording: Recording) -> Iterator[Row]:
    """Share of elements whose update changes by more than 10 %, by type of scale and rms of the gradients (ε = 0)."""
    moments = Moments.of(recording, recording.steps[-1])
    size = rms((flat(moments.v) / moments.corrections[1]).sqrt())
    for magnitude in MAGNITUDES:
        scaled = moments.times([torch.tensor(magnitude / size)] * len(moments.m))
        exact = scaled.update(eps=0.0)
        known = exact.isfinite() & (exact != 0)
        for scale in SCALES:
            m, v = Format(8, "signed", "square root", scale), Format(8, "nonnegative", "4th root, no 0", scale)
            row: Row = {"study": "magnitudes", "magnitude": magnitude, "scale": scale}
            for name, coded in (
                ("m", scaled.update(m=[m.coded(x) for x in scaled.m], eps=0.0)),
                ("v", scaled.update(v=[v.coded(x) for x in scaled.v], eps=0.0)),
            ):
                close = (coded - exact).abs() <= 0.1 * exact.abs()
                row[f"lost_{name}"] = 1 - float(close[known].float().mean())
            yield row


def dither(rounding: str, like: Tensor, step: int, generator: torch.Generator) -> Tensor | None:
    """Numbers of 16 bits in [0, 1), or None for nearest rounding.

    stochastic: random. sequence: i·b + step·a mod 2³² (Weyl), even over steps and elements.
    """
    if rounding == "nearest":
        return None
    if rounding == "stochastic":
        return torch.randint(1 << 16, like.shape, generator=generator) / (1 << 16)
    index = torch.arange(like.numel()).view(like.shape)
    return ((index * 0x5E2D58D9 + step * 0x9E3779B9 & 0xFFFFFFFF) >> 16) / (1 << 16)


@dataclass(frozen=True)
class Replay:
    """An average (rate 1: a sum) of recorded gradients or their squares, coded anew in every step.

    Gradients grow tenfold after a third of the steps, and shrink a hundredfold after two.
    """

    how: Format
    rate: float
    outliers: bool
    rounding: str
    seed: int

    def gradients(self, recorded: Tensor, steps: int) -> Iterator[Tensor]:
        """Those of every step: the recorded ones over and over, each time in another order."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.outliers:
            recorded = recorded * torch.where(torch.rand(recorded.shape[1:], generator=generator) < 1 / 64, 30.0, 1.0)
        order = torch.arange(len(recorded))
        for step in range(steps):
            if step % len(recorded) == 0:
                order = torch.randperm(len(recorded), generator=generator)
            yield recorded[order[step % len(recorded)]] * (1.0, 10.0, 0.1)[3 * step // steps]

    def run(self, recorded: np.ndarray, steps: int) -> Row:
        """Errors at the end of the first phase, a tenth into the second, and at the end of the third."""
        signed = self.how.kind == "signed"
        row = {
            "study": "replay", "rate": self.rate, "outliers": self.outliers, "rounding": self.rounding,
            **label(self.how),
        }  # fmt: skip
        state, exact = torch.zeros(recorded.shape[1:]), torch.zeros(recorded.shape[1:], dtype=torch.float64)
        when = {steps // 3: "steady", steps // 3 + steps // 30: "grown", steps: "shrunk"}
        generator = torch.Generator().manual_seed(self.seed + 1)
        for step, g in enumerate(self.gradients(torch.from_numpy(recorded), steps), 1):
            x = g if signed else g * g
            if self.rate == 1:
                state, exact = state + x, exact + x.double()
            else:
                state = state + (1 - self.rate) * (x - state)
                exact = exact + (1 - self.rate) * (x.double() - exact)
            state = self.how.coded(state, dither(self.rounding, state, step, generator))
            if step in when:
                found = _off(state, exact) if signed else _ratio(state, exact)
                row.update({f"{when[step]}_{name}": value for name, value in found.items()})
        return row


def _off(state: Tensor, exact: Tensor) -> Row:
    """error: rms error over rms. slope: of the coded average over the exact one; 1 is unbiased."""
    state = state.double()
    return {"error": rms(state - exact) / rms(exact), "slope": float((state * exact).sum() / exact.square().sum())}


def _ratio(state: Tensor, exact: Tensor) -> Row:
    """Of √v over the exact one: mean, standard deviation and extremes."""
    ratio = (state.double() / exact)[exact > 0].sqrt()
    return {
        "mean": float(ratio.mean()), "deviation": float(ratio.std()), "least": float(ratio.min()),
        "most": float(ratio.max()),
    }  # fmt: skip
