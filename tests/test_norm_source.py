"""Norms taken in backward: the bits of the two-pass step, its launches, and what is summed up late."""

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from at_backward import DTYPES, OPTION, SHAPES, Launches, backward, both, optimizer_of, train
from compare import BACKENDS, assert_equal, params_of, uniform
from scaled import OURS
from torch import Tensor

import fusedopt
from fusedopt import blocks, layout
from fusedopt_kernels import launch


@pytest.fixture(autouse=True)
def _announce_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "_announced", set())


# ------------------------------------------------------------------------------------------------- the same bits
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(dtypes=DTYPES), dict(clip_norm_type=float("inf")), dict(clip_norm_type=1.0, dtypes=DTYPES),
        dict(clip_scope="tensor"), dict(clip_grad_norm=None, skip_norm_above=60.0), dict(ema_decay=0.9),
        dict(clip_grad_norm=None, metrics=["grad_norm"]), dict(cls=fusedopt.LAMB), dict(cautious=True),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:state 'exp_avg_sq' takes")
def test_steps_are_bit_equal_to_the_two_pass_ones(options: dict[str, Any], backend: str, device: str) -> None:
    ours, theirs = both(device, backend=backend, **options)
    for t in range(4):
        train([t], ours, theirs)
        for name, value in theirs.metrics().items():
            assert torch.equal(ours.metrics()[name], value), name
        assert ours.metrics()["grad_norm"] > 0.0
    assert_equal(ours, theirs)


def test_twins_with_several_blocks(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 1000)
    ours, theirs = both(device, backend="eager", clip_norm_type=1.0)
    train(range(3), ours, theirs)
    assert_equal(ours, theirs)
    assert [len(found.sums) for found in ours._eager[0].blocks] == [1, 1, 1, 0, 40]


