"""Two optimizers on the same numbers: what the tests of the torch face, checkpoints and layouts share."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from table import MATRIX_RULES, RULES, SPARSE_RULES
from tolerances import TOLERANCES

BACKENDS = ("eager", "triton")
THREE = (RULES[1], RULES[6], RULES[7])
"""SGD with momentum and L2, Adam with AMSGrad, AdamW."""
ALL = (*RULES, *MATRIX_RULES, *SPARSE_RULES)
"""Every row of the table; `parameters_of` gives what its class takes."""
IN_TORCH = tuple(row for row in ALL if row.in_torch)
EACH = tuple({row.name: row for row in IN_TORCH}.values())
"""One row of every rule that torch has: its last, which has most switched on."""

SHAPES: tuple[tuple[int, ...], ...] = ((3, 4), (5,), (), (0,))
SHAPES_OF: dict[str, tuple[tuple[int, ...], ...]] = {
    "Adafactor": ((3, 4), (5,), (), (2, 3, 2)),
    "SparseAdam": ((6, 3), (5,), (4, 2, 2)),
    "Muon": ((3, 4), (4, 2), (5, 5), (1, 3)),
}
"""Shapes that classes can take which do not take all."""


def parameters(
    device: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Parameters between −1 and 1, the same in every call; without shapes, one of each kind."""
    return [torch.nn.Parameter(t) for t in uniform(shapes or SHAPES, device, dtype, seed)]


def parameters_of(cls: Any, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    """Parameters that a class takes, the same for torch's class and ours."""
    return parameters(device, *SHAPES_OF.get(cls.__name__, SHAPES), dtype=dtype, seed=seed)


def reference(cls: Any, params: Any, **options: Any) -> Any:
    """torch's optimizer in its for-loop form."""
    form = dict(foreach=False) if "foreach" in inspect.signature(cls).parameters else {}
    return cls(params, **options, **form)


def uniform(shapes: Iterable[tuple[int, ...]], device: str, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Tensors of values between −1 and 1 (both parts, if complex), exact in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in shapes:
        real = torch.randint(-128, 129, (*shape, 2), generator=generator).double() / 128
        made.append(
            (
                torch.view_as_complex(real)
                if dtype.is_complex
                else real[..., 0].clone(memory_format=torch.contiguous_format)
            ).to(device, dtype)
        )
    return made


def give_gradients(seed: int, *lists: Sequence[torch.Tensor]) -> None:
    """The same new gradients between −1 and 1, at new addresses, for every list of parameters."""
    for members in zip(*lists, strict=True):
        seed += 1000
        for p in members:
            p.grad = uniform([tuple(p.shape)], str(p.device), p.dtype, seed)[0]


def make_sparse(seed: int, params: Iterable[torch.Tensor]) -> None:
    """Turn gradients into sparse ones of some rows, one of them in two parts, as an embedding's backward does."""
    for i, p in enumerate(params):
        assert p.grad is not None
        rows = torch.tensor([(seed + i) % 2, 2, 2, 3], device=p.device)
        p.grad = torch.sparse_coo_tensor(rows[None], p.grad[rows], p.shape, check_invariants=True)


def train(steps: Iterable[int], *optimizers: Any) -> None:
    """Step optimizers with the same gradients, which depend on the step's number alone."""
    for step in steps:
        give_gradients(step, *map(params_of, optimizers))
        for optimizer in optimizers:
            if type(optimizer).__name__ == "SparseAdam":
                make_sparse(step, params_of(optimizer))
            optimizer.step()


def contents(optimizer: Any) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Every parameter with its state, in order."""
    return [(p, optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]


def params_of(optimizer: Any) -> list[torch.Tensor]:
    """Its parameters, in order."""
    return [p for p, _ in contents(optimizer)]


def assert_equal(a: Any, b: Any) -> None:
    """Parameters and all state of two optimizers agree bit for bit, dtypes and keys included."""
    for (p, state), (q, other) in zip(contents(a), contents(b), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)
        assert state.keys() == other.keys()
        torch.testing.assert_close(state, other, rtol=0, atol=0, equal_nan=True, check_device=False)


def assert_close(ours: Any, theirs: Any, steps: int, loaded: bool = False) -> None:
    """Parameters and state agree with torch.optim's after some steps; keys, dtypes and shapes are the same.

    loaded: torch's has loaded state, which casts numbers in it to their parameter's dtype.
    """
    for (p, state), (q, other) in zip(contents(ours), contents(theirs), strict=True):
        other = {key: value for key, value in other.items() if value is not None}
        assert state.keys() == other.keys(), (list(state), list(other))
        for key, x, y in [("parameter", p, q), *((key, state[key], other[key]) for key in other)]:
            if isinstance(y, int):  # torch's SparseAdam counts in a Python number
                x, y = torch.as_tensor(x, dtype=torch.float32), torch.tensor(float(y))
            scale = max(1.0, float(y.detach().abs().max())) if y.numel() else 1.0
            eps = max(torch.finfo(t.dtype).eps for t in (x, y))
            atol = steps * (TOLERANCES["torch.optim"].value * eps * scale + doubt(theirs, key, y, loaded))
            same_dtype = not (loaded and y.dim() == 0)
            torch.testing.assert_close(
                x, y, rtol=0, atol=atol, check_device=False, check_stride=False, check_dtype=same_dtype,
                msg=lambda text, key=key: f"{key}: {text}",
            )  # fmt: skip


def doubt(theirs: Any, key: str, y: torch.Tensor, loaded: bool = False) -> float:
    """What torch's own arithmetic leaves open of a value in a step, beyond the rounding of its dtype."""
    name, lr = type(theirs).__name__, max(float(group["lr"]) for group in theirs.param_groups)
    if name == "Muon" and key == "parameter":
        return TOLERANCES["Muon"].value * lr * max(y.shape) ** 0.5
    if torch.finfo(y.dtype).eps == torch.finfo(torch.float64).eps and (name == "NAdam" or (name == "ASGD" and loaded)):
        return TOLERANCES["float32 factors"].value * lr
    return 0.0
