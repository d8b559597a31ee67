"""Formats of state and weights side by side: cases, parameters and comparisons that the tests of formats share."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from table import RuleRow

from fusedopt.formats import NAMES, WEIGHTS

LOW = (torch.bfloat16, torch.float16)
SHAPES: tuple[tuple[int, ...], ...] = ((64, 64), (70, 100), (5, 16, 64), (100,), (), (0, 64))
"""Rows of whole groups, rows that are not, several dims, and three that stay in fp32."""
FEW = SHAPES[:2]
STATES = tuple(name for name in NAMES if name != "uint8")
"""What all of a rule's state can be kept in."""
MASTERS = tuple(WEIGHTS)

Options = dict[str, Any]
LOWEST: Options = dict(state_dtype="int8", master_weights="split8", state_rounding="stochastic")
FORMATS: dict[str, Options] = {
    "split8 int8": LOWEST,
    "kahan float8": dict(state_dtype="float8", master_weights="kahan"),
    "stochastic int4": dict(state_dtype="int4", master_weights="stochastic"),
    "split16 bf16": dict(state_dtype="bfloat16", master_weights="split16", state_rounding="stochastic"),
    "masters": dict(state_dtype={"exp_avg_sq": "uint8"}, master_weights="float32"),
}
"""One configuration for each format of a weight."""
each_format = pytest.mark.parametrize("name", FORMATS)
each_backend = pytest.mark.parametrize("backend", ["eager", "triton"])


def combination(i: int) -> tuple[torch.dtype, Options]:
    """The i-th of a list of (dtype, options) in which every pair of formats, roundings and dtypes comes up early."""
    dtype = (torch.bfloat16, torch.float32, torch.bfloat16, torch.float16)[i % 4]
    options: Options = {"state_dtype": STATES[i % len(STATES)]}
    if i // len(STATES) % 2:
        options["state_rounding"] = "stochastic"
    if dtype in LOW:
        allowed = [name for name in MASTERS if dtype == torch.bfloat16 or not name.startswith("split")]
        options["master_weights"] = allowed[i % len(allowed)]
        if options["master_weights"] == "split8" and i % 3 == 0:
            options["master_rounding"] = "nearest"
    return dtype, options


def takes(row: RuleRow, options: Options) -> bool:
    """Whether a rule can follow options: differences of averages must be exact."""
    return not row.options.get("centered") or options.get("state_dtype") in (None, "float32")


def parameters(
    device: str, dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Normal numbers, the same in every call."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in shapes]


def give(step: int, *lists: Iterable[torch.Tensor], dtype: torch.dtype | None = None, all_of: bool = False) -> None:
    """The same new gradients for every list; unless all_of, the last parameter has none in odd steps."""
    for params in lists:
        params = list(params)
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * step + i))
            if dtype is not None and dtype != p.dtype:
                p.grad_dtype = dtype  # pyright: ignore[reportAttributeAccessIssue] # newer than the stubs
            bare = step % 2 and i == len(params) - 1 and not all_of
            p.grad = None if bare else g.to(p.device, dtype or p.dtype)


def params_of(optimizer: Any) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def tensors_of(optimizer: Any) -> list[dict[str, torch.Tensor]]:
    """Of every parameter, it and all its state."""
    return [{"parameter": p.detach(), **optimizer.state.get(p, {})} for p in params_of(optimizer)]


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(-1).view(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """One dtype and one shape, and equal bit for bit where not NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.itemsize > 1 and a.is_floating_point():
        return bool(((a == b) | (a.isnan() & b.isnan())).all())
    return torch.equal(bits(a), bits(b))


def assert_same(a: Any, b: Any) -> None:
    """Parameters and all state of two optimizers, whatever the layouts."""
    for i, (x, y) in enumerate(zip(tensors_of(a), tensors_of(b), strict=True)):
        assert x.keys() == y.keys(), (i, list(x), list(y))
        for key in x:
            assert same(x[key], y[key]), f"{key} of parameter {i}, shape {tuple(x[key].shape)}"


def snapshot(optimizer: Any) -> list[dict[str, torch.Tensor]]:
    return [{key: t.clone() for key, t in tensors.items()} for tensors in tensors_of(optimizer)]


def unchanged(optimizer: Any, before: list[dict[str, torch.Tensor]]) -> bool:
    """Nothing differs from a snapshot."""
    now = tensors_of(optimizer)
    return all(x.keys() == y.keys() and all(same(x[k], y[k]) for k in x) for x, y in zip(now, before, strict=True))


def both(make: Callable[..., Any], device: str, dtype: torch.dtype, shapes: Any = SHAPES) -> tuple[Any, Any]:
    """An optimizer on twins and one on kernels, of equal parameters; make: (parameters, backend) → optimizer."""
    return (
        make(parameters(device, dtype, shapes), backend="eager"),
        make(parameters(device, dtype, shapes), backend="triton"),
    )


def step_both(
    pair: tuple[Any, Any], steps: Iterable[int], dtype: torch.dtype | None = None, all_of: bool = False
) -> None:
    """Steps of both with the same gradients; equal after each."""
    for step in steps:
        give(step, *map(params_of, pair), dtype=dtype, all_of=all_of)
        for optimizer in pair:
            optimizer.step()
        assert_same(*pair)


def placed(p: torch.Tensor, how: str) -> torch.nn.Parameter:
    """The same values in another layout."""
    q = p.detach()
    if how == "channels last":
        return torch.nn.Parameter(q.contiguous(memory_format=torch.channels_last))
    if how == "transposed":
        return torch.nn.Parameter(q.transpose(0, 1).contiguous().transpose(0, 1))
    wide = torch.zeros((*q.shape[:-1], 2 * q.shape[-1]), dtype=q.dtype, device=q.device)
    return torch.nn.Parameter(wide[..., ::2].copy_(q))
