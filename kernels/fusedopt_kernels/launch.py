"""Compiles and launches kernels: one `KernelSpec` per variant, and the launcher that runs it.

A variant is a kernel function with its compile-time arguments; everything else is read from tables on the device,
so a new lr, step count or gradient address compiles nothing. The first launch of a variant goes through Triton's JIT,
which returns the compiled kernel; later ones call that directly (about 2 µs of Python instead of 11).
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import triton

from . import numerics, scalars, step, table, total, tuning
from .norm import norm_kernel
from .rows import rows_kernel

POINTERS = {
    "rows": "*i64", "grads": "*i64", "chunks": "*i32", "scalars": "*fp64", "partials": "*fp64",
    "hypers": "*fp64", "addresses": "*i64", "conditions": "*fp64", "condition_addresses": "*i64", "header": "*fp64",
    "counts": "*i64", "skipped": "*fp64", "norm": "*fp32", "limit": "*fp64", "row": "*i64", "gradient": "i64",
}  # fmt: skip
"""Type of every run-time argument, by name; kernels share the names."""

OPTIONS: dict[str, Any] = {"num_stages": 1, "enable_fp_fusion": False}
"""Compile options of every kernel; see `numerics` for the FMA policy."""


@dataclass(frozen=True)
class KernelSpec:
    """One compiled variant: kernel function, compile-time arguments in signature order, warps."""

    name: str
    fn: Any
    items: tuple[tuple[str, Any], ...]
    num_warps: int = 4

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Found once: launching looks a spec up at every step."""
        return hash((self.name, self.fn, self.items, self.num_warps))

    @cached_property
    def constants(self) -> dict[str, Any]:
        """Compile-time arguments by name."""
        return dict(self.items)

    @cached_property
    def signature(self) -> dict[str, str]:
        """Triton type of every argument, ``"constexpr"`` for the compile-time ones."""
        return {name: POINTERS.get(name, "constexpr") for name in self.fn.arg_names}


@dataclass(frozen=True)
class UpdateVariant:
    """What selects a variant of the update kernel besides the rule's functions.

    structure: the rule's switches; weight, states: codecs; transforms: gradient transforms in order; grad: gradient
    dtype; compute: arithmetic; n_scalars, n_norms: how many the rule has; exact: division and root are correctly
    rounded; rowwise, by_eight: see ``place.py``; switches: see ``step.py``.
    """

    structure: tuple[bool, ...]
    weight: tuple[Any, ...]
    states: tuple[tuple[Any, ...], ...]
    transforms: tuple[Any, ...]
    grad: torch.dtype
    compute: torch.dtype
    n_scalars: int
    n_norms: int
    exact: bool = True
    rowwise: bool = False
    by_eight: bool = True
    switches: tuple[bool, bool, bool, bool, bool] = (False, False, False, False, False)


KERNELS: dict[str, Any] = {"update": step.update_kernel, "measure": step.measure_kernel, "rows": rows_kernel}
"""Kernels around a rule's functions: update, first pass, update of a sparse gradient's rows."""


def update_spec(name: str, rule: Any, v: UpdateVariant, kernel: str = "update") -> KernelSpec:
    """One of `KERNELS` of a variant around a rule's ``update`` or ``measure``."""
    average = (numerics.triton_type(v.compute),) if v.switches[3] else ()
    types = (numerics.triton_type(v.grad), v.weight[2], *(codec[2] for codec in v.states), *average)
    shape = tuning.shape(types)
    items: tuple[tuple[str, Any], ...] = (
        ("MEASURE" if kernel == "measure" else "RULE", rule),
        ("VARIANT", v.structure),
        ("WEIGHT", v.weight),
        ("STATES", v.states),
        ("TRANSFORMS", v.transforms),
        ("GRAD", numerics.triton_type(v.grad)),
        ("COMPUTE", numerics.triton_type(v.compute)),
        ("EXACT", v.exact),
        ("SWITCHES", v.switches),
        ("ROWWISE", v.rowwise),
        ("BY_EIGHT", v.by_eight),
        ("N_SCALARS", v.n_scalars),
        ("N_NORMS", v.n_norms),
        ("CHUNK", table.CHUNK),
        ("BLOCK", shape.block),
        ("TAIL", shape.tail),
        ("SOURCES", sources(v.weight, *v.states, v.transforms)),
    )
    if kernel == "update":
        items += (("PROGRAMS", shape.programs),)
    return KernelSpec(name, KERNELS[kernel], items, shape.warps)


def persistent(spec: KernelSpec, device: torch.device) -> int:
    """How many programs of a persistent variant a device has; 0: it has one for every chunk."""
    return spec.constants.get("PROGRAMS", 0) * tuning.multiprocessors(device)


def sources(*parts: tuple[Any, ...]) -> str:
    """Hash of the source of functions inside tuples.

    Triton's cache on disk hashes a function passed as an argument by its source, but one inside a tuple by its name
    only: without this a kernel compiled from an older version of a codec would be used again.
    """
    keys = [part.cache_key for functions in parts for part in functions if hasattr(part, "cache_key")]
    return hashlib.sha256("-".join(keys).encode()).hexdigest()


