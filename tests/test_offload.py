"""State on the host, streamed through device buffers: the bits of a step without it. Streams and overlap need a GPU."""

import copy
import itertools
from typing import Any

import pytest
import torch
from compare import assert_equal, give_gradients, params_of, uniform
from table import RULES

import fusedopt
from fusedopt import offload

SOME = ("adamw", "sgd", "lamb", "nadam", "adagrad")
ROWS = tuple({row.name: row for row in RULES if row.name in SOME}.values())
"""With and without a second pass, with a scalar slot, with a first value that is not zero."""
SHAPES = ((64, 128), (70, 100), (33,), (5, 16, 64), (0,), ())
FORMATS: list[dict[str, Any]] = [
    {"master_weights": "split8", "state_dtype": "int8", "clip_grad_norm": 1.0},
    {"master_weights": "float32", "state_dtype": "int4", "state_rounding": "stochastic"},
    {"master_weights": "kahan", "ema_decay": 0.9, "cautious": True},
]


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several buffers, and parameters that need one of their own."""
    monkeypatch.setattr(offload, "CAPACITY", 60_000)


def made(cls: Any, device: str, on: bool, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    params = [torch.nn.Parameter(t) for t in uniform(SHAPES, device, dtype, 0)]
    return cls(params, backend="triton", offload_state=on, **options)


def step(optimizers: list[Any], steps: range, without: int | None = None) -> None:
    """Steps with equal gradients; in the second, one parameter has none."""
    for t in steps:
        give_gradients(t, *map(params_of, optimizers))
        for optimizer in optimizers:
            if t == 1 and without is not None:
                params_of(optimizer)[without].grad = None
            optimizer.step()


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_every_rule_gives_the_same_bits(row: Any, device: str) -> None:
    optimizers = [made(row.cls, device, on, **row.options) for on in (False, True)]
    step(optimizers, range(3))
    assert_equal(*optimizers)


@pytest.mark.parametrize("options", FORMATS, ids=lambda o: o["master_weights"])
def test_formats_and_options_around_it(options: dict[str, Any], device: str) -> None:
    optimizers = [made(fusedopt.AdamW, device, on, torch.bfloat16, lr=0.01, **options) for on in (False, True)]
    step(optimizers, range(4), without=1)
    assert_equal(*optimizers)
    moved = optimizers[1]._shared.offload
    assert len(moved.buffers) > 1
    for p, state in optimizers[1].state.items():
        for key, value in state.items():
            on_host = key in moved.places[p].kept
            assert value.device.type == ("cpu" if on_host else torch.device(device).type)
            assert on_host == (key.endswith(("_q", "_scale")) or key in ("exp_avg", "exp_avg_sq", *BESIDE))


BESIDE = ("param_residual", "master_param")


def test_gradients_that_come_and_go_move_no_state(device: str) -> None:
    optimizer = made(fusedopt.AdamW, device, True)
    step([optimizer], range(1))
    before = {p: {k: v.data_ptr() for k, v in state.items() if v.dim()} for p, state in optimizer.state.items()}
    step([optimizer], range(1, 4), without=0)
    assert before == {p: {k: v.data_ptr() for k, v in s.items() if v.dim()} for p, s in optimizer.state.items()}
    assert sum(b.used for b in optimizer._shared.offload.buffers) < 2 * sum(
        v.nbytes for s in optimizer.state.values() for v in s.values()
    )


def test_a_buffer_moves_in_one_copy_each_way(device: str) -> None:
    """Two device buffers take turns, whatever the number of parameters."""
    optimizer = made(fusedopt.AdamW, device, True)
    step([optimizer], range(2))
    (tables,) = optimizer._tables
    turns = next(iter(tables._turns.values()))
    buffers = [turn.device.data_ptr() for turn in turns]
    assert len(turns) == len(optimizer._shared.offload.buffers) > 2
    assert len(set(buffers)) == 2 and all(a != b for a, b in itertools.pairwise(buffers))
    assert [turn.host.numel() for turn in turns] == [b.used for b in optimizer._shared.offload.buffers]


def test_state_is_saved_loaded_and_copied(device: str) -> None:
    plain, offloaded = (
        made(fusedopt.AdamW, device, on, torch.bfloat16, master_weights="split8", state_dtype="int8")
        for on in (False, True)
    )
    step([plain, offloaded], range(2))
    saved = copy.deepcopy(offloaded.state_dict())
    resumed = made(fusedopt.AdamW, device, True, torch.bfloat16, master_weights="split8", state_dtype="int8")
    for p, q in zip(params_of(resumed), params_of(offloaded), strict=True):
        p.data.copy_(q.data)
    resumed.load_state_dict(saved)
    step([plain, resumed], range(2, 4))
    assert_equal(plain, resumed)
    fresh = made(fusedopt.AdamW, device, True)
    fresh.materialize_state()
    give_gradients(0, params_of(fresh))
    fresh.step()


def test_what_it_cannot_do_is_refused(device: str) -> None:
    p = torch.nn.Parameter(torch.ones(4, 4, device=device))
    with pytest.raises(ValueError, match="must be True or False"):
        fusedopt.AdamW([p], offload_state="yes")  # pyright: ignore[reportArgumentType] # what is tested
    with pytest.raises(ValueError, match="release_gradients"):
        fusedopt.AdamW([p], offload_state=True, release_gradients=True)
    optimizer = fusedopt.Adafactor([p], offload_state=True, backend="triton")
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="adafactor"):
        optimizer.step()
    sparse = fusedopt.SGD([p], offload_state=True, backend="triton")
    p.grad = torch.ones_like(p).to_sparse(1)
    with pytest.raises(RuntimeError, match="sparse gradients"):
        sparse.step()


def test_on_the_host_there_is_nothing_to_do() -> None:
    p = torch.nn.Parameter(torch.ones(4))
    p.grad = torch.ones(4)
    with pytest.warns(UserWarning, match="does nothing"):
        fusedopt.AdamW([p], offload_state=True, backend="eager").step()
