"""The eager backend's engine room: twins written down once, scratch that is reused, blocks shared out to threads."""

import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from table import BASIC, RULES, dtype_for, private

from fusedopt import blocks, ports, values
from fusedopt.blocks import BLOCK, GRAIN, Lane
from fusedopt.values import NUMPY, TORCH, Program, Tape, Values, maximum_eager, sqrt_eager

ADAMW = RULES[7].cls
CPU = torch.device("cpu")
SIZES = (2 * BLOCK + 77, 5, GRAIN, BLOCK, 0, GRAIN - 1)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def optimizer(dtype: torch.dtype = torch.float32, sizes: tuple[int, ...] = SIZES, **switches: Any) -> Any:
    """AdamW over CPU tensors with gradients, the same in every call."""
    generator = torch.Generator().manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(dtype)
    made = ADAMW(params, backend="eager")
    return private(made, **switches) if switches else made


def contents(made: Any) -> list[torch.Tensor]:
    """Parameters and all state."""
    params = made.param_groups[0]["params"]
    return [*params, *(t for p in params for t in made.state[p].values())]


CASES = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp64": (torch.float64, {}),
    "bf16 clipped": (torch.bfloat16, {"clip_grad_norm": 1.0}),
    **{name: (dtype_for(BASIC[name]), BASIC[name]) for name in BASIC},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")
def test_a_steady_step_allocates_nothing(case: str, threads: Callable[[int], None]) -> None:
    """Neither NumPy (seen by tracemalloc) nor torch makes as much as one block of temporaries."""
    threads(1)
    dtype, switches = CASES[case]
    made = optimizer(dtype, **switches)
    for _ in range(2):
        made.step()
    scratch = made._eager[0].workers.lanes[0].size
    tracemalloc.start()
    made.step()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    made.step()
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < GRAIN, f"{peak} bytes from Python and NumPy"
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        made.step()
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in getattr(profile, "function_events", ()))
    assert allocated < GRAIN, f"{allocated} bytes from torch"
    assert made._eager[0].workers.lanes[0].size == scratch


def test_adamw_needs_two_scratch_blocks(threads: Callable[[int], None]) -> None:
    threads(1)
    made = optimizer()
    made.step()
    assert [lane.size for lane in made._eager[0].workers.lanes] == [2]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")
