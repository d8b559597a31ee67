"""Ways to keep numbers: every state format and every weight format, crossed with every rule, and one such run.

A run goes on from what it has stored; the oracle starts each step anew from the numbers that those bits stand for
(``kept_check.py``), so no error piles up.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .formats import DTYPES
from .oracle import Configuration
from .oracles import ORACLES
from .problem import configuration
from .storage import CODED, WEIGHTS
from .subjects import Outcome, all_rows, class_name, rule_of, to_torch

if TYPE_CHECKING:
    from fusedopt.rule import Rule, Slot

TIMES = (1, 2, 1000)
"""Step counts that are run, one after the other."""

SHAPES = ((32, 128), (70, 100), (33,))
"""Rows of whole groups, rows with a shorter last group, and what is too small to be quantised."""
MATRICES = ((32, 128), (70, 100))
"""For rules that take nothing else."""

LARGE = 4096
"""Elements from which on state is quantised, in two dimensions or more."""

WIDE = ("float32", "bfloat16", "float16")
MASTER = "master"
"""Name of ``master_weights="float32"``, which is a state format's name as well."""
BOTH = "split8+int8"
STATE_NAMES = (*WIDE, *CODED)
WEIGHT_NAMES = (MASTER, *(name for name in WEIGHTS if name != "float32"), BOTH)
NAMES = (*STATE_NAMES, *WEIGHT_NAMES)