def norm_spec(grad: torch.dtype, kind: int = table.NORM_TWO.value) -> KernelSpec:
    """The norm pass over gradients of one dtype; kind: one of table's ``NORM_…``."""
    sizes = ("CHUNK", table.NORM_CHUNK), ("BLOCK", table.NORM_BLOCK)
    return KernelSpec("norm", norm_kernel, (("GRAD", numerics.triton_type(grad)), ("KIND", kind), *sizes))


SCALARS_BLOCK = 128


@dataclass(frozen=True)
class NormUse:
    """What a step does with gradient norms: constants of the scalars kernel.

    mode: where the norm comes from (``table.py``); kind: which norm. scaled: a loss scale or skip decision is given.
    own: norms of single gradients are used; rule: a rule takes them.
    """

    mode: int = table.NO_NORM.value
    kind: int = table.NORM_TWO.value
    scaled: bool = False
    own: bool = False
    rule: bool = False

    @property
    def with_norm(self) -> bool:
        """Whether a norm enters the step."""
        return self.mode != table.NO_NORM.value


def totals_spec(kind: int) -> KernelSpec:
    """Sums of one table's gradients."""
    return KernelSpec("totals", total.totals_kernel, (("KIND", kind),))


def scalars_spec(name: str, rule: Any, counts: tuple[int, int, int], use: NormUse, averaged: bool) -> KernelSpec:
    """The scalars kernel of a rule; counts: its hyper-parameters, scalars and scalar slots."""
    items = (
        ("RULE", rule),
        ("N_HYPERS", counts[0]),
        ("N_SCALARS", counts[1]),
        ("N_STATE", counts[2]),
        ("NORM_MODE", use.mode),
        ("KIND", use.kind),
        ("SCALED", use.scaled),
        ("OWN_NORMS", use.own),
        ("GRAD_NORM", use.rule),
        ("EMA", averaged),
        ("BLOCK", SCALARS_BLOCK),
    )
    return KernelSpec(name, scalars.scalars_kernel, items)


def compile_for(spec: KernelSpec, target: Any) -> Any:
    """Compile off-line for a ``triton.backends.compiler.GPUTarget`` that need not be present.

    Raises:
        RuntimeError: in a process that runs kernels in the interpreter.
    """
    from triton.compiler import ASTSource

    if numerics.INTERPRETED:
        raise RuntimeError("cannot compile under TRITON_INTERPRET=1; unset it and start a new process")
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(spec.signature.values()) if kind[0] == "*"}
    source = ASTSource(fn=spec.fn, signature=spec.signature, constexprs=spec.constants, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": spec.num_warps, **OPTIONS})


class Launcher:
    """Runs specs on the current device. ``compiles`` counts variants made ready, ``launches`` kernels started."""

    accepts_cpu = numerics.INTERPRETED
    """Whether plans may hold CPU tensors."""

    def __init__(self) -> None:
        self.compiles = 0
        self.launches = 0
        self._ready: dict[tuple[int | None, KernelSpec], Any] = {}

    def run(self, spec: KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
        """Launch ``spec`` over ``grid`` programs; args are the pointer arguments in signature order."""
        key = (args[0].device.index, spec)
        kernel = self._ready.get(key)
        if kernel is None:
            self._ready[key] = self.first(spec, grid, args)
            self.compiles += 1
        else:
            self.again(kernel, spec, grid, args)
        self.launches += 1

    def first(self, spec: KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> Any:
        """Compile and launch; returns what `again` needs."""
        if numerics.INTERPRETED:
            _interpret(spec, grid, args)
            return spec.fn
        return spec.fn[(grid, 1, 1)](*args, **spec.constants, num_warps=spec.num_warps, **OPTIONS)

    def again(self, kernel: Any, spec: KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
        """Launch a variant that is ready."""
        if numerics.INTERPRETED:
            _interpret(spec, grid, args)
        else:
            kernel[(grid, 1, 1)](*args, *spec.constants.values())

    def prepare(self, spec: KernelSpec, args: tuple[torch.Tensor, ...]) -> bool:
        """Compile without launching; True if the variant was not ready yet."""
        key = (args[0].device.index, spec)
        if key in self._ready:
            return False
        if numerics.INTERPRETED:
            self._ready[key] = spec.fn
        else:
            kernel = spec.fn.warmup(*args, **spec.constants, grid=(1, 1, 1), num_warps=spec.num_warps, **OPTIONS)
            kernel._init_handles()
            self._ready[key] = kernel
        self.compiles += 1
        return True


def _interpret(spec: KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
    """Run in the interpreter; overflow and NaN are as silent there as on a GPU."""
    with np.errstate(all="ignore"):
        spec.fn[(grid, 1, 1)](*args, **spec.constants)


class Recorder(Launcher):
    """Launches nothing and writes down ``(spec, grid, args)``: for inspection and tests, on tensors of any device."""

    accepts_cpu = True

    def __init__(self) -> None:
        super().__init__()
        self.record: list[tuple[KernelSpec, int, tuple[torch.Tensor, ...]]] = []

    def first(self, spec: KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> Any:
        self.record.append((spec, grid, args))
        return spec.fn

    def again(self, kernel: Any, spec: KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
        self.record.append((spec, grid, args))

    def prepare(self, spec: KernelSpec, args: tuple[torch.Tensor, ...]) -> bool:
        key = (args[0].device.index, spec)
        new = key not in self._ready
        self._ready.setdefault(key, spec.fn)
        self.compiles += new
        return new