def test_threads_change_no_bit(case: str, threads: Callable[[int], None]) -> None:
    found = []
    for count in (1, 2, 3):
        threads(count)
        dtype, switches = CASES[case]
        made = optimizer(dtype, **switches)
        for _ in range(2):
            made.step()
        assert len(made._eager[0].workers.lanes) == count
        found.append(contents(made))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_threads_change_no_bit_of_a_two_pass_rule(threads: Callable[[int], None]) -> None:
    from lamb_like import LambLike

    found = []
    for count in (1, 2):
        threads(count)
        p = torch.nn.Parameter(torch.linspace(-1, 1, 3 * BLOCK + 5))
        made = LambLike([p], backend="eager")
        for _ in range(2):
            p.grad = p.detach().square()
            made.step()
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("count", [1, 2])
def test_an_error_in_a_block_reaches_the_caller(
    count: int, threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads(count)
    made = optimizer()
    made.step()
    run = Program.run

    def fail(self: Program, inputs: Any, lane: Lane) -> None:
        if count == 1 or threading.current_thread() is not threading.main_thread():
            raise ArithmeticError("no such number")
        run(self, inputs, lane)

    with monkeypatch.context() as patch:
        patch.setattr(Program, "run", fail)
        with pytest.raises(ArithmeticError, match="no such number"):
            made.step()
    made.step()


@pytest.mark.parametrize("count", [1, 2])
def test_strange_numbers_raise_no_warning(count: int, threads: Callable[[int], None]) -> None:
    """0/0, ∞ − ∞, √−1 and overflow are for the user to see in the result, as on a GPU."""
    threads(count)
    p = torch.nn.Parameter(torch.ones(2 * BLOCK))
    made = ADAMW([p], lr=1e38, eps=0.0, backend="eager")
    p.grad = torch.tensor([0.0, float("inf"), float("nan"), 1e30]).repeat(BLOCK // 2)
    made.step()
    made.state[p]["exp_avg_sq"].fill_(-1.0)
    made.step()
    assert p.isnan().all()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")
def test_inference_mode(dtype: torch.dtype, count: int, threads: Callable[[int], None]) -> None:
    threads(count)
    with torch.inference_mode():
        p = torch.nn.Parameter(torch.ones(2 * BLOCK, dtype=dtype))
        port = ports.Port(p, torch.float32)

        def rewrite(task: blocks.Task, lane: Lane) -> None:
            array = port.load(task.low, task.high, lane)
            array += 1.0
            port.store(task.low, task.high, array)

        blocks.Workers(p.numel(), CPU).run(rewrite, blocks.tasks_of([p.numel()]))
        assert (p == 2.0).all()


# ---------------------------------------------------------------------------------------------------------- programs
def run(twin: Callable[..., Any], arrays: list[np.ndarray]) -> None:
    """Run a twin over arrays; its results take the places of the first ones."""
    tape = Tape(len(arrays))
    inputs = [Values(tape, i) for i in range(len(arrays))]
    results = twin(*inputs)
    program = tape.program([*zip(results, inputs, strict=False)], torch.float32, CPU)
    program.run(arrays, Lane(len(arrays[0]), CPU))


def test_old_values_stay_until_they_are_not_needed() -> None:
    a, b = np.array([1.0, 2.0], np.float32), np.array([10.0, 20.0], np.float32)

    def twin(x: Values, y: Values) -> tuple[Values, Values]:
        first = x + y
        return first, first * x - y  # x and y are read after their successor is known

    run(twin, [a, b])
    assert a.tolist() == [11.0, 22.0] and b.tolist() == [1.0, 24.0]


def test_results_may_be_inputs_swapped_or_the_same() -> None:
    a, b, c = (np.full(3, x, np.float32) for x in (1.0, 2.0, 3.0))
    run(lambda x, y, z: (y, x, z), [a, b, c])
    assert (a[0], b[0], c[0]) == (2.0, 1.0, 3.0)
    run(lambda x, y, z: (same := x + z, same, same), [a, b, c])
    assert a[0] == b[0] == c[0] == 5.0


def test_work_that_no_result_needs_is_left_out() -> None:
    tape = Tape(1)
    x = Values(tape, 0)
    sqrt_eager(x * 3.0 + 1.0)
    program = tape.program([(x * 2.0, x)], torch.float32, CPU)
    assert program.registers == 0 and len(program._code) == 1


def test_scalars_are_computed_in_their_own_type() -> None:
    """A twin's arithmetic on scalars rounds as the kernel's does, and a scalar may stand on the left."""
    s = np.float32(0.1)
    a = np.ones(2, np.float32)
    run(lambda x: ((s * s) * x,), [a])
    assert a[0] == np.float32(0.1) * np.float32(0.1) != np.float32(0.1 * 0.1)


OPERATIONS = ("add", "sub", "mul", "div", "maximum", "sqrt")
recent = st.integers(0, 5)  # counted back from the last value
operation = st.tuples(st.sampled_from(OPERATIONS), recent, recent)


@given(st.integers(1, 4), st.lists(operation, max_size=20), st.lists(recent, min_size=4, max_size=4))
def test_any_twin_gives_what_its_operations_give_one_by_one(
    n: int, operations: list[tuple[str, int, int]], results: list[int]
) -> None:
    generator = np.random.default_rng(n)
    arrays = [generator.uniform(0.5, 2.0, 7).astype(np.float32) for _ in range(n)]

    def twin(apply: Callable[..., Any], inputs: list[Any]) -> list[Any]:
        known = list(inputs)
        for name, a, b in operations:
            x, y = known[~a % len(known)], known[~b % len(known)]
            known.append(apply(name, x) if name == "sqrt" else apply(name, x, 0.75 if a == b == 0 else y))
        return [known[~r % len(known)] for r in results[:n]]

    def at_once(name: str, *operands: Any) -> np.ndarray:
        out = np.empty(7, np.float32)
        NUMPY[name](*(np.float32(o) if isinstance(o, float) else o for o in operands), out)
        return out

    with np.errstate(all="ignore"):
        expected = [x.copy() for x in twin(at_once, arrays)]
        run(lambda *inputs: twin(inputs[0].tape.apply, list(inputs)), arrays)
    for a, b in zip(arrays, expected, strict=True):
        np.testing.assert_array_equal(a.view(np.int32), b.view(np.int32))


@pytest.mark.parametrize("name", sorted(NUMPY))
def test_both_libraries_round_alike(name: str) -> None:
    """torch does the arithmetic elsewhere than on the CPU; its square root is exact there only."""
    assert NUMPY.keys() == TORCH.keys()
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(10000, generator=generator).exp() for _ in range(2))
    special = {"copy": (a,), "sqrt": (a,), "abs": (-a,), "sign": (a - 1.0,), "where": (a.floor(), a, b)}
    operands = special.get(name, (a, b))
    out, other = torch.empty_like(a), torch.empty_like(a)
    NUMPY[name](*(t.numpy() for t in operands), out=out.numpy())
    TORCH[name](*operands, out=other)
    torch.testing.assert_close(out, other, rtol=2e-7 if name == "sqrt" else 0.0, atol=0)


def test_square_roots_are_correctly_rounded() -> None:
    x = np.arange(2**23, 2**25, 37, dtype=np.int32).view(np.float32)
    expected = np.sqrt(x.astype(np.float64)).astype(np.float32)
    run(lambda y: (sqrt_eager(y),), [x])
    np.testing.assert_array_equal(x, expected)


def test_maximum_keeps_nan() -> None:
    a, b = np.array([np.nan, 1.0, 2.0], np.float32), np.array([1.0, np.nan, 1.0], np.float32)
    run(lambda x, y: (maximum_eager(x, y),), [a, b])
    np.testing.assert_array_equal(a, np.array([np.nan, np.nan, 2.0], np.float32))


def test_layouts_of_tapes_are_found_once() -> None:
    values._layouts.clear()
    made = optimizer(sizes=(5, 7))
    for step in range(4):
        made.param_groups[0]["lr"] = 0.1 * (step + 1)
        made.step()
    assert len(values._layouts) == 1
