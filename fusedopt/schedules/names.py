"""The schedules: formulas, arguments and their defaults. What torch's classes make of them is in `schedule.py`.

t counts steps after the warm-up of W steps; T = steps − W; epoch = t / epoch_steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Run:
    """What a schedule has to fit in. Steps are those of the optimizer; lr is the largest of the groups'."""

    steps: int
    warmup_steps: int
    lr: float
    min_lr: float
    epoch_steps: float = 1.0

    @property
    def length(self) -> int:
        """T: steps after the warm-up."""
        return max(1, self.steps - self.warmup_steps)

    @property
    def epochs(self) -> float:
        return self.length / self.epoch_steps

    @property
    def final(self) -> float:
        """min_lr over lr."""
        return self.min_lr / self.lr if self.lr > 0 else 1.0


@dataclass(frozen=True)
class Argument:
    """A named argument: what it is, what it `must` be, and its default, a value or a function of the run."""

    about: str
    must: str
    valid: Callable[[Any], bool]
    default: Any
    words: str = ""

    @property
    def default_text(self) -> str:
        return self.words or str(self.default)


@dataclass(frozen=True)
class Named:
    """A schedule. end: what min_lr is to it: "own" (it goes there by itself), "lift" (torch's class goes to 0 and is
    raised to end there), "floor" (never below), "none".
    """

    formula: str
    about: str
    end: str
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    problem: Callable[[Run, Mapping[str, Any]], str | None] = lambda run, arguments: None

    def settle(self, run: Run, given: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments, those that are not given at their defaults for this run."""
        defaults = {name: a.default(run) if callable(a.default) else a.default for name, a in self.arguments.items()}
        return {**defaults, **given}


def is_number(value: Any) -> bool:
    """A finite int or float; True and False are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _whole(about: str, low: int, default: Any, words: str = "") -> Argument:
    return Argument(about, f"a whole number of at least {low}", lambda v: is_whole(v) and v >= low, default, words)


def _positive(about: str, default: Any, words: str = "") -> Argument:
    return Argument(about, "a number above 0", lambda v: is_number(v) and v > 0, default, words)


def _share(about: str, default: float) -> Argument:
    return Argument(about, "a number above 0 and below 1", lambda v: is_number(v) and 0 < v < 1, default)


def _choice(about: str, default: str, *names: str) -> Argument:
    return Argument(about, f"one of {', '.join(names)}", lambda v: v in names, default)


def _sequence(about: str, must: str, valid: Callable[[Any], bool], default: Any, words: str) -> Argument:
    return Argument(about, must, lambda v: isinstance(v, list | tuple) and all(map(valid, v)), default, words)


def _halves(run: Run) -> list[int]:
    first = run.warmup_steps + max(1, run.length // 2)
    return [first, max(first + 1, run.warmup_steps + 3 * run.length // 4)]


def _piecewise_problem(run: Run, given: Mapping[str, Any]) -> str | None:
    boundaries = list(given.get("boundaries", _halves(run)))
    if "boundaries" in given:
        if not boundaries or boundaries != sorted(set(boundaries)):
            return f"boundaries must be increasing steps, not {boundaries}"
        if boundaries[0] <= run.warmup_steps or boundaries[-1] >= run.steps:
            return f"boundaries {boundaries} must be after warmup_steps {run.warmup_steps} and before steps {run.steps}"
    if "values" in given and "factors" in given:
        return "give values or factors, not both"
    name = "values" if "values" in given else "factors"
    levels = given.get(name, FACTORS)
    if len(levels) != len(boundaries) + 1:
        return f"{len(boundaries)} boundaries need {len(boundaries) + 1} {name}, not {len(levels)}"
    if name == "values" and max(levels) > run.lr:
        return f"values {max(levels)} is above lr {run.lr}, which is the largest that a schedule reaches"
    return None


def _step_problem(run: Run, given: Mapping[str, Any]) -> str | None:
    if given.get("step_size", 0) >= max(2, run.length):
        return f"step_size {given['step_size']} must be less than the {run.length} steps after the warm-up"
    return None


def _restarts_problem(run: Run, given: Mapping[str, Any]) -> str | None:
    if given.get("first_period", 0) > run.length:
        return f"first_period {given['first_period']} must not exceed the {run.length} steps after the warm-up"
    return None


def decay_steps(run: Run, share: float) -> int:
    """How many of a run's steps are wsd's decay."""
    return max(1, round(share * run.steps))


def _wsd_problem(run: Run, given: Mapping[str, Any]) -> str | None:
    decay = decay_steps(run, given.get("decay", WSD_DECAY))
    if run.warmup_steps + decay > run.steps:
        return f"warmup_steps {run.warmup_steps} and {decay} steps of decay are more than steps {run.steps}"
    return None


FACTORS = (1.0, 0.1, 0.01)
WSD_DECAY = 0.2
COSINE = "½·(lr − min_lr)·(1 + cos(π·t/T))"

SCHEDULES: dict[str, Named] = {
    "constant": Named("lr", "The same lr throughout.", "none"),
    "step": Named(
        "lr·gamma^⌊t/step_size⌋", "Drops by a factor every step_size steps.", "floor",
        {"step_size": _whole("steps between two drops", 1, lambda run: -(-run.length // 3), "a third of the steps"),
         "gamma": _share("factor of each drop", 0.1)},
        _step_problem,
    ),
    "piecewise": Named(
        "lr·factors[i] from boundaries[i−1] to boundaries[i]", "A constant lr between given steps.", "floor",
        {"boundaries": _sequence("steps at which the lr changes, counted from the start of the run",
                                 "a list of whole numbers", is_whole, _halves,
                                 "half and three quarters of those after the warm-up"),
         "factors": _sequence("multiples of lr, one more than boundaries", "a list of numbers from 0 to 1",
                              lambda v: is_number(v) and 0 <= v <= 1, FACTORS, "1, 0.1, 0.01"),
         "values": _sequence("learning rates instead of factors", "a list of numbers of at least 0",
                             lambda v: is_number(v) and v >= 0, None, "none")},
        _piecewise_problem,
    ),
    "exponential": Named(
        "lr·e^(−k·epoch)", "The same relative drop in every step.", "floor",
        {"k": _positive("decay per epoch", lambda run: math.log(100.0) / run.epochs, "ends at lr/100")},
    ),
    "inverse_time": Named(
        "lr/(1 + k·epoch)", "Fast at first, then ever slower.", "floor",
        {"k": _positive("decay per epoch", lambda run: 9.0 / run.epochs, "ends at lr/10")},
    ),
    "linear": Named("lr − (lr − min_lr)·t/T", "A straight line to min_lr.", "own"),
    "polynomial": Named(
        "min_lr + (lr − min_lr)·(1 − t/T)^power", "Flattens towards min_lr for a power above 1.", "lift",
        {"power": _positive("exponent; 1 is linear", 2.0)},
    ),
    "cosine": Named(f"min_lr + {COSINE}", "Slow at both ends, fast in the middle.", "own"),
    "cosine_restarts": Named(
        f"cosine over periods T₀, T₀·m, T₀·m², …: min_lr + {COSINE} with t and T of the period",
        "Cosine that starts again at lr.", "own",
        {"first_period": _whole("T₀: steps to the first restart", 1,
                                lambda run: -(-run.length // 7), "three periods at multiplier 2: T/7"),
         "multiplier": _whole("m: each period over the one before", 1, 2)},
        _restarts_problem,
    ),
    "warmup_cosine": Named(
        f"min_lr + (lr − min_lr)·step/W, then min_lr + {COSINE}", "From min_lr up to lr, and by cosine back.", "own",
    ),
    "one_cycle": Named(
        "lr/div_factor → lr at warmup_steps (if 0: at 30 % of the steps) → min_lr", "One rise and one fall.", "own",
        {"div_factor": Argument("lr over the lr of the first step", "a number of at least 1",
                                lambda v: is_number(v) and v >= 1, 25.0),
         "anneal": _choice("shape of both parts", "cos", "cos", "linear")},
    ),
    "wsd": Named(
        "lr, over the last decay·steps steps down to min_lr", "Warm-up, stable, decay.", "own",
        {"decay": Argument("share of the steps that decays", "a number above 0 and up to 1",
                           lambda v: is_number(v) and 0 < v <= 1, WSD_DECAY),
         "shape": _choice("sqrt: lr − (lr − min_lr)·√(share of the decay that is done)", "linear",
                          "linear", "cosine", "sqrt")},
        _wsd_problem,
    ),
    "inverse_sqrt": Named(
        "lr·√(timescale/(timescale + t))", "The Transformer's: lr·√(W/step).", "floor",
        {"timescale": _positive("steps after which the lr has fallen to 0.71 of itself",
                                lambda run: run.warmup_steps or max(1, run.steps // 10),
                                "warmup_steps; without, a tenth of the steps")},
    ),
    "plateau": Named(
        "lr·factorⁿ after n plateaus of the validation loss", "Drops when validation no longer improves.", "floor",
        {"factor": _share("of each drop", 0.5),
         "patience": _whole("validations without improvement that pass before the next one drops the lr", 0, 2),
         "threshold": Argument("relative improvement that counts", "a number of at least 0 and below 1",
                               lambda v: is_number(v) and 0 <= v < 1, 1e-4),
         "cooldown": _whole("validations after a drop that do not count", 0, 0)},
    ),
}  # fmt: skip
NAMES = tuple(SCHEDULES)


def default_warmup_steps(name: str, steps: int) -> int:
    """What the commands take when it is not given: 5 % of the steps; one_cycle has a rise of its own."""
    return 0 if name == "one_cycle" else steps // 20


def default_min_lr(name: str, lr: float) -> float:
    """What the commands take for min_lr when it is not given: lr/10 to end at; 0 where it would only cut off."""
    return lr / 10 if SCHEDULES[name].end in ("own", "lift") else 0.0
