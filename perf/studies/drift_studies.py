"""What `perf.studies.drift` measures: what each format of weights and state loses over many steps. Functions give rows.

A format is named weights+state, as in `perf.studies.losses`: ``fp32`` weights are fp32 parameters, all others are bf16
ones, ``bf16`` with nothing beside them; ``-nearest`` and ``-random`` name the rounding that is not the default.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fusedopt
from fusedopt.formats import weight_format
from fusedopt.options import KEY

Row = dict[str, Any]
SHAPE = (64, 64)
"""Of a parameter: the smallest whose state is quantised; a group of scales is a row."""
DECAY_ROWS = 16
"""Rows of it that decay is measured on."""
RATES = (1e-6, 1e-5, 1e-4, 1e-3)
"""lr·weight_decay."""
LR, DECAY = 3e-4, 0.1
SPREAD = 0.5
"""Standard deviation of the logarithm of gradients' sizes. In groups of AdamW's recorded √v it is 0.26 to 0.56."""
MAGNITUDES = tuple(10.0**n for n in range(-12, 5, 2))
TINY_EPS = 1e-30
"""Adam's ε where gradients of any size have to give the same step."""


def settings(name: str) -> tuple[torch.dtype, dict[str, Any]]:
    """(dtype of the parameters, keyword options) of a format."""
    weights, _, state = name.partition("+")
    options: dict[str, Any] = {}
    if weights not in ("fp32", "bf16"):
        options["master_weights"] = weights.removesuffix("-nearest")
        if weights.endswith("-nearest"):
            options["master_rounding"] = "nearest"
    if state:
        options["state_dtype"] = state.removesuffix("-random")
        if state.endswith("-random"):
            options["state_rounding"] = "stochastic"
    return torch.float32 if weights == "fp32" else torch.bfloat16, options


def make(rule: str, name: str, groups: list[dict[str, Any]], **hyper: Any) -> Any:
    """An optimizer of ours, eager; a format that begins with "torch" is torch.optim's own."""
    if name.startswith("torch"):
        return getattr(torch.optim, rule)(groups, **hyper)
    return getattr(fusedopt, rule)(groups, backend="eager", **hyper, **settings(name)[1])


def parameter(x: Tensor, name: str) -> torch.nn.Parameter:
    """Values, which bf16 must hold exactly, as a parameter of a format's dtype."""
    dtype = torch.bfloat16 if name.startswith("torch") else settings(name)[0]
    p = torch.nn.Parameter(x.to(dtype))
    assert torch.equal(p.detach().to(x.dtype), x)
    return p


def held(optimizer: Any, p: torch.nn.Parameter) -> Tensor:
    """What a format holds: the master where there is one; float64."""
    chosen = next(group for group in optimizer.param_groups if any(q is p for q in group["params"])).get(KEY, {})
    form = weight_format(p, chosen)
    if form is None:
        return p.detach().to(torch.float64)
    return form.load(p.detach(), optimizer.state[p].get(form.key)).to(torch.float64)


def bytes_of(optimizer: Any, p: torch.nn.Parameter) -> float:
    """Bytes per element of a parameter and its state."""
    state = [x for x in optimizer.state[p].values() if isinstance(x, Tensor) and x.dim() > 0]
    return sum(x.nbytes for x in (p.detach(), *state)) / p.numel()


def rms(x: Tensor) -> float:
    """Root of the mean square."""
    return float(x.to(torch.float64).square().mean().sqrt())


def along(x: Tensor, direction: Tensor) -> float:
    """How much of a direction x contains: 1 if it is that."""
    return float((x * direction).sum() / direction.square().sum())