@pytest.mark.parametrize("backend", BACKENDS)
def test_matrices_of_muon_and_adafactor(backend: str, device: str) -> None:
    for cls in (fusedopt.Muon, fusedopt.Adafactor):
        two = []
        for options in ({OPTION: True}, {}):
            params = [torch.nn.Parameter(t) for t in uniform([(3, 4), (5, 5)], device, torch.float32, 0)]
            two.append(cls(params, lr=0.1, clip_grad_norm=0.5, backend=backend, **options))
        train(range(3), *two)
        assert_equal(*two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_parts_share_one_norm(backend: str, device: str) -> None:
    """An embedding's sparse gradient is a part of its own, measured in the step; the rest is not."""
    two = []
    for options in ({OPTION: True}, {}):
        torch.manual_seed(1)
        model = torch.nn.Sequential(torch.nn.Embedding(9, 4, sparse=True), torch.nn.Linear(4, 3)).to(device)
        optimizer = fusedopt.SGD(model.parameters(), lr=0.1, clip_grad_norm=0.05, backend=backend, **options)  # pyright: ignore[reportArgumentType] # one of BACKENDS
        for t in range(3):
            optimizer.zero_grad()
            model(torch.tensor([t, 3, 3], device=device)).square().sum().backward()
            optimizer.step()
        two.append(optimizer)
    assert_equal(*two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_our_scaler_divides_the_scale_out_and_skips(backend: str, device: str) -> None:
    ours, theirs = both(device, backend=backend, skip_nonfinite=True)
    for optimizer in (ours, theirs):
        scaler = OURS(device, 8.0, growth_interval=2)
        for t in range(5):
            optimizer.zero_grad()
            backward(t, params_of(optimizer), scaler.scale(torch.ones((), device=device)) * (1e39 if t == 3 else 1.0))
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 8.0  # doubled after two steps, halved by the overflow
        assert optimizer.metrics()["skipped_steps"] == 1.0
    assert_equal(ours, theirs)


def test_a_norm_from_elsewhere_takes_the_place_of_ours(device: str) -> None:
    ours, theirs = both(device, backend="triton", metrics=["grad_norm"])
    for t in range(3):
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
            backward(t, params_of(optimizer))
            optimizer.step(total_norm=7.0)
    assert_equal(ours, theirs)
    assert torch.equal(*(o.metrics("tensor")["grad_norm/0.4"] for o in (ours, theirs)))


# ------------------------------------------------------------------------------------------------------- launches
def test_a_step_has_two_launches_and_backward_one_for_each_gradient(device: str) -> None:
    optimizer = optimizer_of(device, norm_at_backward=True, backend="triton")
    optimizer._launcher = counted = Launches()
    train([0], optimizer)
    assert counted.names == ["norm", "adamw_scalars", "adamw"]
    for t in (1, 2, 3):
        counted.names.clear()
        optimizer.zero_grad()
        backward(t, params_of(optimizer))
        assert counted.names == ["norm_source"] * 4  # an empty gradient has nothing to sum up
        counted.names.clear()
        optimizer.step()
        assert counted.names == ["adamw_scalars", "adamw"]


@pytest.mark.filterwarnings("ignore:state 'exp_avg_sq' takes")
def test_warmup_compiles_what_hooks_launch(device: str) -> None:
    optimizer = optimizer_of(device, norm_at_backward=True, backend="triton", dtypes=DTYPES)
    optimizer._launcher = counted = Launches()
    optimizer.warmup()
    ready = counted.compiles
    train(range(2), optimizer)
    assert counted.compiles == ready and "norm_source" in counted.names


OPERATIONS = r"(?:add|mul|fma|max|abs|selp)\.f\w+|shfl[.\w]+|\w+\.shared[.\w]*"


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [1, 2, 3])
def test_compiled_kernels_do_the_same_arithmetic(dtype: torch.dtype, kind: int) -> None:
    """The bits of a sum follow from the order in which a compiler adds up: instructions on numbers are the same."""
    from triton.backends.compiler import GPUTarget

    from fusedopt_kernels.source import source_spec

    def arithmetic(spec: launch.KernelSpec) -> list[tuple[str, ...]]:
        text = launch.compile_for(spec, GPUTarget("cuda", 90, 32)).asm["ptx"]
        named = re.findall(rf"^\s*(?:@!?%p\d+ )?({OPERATIONS})\s(.*);", text, re.M)
        return [(name, *re.findall(r"(?<![%\w])\d+", operands)) for name, operands in named]

    one = arithmetic(source_spec(dtype, kind))
    assert one == arithmetic(launch.norm_spec(dtype, kind))
    assert sum(name.startswith("shfl") for name, *_ in one) >= 5


# --------------------------------------------------------------------------------------- what hooks did not see
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_set_by_hand_are_summed_up_in_the_step(backend: str, device: str) -> None:
    ours, theirs = both(device, backend=backend)
    train([0], ours, theirs)
    if backend == "triton":
        ours._launcher = ours._shared.launcher = counted = Launches()
        ours._parts.tables[0].launcher = counted
    for optimizer in (ours, theirs):
        optimizer.zero_grad()
        first, *rest = params_of(optimizer)
        backward(1, rest)
        first.grad = uniform([tuple(first.shape)], device, first.dtype, 7)[0]
    with pytest.warns(UserWarning, match="1 of 5 gradients were not seen by their hooks"):
        ours.step()
    theirs.step()
    assert_equal(ours, theirs)
    if backend == "triton":
        assert counted.names == ["norm_source"] * 4 + ["adamw_scalars", "adamw"]
    for optimizer in (ours, theirs):
        optimizer.step()  # no backward pass at all: the norm pass
    assert_equal(ours, theirs)


@pytest.mark.parametrize("cls", [fusedopt.AdamW, fusedopt.LAMB])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:norm_at_backward")
def test_gradients_that_stay_for_another_step(cls: Any, backend: str, device: str) -> None:
    """Sums are those of one step: a rule's own norms take their place, and later passes add to the gradients."""
    ours, theirs = both(device, cls=cls, backend=backend)
    train([0, 1], ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.step()
        backward(2, params_of(optimizer))
        optimizer.step()
    assert_equal(ours, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:a gradient with strides")
def test_a_gradient_in_another_layout_is_summed_up_in_the_step(backend: str, device: str) -> None:
    two = []
    for options in ({OPTION: True}, {}):
        p = torch.nn.Parameter(uniform([(6, 4)], device, torch.float32, 0)[0])
        q = torch.nn.Parameter(uniform([(8,)], device, torch.float32, 0)[0])
        optimizer = fusedopt.SGD([p, q], lr=0.1, clip_grad_norm=0.5, backend=backend, **options)  # pyright: ignore[reportArgumentType] # one of BACKENDS
        for t in range(3):
            layout._announced.add("norm not at backward")
            optimizer.zero_grad()
            backward(t, [q])
            p.grad = uniform([(4, 6)], device, torch.float32, t)[0].t()
            optimizer.step()
        two.append(optimizer)
    assert_equal(*two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_parameters_come_and_go(backend: str, device: str) -> None:
    """Gradients that appear or disappear, groups that are added: a new plan, whose first step measures by itself."""
    ours, theirs = both(device, backend=backend)
    train([0, 1], ours, theirs)
    with pytest.warns(UserWarning, match="takes the norm by itself"):
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
            backward(2, params_of(optimizer)[1:])
            optimizer.step()
    left = params_of(ours)[0]
    assert not left._post_accumulate_grad_hooks
    train([3, 4], ours, theirs)
    for optimizer in (ours, theirs):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, device=device))]})
    train([5, 6], ours, theirs)
    assert_equal(ours, theirs)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in params_of(ours))


