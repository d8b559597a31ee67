"""Two optimizers on the same numbers: what the tests of the torch face, checkpoints and layouts share."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from table import RULES
from tolerances import TOLERANCES

BACKENDS = ("eager", "triton")
THREE = (RULES[1], RULES[6], RULES[7])
"""One row of each class: SGD with momentum and L2, Adam with AMSGrad, AdamW."""

SHAPES: tuple[tuple[int, ...], ...] = ((3, 4), (5,), (), (0,))


def parameters(
    device: str, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Parameters between −1 and 1, the same in every call; without shapes, one of each kind."""
    return [torch.nn.Parameter(t) for t in uniform(shapes or SHAPES, device, dtype, seed)]


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


def train(steps: Iterable[int], *optimizers: Any) -> None:
    """Step optimizers with the same gradients, which depend on the step's number alone."""
    for step in steps:
        give_gradients(step, *map(params_of, optimizers))
        for optimizer in optimizers:
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


def assert_close(ours: Any, theirs: Any, steps: int) -> None:
    """Parameters and state agree with torch.optim's after some steps; keys, dtypes and shapes are the same."""
    for (p, state), (q, other) in zip(contents(ours), contents(theirs), strict=True):
        other = {key: value for key, value in other.items() if value is not None}
        assert state.keys() == other.keys(), (list(state), list(other))
        for key, x, y in [("parameter", p, q), *((key, state[key], other[key]) for key in other)]:
            scale = max(1.0, float(y.detach().abs().max())) if y.numel() else 1.0
            atol = TOLERANCES["torch.optim"].value * steps * torch.finfo(y.dtype).eps * scale
            torch.testing.assert_close(
                x, y, rtol=0, atol=atol, check_device=False, check_stride=False,
                msg=lambda text, key=key: f"{key}: {text}",
            )  # fmt: skip
