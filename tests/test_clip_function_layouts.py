"""What `fusedopt.clip_grad_norm_` takes: layouts, shared memory, refusals, streams, captures, several devices."""

import math
import re
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from compare import BACKENDS, give_gradients, parameters
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import clip_grad_norm_ as torch_clip
from torch.nn.utils import clip_grads_with_norm_

from fusedopt import clip_tables, layout
from fusedopt.clip import clip_grad_norm_, get_total_norm


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run twins or kernels, whatever the device; every warning comes anew."""
    monkeypatch.setattr(clip_tables, "BACKEND", request.param)
    monkeypatch.setattr(layout, "_announced", set())
    return request.param


def with_gradient(grad: torch.Tensor) -> Any:
    p = torch.nn.Parameter(torch.empty(grad.shape, dtype=grad.dtype, device=grad.device))
    p.grad = grad
    return p


def steps(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(1.0, 1 + math.prod(shape), device=device).reshape(shape).to(dtype)


LAYOUTS: dict[str, tuple[bool, Callable[[torch.Tensor], torch.Tensor]]] = {
    "channels last": (False, lambda t: t.reshape(2, 3, 2, 2).to(memory_format=torch.channels_last)),
    "transposed": (False, lambda t: t.reshape(4, 6).t()),
    "shifted": (False, lambda t: t[3:]),
    "0-dim": (False, lambda t: t[5]),
    "empty": (False, lambda t: t[:0]),
    "gaps": (True, lambda t: t[::2]),
    "columns": (True, lambda t: t.reshape(4, 6)[:, 1:5]),
    "conjugated": (True, lambda t: torch.view_as_complex(t.reshape(12, 2)).conj()),
    "negated": (True, lambda t: torch.view_as_complex(t.reshape(12, 2)).conj().imag),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_layouts(limit: float, name: str, backend: str, device: str) -> None:
    """Values of the gradient are torch's, and nothing around it changes; a copy is announced once."""
    copied, view = LAYOUTS[name]
    memory = [steps(24, device=device) for _ in range(2)]
    ours, theirs = ([with_gradient(view(m)), with_gradient(steps(3, device=device))] for m in memory)
    if copied:
        with pytest.warns(UserWarning, match="is copied to find its norm"):
            norm = clip_grad_norm_(ours, limit)
    else:
        norm = clip_grad_norm_(ours, limit)
    clip_grads_with_norm_(theirs, limit, norm, foreach=False)  # its other form takes no lazy bits
    assert torch.equal(ours[0].grad, theirs[0].grad) and torch.equal(ours[1].grad, theirs[1].grad)
    assert torch.equal(*memory)
    if limit == 0.5:
        assert name in ("empty", "channels last") or not torch.equal(memory[0], steps(24, device=device))
        assert torch.equal(clip_grad_norm_(ours, limit), get_total_norm([p.grad for p in theirs]))  # copies again


@pytest.mark.filterwarnings("ignore:a gradient with gaps")
@pytest.mark.parametrize(
    "views",
    [
        lambda t: [t, t],
        lambda t: [t[:700], t[500:], t[100:200], t[150:1000:], t],
        lambda t: [t[5], t[5], t[5:6], t[:0]],
        lambda t: [t[::2], t[::2], t[1::2]],
    ],
    ids=["listed twice", "overlapping", "one element", "gaps"],
)
def test_gradients_that_share_memory_are_multiplied_as_often_as_they_are_listed(
    views: Any, backend: str, device: str
) -> None:
    first = torch.rand(1000, device=device)
    memory = [first, first.clone()]
    ours, theirs = ([with_gradient(view) for view in views(m)] for m in memory)
    expected = torch.nn.utils.get_total_norm([p.grad.double() for p in theirs])
    norm = clip_grad_norm_(ours, 0.5)
    torch.testing.assert_close(norm.double(), expected, rtol=2**-23, atol=0)
    clip_grads_with_norm_(theirs, 0.5, norm)
    assert torch.equal(*memory) and norm > 0.5


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), min_size=1, max_size=12))
def test_no_launch_multiplies_memory_twice(spans: list[tuple[int, int]]) -> None:
    starts, sizes = np.array(spans).T
    starts = np.where(sizes > 0, starts, 0)
    turns = clip_tables._turns(starts, starts + sizes)
    counted = np.zeros((len(spans), 100), dtype=int)
    for (start, size), turn in zip(spans, turns or [0] * len(spans), strict=True):
        counted[turn, start : start + size] += 1
    assert counted.max(initial=0) <= 1
    assert (turns is None) == (counted.sum(0).max() <= 1)


def test_elements_that_share_memory(backend: str, device: str) -> None:
    """A norm can be taken; a product in place is refused before anything changes."""
    spread = torch.ones(1, device=device).expand(3)
    other = with_gradient(steps(3, device=device))
    with pytest.warns(UserWarning, match="is copied to find its norm"):
        assert get_total_norm([spread]) == torch.tensor(3.0).sqrt()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"shape \(3,\) and strides \(0,\) has elements that share memory"):
            clip_grad_norm_([other, with_gradient(spread)], 0.1)
    assert torch.equal(other.grad, steps(3, device=device))