@pytest.mark.parametrize("steps", [0, 2], ids=["before", "after the first steps"])
@pytest.mark.filterwarnings("ignore:norm_at_backward. this step takes")
def test_gradients_that_flatten_moves(steps: int, device: str) -> None:
    ours, theirs = both(device, backend="triton")
    for optimizer in (ours, theirs):
        train(range(steps), optimizer)
        fusedopt.flatten_(optimizer.param_groups[0]["params"], grads=True)
        train(range(steps, steps + 3), optimizer)
    assert_equal(ours, theirs)
    fusedopt.unflatten_(params_of(ours))


# ----------------------------------------------------------------------------------------------------- life time
def hooks_of(params: Sequence[Tensor]) -> int:
    return sum(len(p._post_accumulate_grad_hooks or ()) for p in params)


def test_hooks_come_with_the_first_step_and_go_with_the_optimizer(device: str) -> None:
    ours, _ = both(device)
    params = params_of(ours)
    backward(0, params)
    assert hooks_of(params) == 0
    ours.step()
    assert hooks_of(params) == len(params)
    hook = next(iter(params[0]._post_accumulate_grad_hooks.values()))
    gone = weakref.ref(ours)
    del ours
    gc.collect()
    assert gone() is None and hooks_of(params) == 0
    hook(params[0])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_hooks_of_their_own(again: Any, device: str) -> None:
    ours, theirs = both(device, backend="triton")
    train(range(2), ours, theirs)
    copied = again(ours)
    assert hooks_of(params_of(copied)) == 0
    copied._launcher = counted = Launches()
    train(range(2, 5), ours, theirs, copied)
    assert_equal(ours, theirs)
    assert_equal(copied, theirs)
    assert counted.names.count("norm") == 1 and hooks_of(params_of(copied)) == len(SHAPES)


@pytest.mark.filterwarnings("ignore:norm_at_backward")
def test_loading_between_backward_and_step(device: str) -> None:
    ours, theirs = both(device)
    train(range(2), ours, theirs)
    saved = copy.deepcopy(theirs.state_dict())
    for optimizer in (ours, theirs):
        optimizer.zero_grad()
        backward(2, params_of(optimizer))
        optimizer.load_state_dict(copy.deepcopy(saved))
        optimizer.step()
    train([3, 4], ours, theirs)
    assert_equal(ours, theirs)


def test_the_page_runs() -> None:
    text = (Path(fusedopt.__file__).parent / "docs" / "norm_at_backward.md").read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert names["optimizer"].metrics()["grad_norm"] > 0.0