def start(seed: int) -> Tensor:
    """Weights as a network has them before training, N(0, 0.02²), exact in bf16; float64."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(SHAPE, generator=generator) * 0.02).to(torch.bfloat16).to(torch.float64)


# -------------------------------------------------------------------------------------------------------- decay
def decay(rule: str, name: str, steps: int, seed: int = 0) -> list[Row]:
    """Nothing but decoupled decay, under gradients of zero; every rate has a group of its own.

    share: how far weights shrank of how far (1 − rate)^steps shrinks them, on average over the elements; deviation: of
    one element from that average, as a share of the same.
    """
    x = start(seed)[:DECAY_ROWS]
    params = [parameter(x, name) for _ in RATES]
    groups = [{"params": [p], "lr": rate / DECAY} for p, rate in zip(params, RATES, strict=True)]
    optimizer = make(rule, name, groups, weight_decay=DECAY)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(steps):
        optimizer.step()
    rows = []
    for p, rate in zip(params, RATES, strict=True):
        lost = x - held(optimizer, p)
        whole = -math.expm1(steps * math.log1p(-rate))
        mean = along(lost, x)
        row: Row = {"study": "decay", "rule": rule, "format": name, "rate": rate, "steps": steps, "exact": whole}
        rows.append(row | {"share": mean / whole, "deviation": rms(lost - mean * x) / rms(x) / whole})
    return rows


# -------------------------------------------------------------------------------------------- a noisy quadratic
class Quadratic:
    """L(x) = ½ Σ h (x − x*)², whose gradients have noise of standard deviation σ.

    σ is lognormal (SPREAD). h/σ is between 0.5 and 50: at lr = 3e-4 Adam, which divides by σ, takes 67 to 6700 steps
    to come 1/e nearer. x* is as far from the first weights as these are from zero.
    """

    def __init__(self, seed: int) -> None:
        """seed: of the noise; the rest is always the same."""
        generator = torch.Generator().manual_seed(1)

        def normal() -> Tensor:
            return torch.randn(SHAPE, generator=generator, dtype=torch.float64)

        self.first = start(0)
        self.best = self.first + 0.02 * normal()
        self.noise = (SPREAD * normal()).exp()
        self.curvature = self.noise * 0.5 * 100 ** torch.rand(SHAPE, generator=generator, dtype=torch.float64)
        self.generator = torch.Generator().manual_seed(seed + 2)

    def gradient(self, x: Tensor) -> Tensor:
        """Of the next batch, rounded to bf16 and so the same for all formats."""
        noise = torch.randn(SHAPE, generator=self.generator, dtype=torch.float64)
        return (self.curvature * (x - self.best) + self.noise * noise).to(torch.bfloat16)

    def loss(self, x: Tensor) -> float:
        """L(x)."""
        return float((self.curvature * (x - self.best).square()).sum() / 2)


def schedule(step: int, steps: int) -> float:
    """Cosine from LR to 0, as training ends: the last updates are the smallest."""
    return LR * (1 + math.cos(math.pi * step / steps)) / 2


def _go(optimizer: Any, p: torch.nn.Parameter, gradient: Tensor, lr: float) -> None:
    p.grad = gradient.to(p.dtype)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()


def follow(names: Sequence[str], steps: int, seed: int = 0) -> list[Row]:
    """The gradients of torch.optim.AdamW in float64, fed to formats as they are.

    error: rms distance of what is held from the float64 weights, over the rms distance that these have come; share:
    how far it came in their direction. forward: the error of the bf16 weights.
    """
    problem = Quadratic(seed)
    exact = torch.nn.Parameter(problem.first.clone())
    reference = torch.optim.AdamW([exact], weight_decay=DECAY)
    params = [parameter(problem.first, name) for name in names]
    optimizers = [
        make("AdamW", name, [{"params": [p]}], weight_decay=DECAY) for name, p in zip(names, params, strict=True)
    ]
    for step in range(steps):
        gradient, lr = problem.gradient(exact.detach()), schedule(step, steps)
        _go(reference, exact, gradient, lr)
        for optimizer, p in zip(optimizers, params, strict=True):
            _go(optimizer, p, gradient, lr)
    way = exact.detach() - problem.first
    rows = []
    for name, optimizer, p in zip(names, optimizers, params, strict=True):
        x = held(optimizer, p)
        row: Row = {"study": "follow", "format": name, "steps": steps, "way": rms(way)}
        row |= {"error": rms(x - exact.detach()) / rms(way), "share": along(x - problem.first, way)}
        rows.append(row | {"forward": rms(p.detach() - exact.detach()) / rms(way)})
    return rows


def closed(name: str, steps: int, seed: int = 0) -> list[Row]:
    """AdamW on the quadratic with gradients at its own weights: the final loss of what is held and of the weights.

    The noise is that of the seed, whatever the format. bytes: of weight and state, per parameter.
    """
    problem = Quadratic(seed)
    p = parameter(problem.first, name)
    optimizer = make("AdamW", name, [{"params": [p]}], weight_decay=DECAY)
    first = problem.loss(problem.first)
    for step in range(steps):
        _go(optimizer, p, problem.gradient(p.detach().to(torch.float64)), schedule(step, steps))
    row: Row = {"study": "closed", "format": name, "steps": steps, "seed": seed, "first": first}
    row["bytes"] = bytes_of(optimizer, p)
    row["held"], row["loss"] = problem.loss(held(optimizer, p)), problem.loss(p.detach().to(torch.float64))
    return [row]


# -------------------------------------------------------------------------------------------------- magnitudes
def nearest_power(x: float) -> float:
    """A power of two: numbers that are multiplied by it keep their mantissas."""
    return 2.0 ** round(math.log2(x))


def gradients(steps: int, seed: int) -> Iterator[Tensor]:
    """Gradients with a mean, lognormal in size from element to element; float32, exact in bf16."""
    generator = torch.Generator().manual_seed(seed)
    size = (SPREAD * torch.randn(SHAPE, generator=generator)).exp()
    mean = torch.randn(SHAPE, generator=generator)
    for _ in range(steps):
        yield ((mean + torch.randn(SHAPE, generator=generator)) * size).to(torch.bfloat16).to(torch.float32)


def moved(state: str, magnitude: float, steps: int, seed: int = 0) -> Tensor:
    """Where AdamW without ε takes fp32 weights from zero, its state in a format; "float64" is torch.optim's."""
    dtype = torch.float64 if state == "float64" else torch.float32
    p = torch.nn.Parameter(torch.zeros(SHAPE, dtype=dtype))
    name = "torch" if state == "float64" else f"fp32+{state}"
    optimizer = make("AdamW", name, [{"params": [p]}], eps=TINY_EPS)
    for gradient in gradients(steps, seed):
        p.grad = gradient.to(dtype) * magnitude
        optimizer.step()
    return p.detach().to(torch.float64)