@dataclass(frozen=True)
class Kept:
    """Values of ``state_dtype`` and ``master_weights``, and whether what can be rounded either way is at random."""

    name: str
    state: str | None = None
    weights: str | None = None
    random: bool = False

    def __str__(self) -> str:
        return f"{self.name}, stochastic" if self.random and self.weights != "stochastic" else self.name

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Parameter dtypes that are tried. State is, without a weight format, under fp32, where weights show most."""
        return ("float32",) if self.weights is None else WEIGHTS[self.weights].dtypes

    def options(self, rule: Rule) -> dict[str, Any]:
        """Keyword options of the optimizer."""
        chosen: dict[str, Any] = {}
        if self.state == "uint8":  # for nonnegative state alone
            chosen["state_dtype"] = {slot.name: "uint8" for slot in rule.state if slot.kind == "nonnegative"}
        elif self.state is not None:
            chosen["state_dtype"] = self.state
        if self.state is not None and self.random:
            chosen["state_rounding"] = "stochastic"
        if self.weights is not None:
            chosen["master_weights"] = self.weights
        if self.weights == "split8":
            chosen["master_rounding"] = "stochastic" if self.random else "nearest"
        return chosen

    def held_by(self, rule: Rule, options: Mapping[str, Any]) -> bool:
        """Whether a rule has anything that the format could hold; options: those that say which state it has."""
        kinds = {slot.kind for slot in rule.slots(options)}
        return self.weights is not None or bool(kinds & set(CODED.get(str(self.state), ("signed", "nonnegative"))))

    def refused_by(self, rule: Rule, options: Mapping[str, Any]) -> bool:
        """Whether a rule must refuse it: state of a shape of its own is only cast, what is subtracted stays exact."""
        from fusedopt.rule import switched_on

        own_shapes = any(slot.shape is not None for slot in rule.state)
        subtracts = rule.subtracts is not None and switched_on(options.get(rule.subtracts))
        codes = self.state is not None and (self.random or self.state in CODED)
        return (own_shapes and codes) or (subtracts and self.state not in (None, "float32"))

    def storage(self, slot: Slot, p: np.ndarray) -> str:
        """What a slot of a parameter must be kept in: a name of `STATE_NAMES`."""
        if self.state is None or slot.kind == "weight":
            return "float32"
        if self.state in WIDE:
            return self.state
        quantised = slot.kind in CODED[self.state] and p.ndim >= 2 and p.size >= LARGE
        return self.state if quantised else "float32"


KEPT: dict[str, Kept] = {
    str(kept): kept
    for kept in (
        *(Kept(name, state=name, random=at) for name in STATE_NAMES for at in (False, True)[: 1 + (name != "float32")]),
        Kept(MASTER, weights="float32"),
        *(Kept(name, weights=name) for name in ("split16", "split8", "kahan")),
        Kept("split8", weights="split8", random=True),
        Kept("stochastic", weights="stochastic", random=True),
        Kept(BOTH, state="int8", weights="split8", random=True),
    )
}
"""Title → way to keep numbers."""


@dataclass(frozen=True)
class KeptCell:
    """A configuration of a rule under one of `KEPT`."""

    configuration: Configuration
    kept: Kept

    def __str__(self) -> str:
        return f"{self.configuration} in {self.kept}"

    @property
    def key(self) -> tuple[str, str, str]:
        """Names by which a worker finds it again."""
        return self.configuration.rule, self.configuration.name, str(self.kept)

    @property
    def held(self) -> bool:
        """`Kept.held_by` the rule."""
        return self.kept.held_by(rule_of(self.configuration.rule), options_of(self.configuration))

    @property
    def refused(self) -> bool:
        """`Kept.refused_by` the rule."""
        return self.kept.refused_by(rule_of(self.configuration.rule), options_of(self.configuration))

    def optimizer(self, params: list[torch.Tensor], backend: str) -> Any:
        """fusedopt's class under this cell's options."""
        import fusedopt

        cls, rule = getattr(fusedopt, class_name(self.configuration.rule)), rule_of(self.configuration.rule)
        return cls(params, **self.configuration.options, **self.kept.options(rule), backend=backend)

    def refusal(self) -> str | None:
        """Why the rule refuses it, in its own words; None if it does not."""
        params = [torch.zeros(2, 2, dtype=getattr(torch, name)) for name in self.kept.dtypes]
        try:
            self.optimizer(params, "eager")
        except ValueError as error:
            return " ".join(str(error).split())
        return None


def cells(rules: Container[str], names: Container[str]) -> list[KeptCell]:
    """Formats for each rule, under the configuration that keeps the most."""
    return [
        KeptCell(config, kept)
        for oracle in ORACLES.values()
        if oracle.rule in rules
        for config in _fullest(oracle.rule)
        for kept in KEPT.values()
        if kept.name in names
    ]


def cell(rule: str, config: str, title: str) -> KeptCell:
    """The cell that `KeptCell.key` names."""
    return KeptCell(configuration(rule, config), KEPT[title])


def _fullest(name: str) -> list[Configuration]:
    """The configuration with the most state; of a rule that may subtract averages, one of either sort."""
    oracle, rule = ORACLES[name], rule_of(name)
    fullest: dict[bool, Configuration] = {}
    for config in sorted(oracle.configurations, key=lambda config: -len(rule.slots(options_of(config)))):
        fullest.setdefault(rule.subtracts is not None and bool(config.options.get(rule.subtracts)), config)
    return list(fullest.values())


def options_of(config: Configuration) -> dict[str, Any]:
    """A configuration's options with the rule's defaults."""
    return {**ORACLES[config.rule].defaults, **config.options}


@dataclass(frozen=True)
class KeptProblem:
    """First parameters, their dtypes, and the gradients of each of `TIMES`."""

    dtypes: list[str]
    params: list[np.ndarray]
    grads: list[list[np.ndarray]]


def build(cell: KeptCell, seed: int) -> KeptProblem:
    """Draw the data: magnitudes wander from row to row over all that the dtype's gradients may have.

    In rows of whole groups, elements of a row lie within three decades; elsewhere they are of any size.
    """
    kept, name = cell.kept, cell.configuration.rule
    rng = np.random.default_rng([seed, zlib.crc32(str(cell).encode())])
    places = [(dtype, shape) for dtype in kept.dtypes for shape in (MATRICES if name == "muon" else SHAPES)]
    problem = KeptProblem([dtype for dtype, _ in places], [], [[] for _ in TIMES])
    for dtype, shape in places:
        store = DTYPES[dtype].store
        low, high = DTYPES["float16" if kept.state == "float16" else dtype].gradients
        if shape == SHAPES[0]:
            sizes = rng.uniform(low + 1.5, high - 1.5, (shape[0], 1)) + rng.uniform(-1.5, 1.5, shape)
        else:
            sizes = rng.uniform(low, high, shape)
        problem.params.append(_draw(rng, store, rng.uniform(-3.0, 1.0, shape)))
        for grads in problem.grads:
            grads.append(_draw(rng, store, np.clip(sizes + rng.uniform(-1, 1, shape), low, high)))
    return problem


def _draw(rng: np.random.Generator, store: Any, exponents: np.ndarray) -> np.ndarray:
    signs = rng.choice((-1.0, 1.0), exponents.shape) * (rng.random(exponents.shape) >= 0.03)
    return store.round(signs * 10.0**exponents)


def run(cell: KeptCell, seed: int, backend: str, device: str = "cpu") -> Outcome:
    """All steps on a backend; after each the bits of everything `stored`."""
    problem, rule = build(cell, seed), rule_of(cell.configuration.rule)
    sparse = ORACLES[rule.name].sparse
    params = [
        to_torch(x, DTYPES[dtype], device).requires_grad_()
        for x, dtype in zip(problem.params, problem.dtypes, strict=True)
    ]
    outcome: Outcome = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice on low-precision state is for training
        optimizer = cell.optimizer(params, backend)
        getattr(optimizer, "train", lambda: None)()  # schedule-free rules step in train mode only
        for t, grads in zip(TIMES, problem.grads, strict=True):
            for p, grad, dtype in zip(params, grads, problem.dtypes, strict=True):
                dense = to_torch(grad, DTYPES[dtype], device)
                p.grad = all_rows(dense) if sparse else dense
                if t > 1 and "step" in optimizer.state[p]:
                    optimizer.state[p]["step"].fill_(t - 1)
            optimizer.step()
            outcome.append(stored(optimizer, params, keys(rule)))
    return outcome


def keys(rule: Rule) -> list[str]:
    """``"param"`` and all state keys that numbers of a rule may stand under."""
    slots = [key for slot in rule.state for key in (slot.name, f"{slot.name}_q", f"{slot.name}_scale")]
    return ["param", "param_residual", "master_param", *slots]


def stored(optimizer: Any, params: Sequence[torch.Tensor], names: Sequence[str]) -> dict[str, list[np.ndarray]]:
    """The bits under `keys`, unsigned; empty where there is nothing."""
    return {key: [_unsigned(p if key == "param" else optimizer.state[p].get(key)) for p in params] for key in names}


def _unsigned(x: torch.Tensor | None) -> np.ndarray:
    if x is None:
        return np.empty(0, np.uint8)
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    return x.detach().cpu().contiguous().view(kind).numpy().view(f"u{x.dtype.itemsize}").copy()