def test_lists_that_hold_little(backend: str, device: str) -> None:
    without = torch.nn.Parameter(torch.ones(2, device=device))
    assert torch.equal(clip_grad_norm_([without], 1.0), torch.tensor(0.0))
    assert torch.equal(get_total_norm([]), torch.tensor(0.0))
    assert torch.equal(clip_grad_norm_(without, 1.0), torch_clip(without, 1.0))
    for norm_type in (1, 2, math.inf):
        assert get_total_norm([torch.ones(0, device=device)], norm_type) == 0
    one = with_gradient(steps(3, device=device))
    assert torch.equal(clip_grad_norm_(one, 1e9), clip_grad_norm_((p for p in [without, one]), 1e9))
    with pytest.warns(UserWarning, match="empty generator, no gradient clipping") as caught:
        assert clip_grad_norm_((p for p in ()), 1.0) == 0
    assert caught[0].filename == __file__


def test_refusals_name_what_is_wrong(backend: str, device: str) -> None:
    p, q = with_gradient(steps(3, device=device)), with_gradient(steps(4, device=device))
    q.grad = steps(4, device=device).to_sparse()
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: clip_grad_norm_([p], 1.0, 3.0), ValueError, "norm_type must be 1, 2 or inf, got 3.0; torch.nn.utils"),
        (lambda: get_total_norm([p.grad], 0), ValueError, "norm_type must be 1, 2 or inf, got 0"),
        (lambda: clip_grad_norm_({"a": p}, 1.0), TypeError, "parameters must be a tensor or an iterable of tensors"),
        (lambda: get_total_norm([p.grad, None]), TypeError, "got one of NoneType"),  # pyright: ignore[reportArgumentType]  # on purpose
        (lambda: clip_grad_norm_([p, q], 0.1), NotImplementedError, "layout torch.sparse_coo cannot be clipped"),
        (lambda: get_total_norm([torch.ones(2, dtype=torch.int32)]), TypeError, "got torch.int32"),
        (lambda: get_total_norm([torch.ones(2, device="meta")], foreach=True), RuntimeError, "on meta tensors"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            call()
    assert torch.equal(p.grad, steps(3, device=device))
    assert clip_grad_norm_([p], 0.1, foreach=True) == clip_grad_norm_([with_gradient(steps(3, device=device))], 1.0)


@pytest.mark.parametrize("limit", [0.5, 1e9])
def test_autograd_sees_the_change(limit: float, backend: str, device: str) -> None:
    p = with_gradient(steps(3, device=device))
    saved = (p.grad.requires_grad_() * p.grad).sum()
    clip_grad_norm_([p], limit)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.backward()


def test_modes_and_threads_have_tables_of_their_own(backend: str, device: str) -> None:
    def check(n: int) -> None:
        for _ in range(3):
            p = with_gradient(torch.full((4,), float(n), device=device))
            if clip_grad_norm_([p], 1e9) != 2 * n or not torch.equal(p.grad, torch.full_like(p.grad, n)):
                wrong.append(n)
        used.append(clip_tables._store.parts[0][1])

    wrong: list[int] = []
    used: list[Any] = []
    with torch.inference_mode():
        check(1)
    check(2)
    threads = [threading.Thread(target=check, args=(n,)) for n in range(3, 7)]
    for thread in threads:  # one after the other: the interpreter serves one at a time
        thread.start()
        thread.join()
    assert not wrong and len(set(map(id, used))) == 6


def test_only_shapes_are_known() -> None:
    norm = get_total_norm([torch.ones(3, device="meta"), torch.ones(3, device="meta", dtype=torch.float64)])
    assert norm.is_meta and norm.dtype == torch.float64 and norm.shape == ()
    with torch._subclasses.FakeTensorMode():
        assert clip_grad_norm_([with_gradient(torch.ones(3))], 1.0).shape == ()


@pytest.mark.gpu
def test_a_captured_call_clips_at_every_replay() -> None:
    params = parameters("cuda", (300, 70), (5,))
    give_gradients(0, params)
    clip_grad_norm_(params, 0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = clip_grad_norm_(params, 0.5)
    for step in range(3):
        clip_grad_norm_(parameters("cuda", (300, 70), (5,)), 0.1)  # other tables are used in between
        others = parameters("cuda", (300, 70), (5,))
        give_gradients(step, others)
        for p, q in zip(params, others, strict=True):
            assert p.grad is not None and q.grad is not None
            p.grad.copy_(q.grad)
        graph.replay()
        assert torch.equal(norm, clip_grad_norm_(others, 0.5))
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(params, others, strict=True) if p.grad is not None)


@pytest.mark.gpu
def test_devices_and_streams_are_taken_together() -> None:
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    for first in (devices, devices[::-1]):
        params = [p for device in first for p in parameters(device, (300, 70), (5,))]
        give_gradients(0, params)
        before = [p.grad.double().cpu() for p in params if p.grad is not None]
        with torch.cuda.stream(torch.cuda.Stream()):
            norm = clip_grad_norm_(params, 0.5)
        torch.cuda.synchronize()
        expected = math.sqrt(sum(float(g.square().sum()) for g in before))
        assert norm.device == torch.device(first[0]) and abs(float(norm) / expected - 1) < 2**-23
        for p, g in zip(params, before, strict=True):
            assert p.grad is not None
            torch.testing.assert_close(p.grad.double().cpu(), g * (0.5 / expected), rtol=1e-6, atol=0)
