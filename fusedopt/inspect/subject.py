"""The small problem that stands for a configuration: an optimizer over one parameter per way through its kernels."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import fusedopt
from fusedopt import formats, options
from fusedopt.inspect.counts import RAGGED
from fusedopt.inspect.errors import BadInput
from fusedopt.inspect.memory import TABLE, Region
from fusedopt.optimizer import FusedOptimizer
from fusedopt.rules import RULES
from fusedopt_kernels import launch, table
from fusedopt_kernels.state.format import StateFormat

TAIL_ELEMENTS = 1003
"""Neither a multiple of a block nor of a vector."""

CASES: dict[str, tuple[int, int]] = {
    "full": (table.CHUNK, 0),
    "unaligned": (table.CHUNK, 1),
    "tail": (TAIL_ELEMENTS, 0),
}
"""Name → (elements, by how many elements the gradient's address is off): an aligned full chunk, a full chunk whose
gradient is a view at an odd offset, and the end of an aligned tensor."""

Shapes = Mapping[str, tuple[tuple[int, ...], int]]
GROUPED: Shapes = {
    "full": ((table.CHUNK // table.SCALE_GROUP, table.SCALE_GROUP), 0),
    "unaligned": ((table.CHUNK // table.SCALE_GROUP, table.SCALE_GROUP), 1),
    "tail": ((65, table.SCALE_GROUP), 0),
    RAGGED: ((60, 100), 0),
}
"""The same as shapes that quantised state takes, and rows that are no multiple of a group, which have a kernel of
their own."""

LOSS_SCALE = 65536.0
"""What a GradScaler begins with."""

COMMAND_OPTIONS = (
    "arch", "param_dtype", "grad_dtype", "clip", "amp", "ema", "metrics", "params", "bandwidth", "check", "json",
)  # fmt: skip
"""The command's own options, for whoever misspells one of them."""


@dataclass(frozen=True)
class Configuration:
    """rule: name in `fusedopt.rules.RULES`. arguments: of its class. Dtypes are torch's names. amp: a step as under
    `fusedopt.GradScaler`, with a loss scale and a search for what is not finite.
    """

    rule: str
    arguments: Mapping[str, Any]
    param_dtype: str = "float32"
    grad_dtype: str = "float32"
    amp: bool = False


@dataclass
class Subject:
    """An optimizer that has a step to take, and one parameter for each of its cases, in their order."""

    optimizer: FusedOptimizer
    params: list[torch.Tensor]
    cases: tuple[str, ...]

    def regions(self, tables: Sequence[torch.Tensor]) -> list[Region]:
        """All memory that the step may touch, after the step made it; ``tables`` are the kernels' arguments.

        Kernels find further tensors by addresses in these; the parts of the step hold them.
        """
        held = [value for part in self.optimizer._tables for value in vars(part).values()]
        tables = [*tables, *(value for value in held if isinstance(value, torch.Tensor))]
        found = {tensor.data_ptr(): Region.of(TABLE, -1, tensor) for tensor in tables}
        for case, p in enumerate(self.params):
            assert p.grad is not None
            tensors = {"param": p, "grad": p.grad, **self.optimizer.state.get(p, {})}
            for role, tensor in tensors.items():
                of_table = tensor.numel() == 1  # a step count
                found[tensor.data_ptr()] = Region.of(TABLE if of_table else role, -1 if of_table else case, tensor)
        return list(found.values())

    def resident(self) -> dict[str, float]:
        """Bytes per element that the parameter of the first case keeps between steps, its gradient included."""
        own = [region for region in self.regions(()) if region.case == 0]
        return {region.role: region.size / self.params[0].numel() for region in own}


def shapes(configuration: Configuration) -> Shapes:
    """Shape and offset of every case."""
    return GROUPED if _is_quantised(configuration) else {name: ((n,), offset) for name, (n, offset) in CASES.items()}


def _is_quantised(configuration: Configuration) -> bool:
    rule = getattr(fusedopt, RULES[configuration.rule]).rule
    chosen = {"state_dtype": formats.canonical(configuration.arguments.get("state_dtype"))}
    p = torch.empty(GROUPED["full"][0], dtype=getattr(torch, configuration.param_dtype), device="meta")
    try:
        formats.check_state_dtype(rule, chosen["state_dtype"] or "float32")
    except ValueError:
        return False  # `make_optimizer` will say what is wrong with it
    storages = (formats.slot_storage(slot, p, chosen) for slot in rule.state if slot.kind != "scalar")
    return any(isinstance(storage, StateFormat) for storage in storages)


def build(configuration: Configuration, copies_of_tail: int = 0) -> Subject:
    """Parameters, gradients and the optimizer, with small numbers in them: one parameter for each case, or so many
    like that of the tail.

    Raises:
        BadInput: the rule or this torch does not take what the configuration asks for.
    """
    dtype, grad_dtype = getattr(torch, configuration.param_dtype), getattr(torch, configuration.grad_dtype)
    generator = torch.Generator().manual_seed(0)
    params, cases = [], dict(shapes(configuration))
    if copies_of_tail:
        cases = {str(i): cases["tail"] for i in range(copies_of_tail)}
    for shape, offset in cases.values():
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        if grad_dtype != dtype:
            if not hasattr(p, "grad_dtype"):
                raise BadInput(f"torch {torch.__version__} has no gradients of another dtype than the parameter's")
            p.grad_dtype = grad_dtype
        p.grad = torch.randn(p.numel() + offset, generator=generator).to(grad_dtype)[offset:].view(shape)
        params.append(p)
    optimizer = make_optimizer(configuration, params)
    if configuration.amp:
        vars(optimizer).update(grad_scale=torch.tensor(LOSS_SCALE), _check_nonfinite=True)
    return Subject(optimizer, params, tuple(cases))


def make_optimizer(
    configuration: Configuration, params: Sequence[Any], command_options: Sequence[str] = COMMAND_OPTIONS
) -> FusedOptimizer:
    """The configuration's optimizer on the Triton backend; whatever its class refuses becomes a `BadInput`."""
    cls = getattr(fusedopt, RULES[configuration.rule])
    own = (name for name in inspect.signature(cls).parameters if name not in ("params", "options"))
    known = [*own, *(name for name in options.Options.__annotations__ if name != "backend")]
    for name in configuration.arguments:
        if name not in known:
            close = difflib.get_close_matches(name, (*known, *command_options), n=1)
            hint = f"did you mean {_flag(close[0])}?" if close else "it takes " + ", ".join(map(_flag, known))
            raise BadInput(f"{configuration.rule} has no option {_flag(name)}; {hint}")
    try:
        return cls(params, **configuration.arguments, backend="triton")
    except TypeError as error:
        raise BadInput(f"{configuration.rule}: the value of an option has the wrong type ({error})") from None
    except (ValueError, RuntimeError) as error:
        raise BadInput(f"{configuration.rule}: {error}") from None


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def kernel_name(spec: launch.KernelSpec) -> str:
    """What a kernel is called in reports: rows of no whole groups have one more of the same name."""
    return f"{spec.name}_{RAGGED}" if spec.constants.get("ROWWISE") else spec.name


def begin(subject: Subject, launcher: launch.Launcher) -> None:
    """Give the optimizer a launcher; one that takes norms in backward does so, after its first step, which does not."""
    subject.optimizer._launcher = launcher
    if (source := subject.optimizer._source) is not None:
        subject.optimizer.step()
        for p in subject.params:
            source.fire(p)


def record(subject: Subject) -> list[tuple[launch.KernelSpec, int, tuple[torch.Tensor, ...]]]:
    """The launches of one step as (spec, grid, arguments), none of them carried out."""
    recorder = launch.Recorder()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a real step would warn of is not the user's concern here
        begin(subject, recorder)
        recorder.record.clear()
        subject.optimizer.step()
    return recorder.record