def magnitudes(state: str, steps: int, seed: int = 0) -> list[Row]:
    """Error of the way of `moved` for gradients of every size, and whether its bits are those of size 1."""
    exact, one = moved("float64", 1.0, steps, seed), moved(state, 1.0, steps, seed)
    rows = []
    for size in MAGNITUDES:
        x = moved(state, nearest_power(size), steps, seed)
        row: Row = {"study": "magnitudes", "state": state, "magnitude": size, "steps": steps}
        error = rms(x - exact) / rms(exact)
        rows.append(row | {"error": error if math.isfinite(error) else None, "same bits": torch.equal(x, one)})
    return rows


def half_scales(steps: int, seed: int = 0) -> list[Row]:
    """By calculation: relative error of scales in fp16, one per 32 elements, floored at 1e-12 before they are rounded.

    Of m and √v after so many of the same gradients: the largest of all groups; 1 is a scale of zero, None overflow.
    """
    m, v = (torch.zeros(SHAPE, dtype=torch.float64) for _ in range(2))
    for gradient in gradients(steps, seed):
        m.lerp_(gradient.to(torch.float64), 0.1)
        v.lerp_(gradient.to(torch.float64).square(), 0.001)
    tops = [x.abs().view(-1, 32).amax(1).numpy() for x in (m, v.sqrt())]
    rows = []
    for size in MAGNITUDES:
        factor = nearest_power(size)
        scales = np.maximum(np.concatenate(tops) * factor, 1e-12)
        with np.errstate(over="ignore"):
            kept = scales.astype(np.float16).astype(np.float64)
        error = float(np.abs(kept / (np.concatenate(tops) * factor) - 1).max())
        row: Row = {"study": "half scales", "magnitude": size, "steps": steps}
        rows.append(row | {"error": error if math.isfinite(error) else None})
    return rows


STUDIES: dict[str, Callable[..., list[Row]]] = {
    "decay": decay, "follow": follow, "closed": closed, "magnitudes": magnitudes, "half scales": half_scales,
}  # fmt: skip
