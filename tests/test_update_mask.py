"""Update masks: what is masked out stays bit for bit, the state follows the whole gradient, checkpoints keep them."""

import io

import pytest
import torch
from compare import BACKENDS, assert_equal, contents, parameters, params_of, train
from hypothesis import given, settings
from hypothesis import strategies as st
from table import FORMATS, RULES, RuleRow, private

import fusedopt

SHAPES = ((33, 7), (5,), (), (0,), (16400,))


def masked(optimizer: fusedopt.FusedOptimizer, seed: int = 0) -> fusedopt.FusedOptimizer:
    generator = torch.Generator().manual_seed(seed)
    for p in params_of(optimizer)[:-1]:  # the last one stays free
        optimizer.set_update_mask(p, (torch.rand(p.shape, generator=generator) < 0.5).to(p.device))
    return optimizer


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", RULES, ids=str)
def test_masked_elements_stay_and_state_follows_the_gradient(row: RuleRow, backend: str, device: str) -> None:
    """One step: then the free elements and all state are those of a run without masks."""
    ours, free = (row.cls(parameters(device, *SHAPES), **row.options, backend=backend) for _ in range(2))
    start = [p.detach().clone() for p in params_of(ours)]
    masked(ours)
    train([0], ours, free)
    for (p, state), (q, other), before in zip(contents(ours), contents(free), start, strict=True):
        mask = state.get("update_mask", torch.ones(p.shape, dtype=torch.bool, device=p.device))
        assert torch.equal(p.detach(), torch.where(mask, q.detach(), before))
        assert {**other, "update_mask": mask}.keys() >= state.keys() >= other.keys()
        assert all(torch.equal(state[key], other[key]) for key in other)


@pytest.mark.filterwarnings("ignore:state 'exp_avg_sq' takes its parameter's dtype")
@pytest.mark.parametrize("fmt", ["split16 weights", "bf16 state"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_with_formats(fmt: str, backend: str, device: str) -> None:
    dtype = torch.bfloat16
    ours = private(
        masked(fusedopt.AdamW(parameters(device, *SHAPES, dtype=dtype), lr=0.1, backend=backend)), **FORMATS[fmt]
    )  # pyright: ignore[reportArgumentType] # one of BACKENDS
    start = [p.detach().clone() for p in params_of(ours)]
    train(range(3), ours)
    for (p, state), before in zip(contents(ours), start, strict=True):
        if "update_mask" in state:
            assert torch.equal(p[~state["update_mask"]], before[~state["update_mask"]])


@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.sampled_from([torch.float32, torch.complex64]))
@settings(max_examples=15, deadline=None)
def test_masks_follow_any_layout(rows: int, columns: int, transposed: bool, dtype: torch.dtype) -> None:
    results = []
    for backend in BACKENDS:
        p = parameters("cpu", (rows, columns), dtype=dtype)[0]
        p = torch.nn.Parameter(p.detach().t().clone(memory_format=torch.contiguous_format).t()) if transposed else p
        optimizer = masked(fusedopt.AdamW([p, torch.nn.Parameter(torch.ones(1))], lr=0.1, backend=backend))  # pyright: ignore[reportArgumentType] # one of BACKENDS
        before, mask = p.detach().clone(), optimizer.state[p]["update_mask"]
        p.grad = torch.ones_like(p)
        optimizer.step()
        assert torch.equal(p[~mask], before[~mask]) and not (p[mask] == before[mask]).any()
        results.append(p.detach())
    if torch.version.cuda is None:
        assert torch.equal(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_saved_loaded_and_taken_off(backend: str, device: str) -> None:
    ours = masked(fusedopt.SGD(parameters(device, *SHAPES), lr=0.1, backend=backend))  # pyright: ignore[reportArgumentType] # one of BACKENDS
    train([0], ours)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    again = fusedopt.SGD([torch.nn.Parameter(p.detach().clone()) for p in params_of(ours)], lr=0.1, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    again.load_state_dict(torch.load(file))
    train([1, 2], ours, again)
    assert_equal(ours, again)
    p = params_of(ours)[0]
    before, mask = p.detach().clone(), ours.state[p]["update_mask"]
    ours.set_update_mask(p, None)
    assert "update_mask" not in ours.state[p]
    train([3], ours)
    assert (p[~mask] != before[~mask]).any()


def test_the_mask_is_a_copy_and_takes_no_launch_of_its_own(device: str) -> None:
    from fusedopt_kernels import launch

    p = parameters(device, (5, 5))[0]
    mask = torch.zeros(5, 5, dtype=torch.bool, device=device)
    optimizer = fusedopt.AdamW([p], backend="triton")
    optimizer.set_update_mask(p, mask)
    mask.fill_(True)
    assert not optimizer.state[p]["update_mask"].any()
    optimizer._launcher = recorder = launch.Recorder()
    train([0], optimizer)
    assert len(recorder.record) == 2


def test_bad_masks_are_refused() -> None:
    p, other = parameters("cpu", (2, 3), (2, 3))
    optimizer = fusedopt.AdamW([p])
    for bad, message in (
        (torch.ones(2, 3), "bool tensor of shape"),
        (torch.ones(3, 2, dtype=torch.bool), "bool tensor of shape"),
        ([True], "got list"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.set_update_mask(p, bad)  # pyright: ignore[reportArgumentType]  # that is the test
    with pytest.raises(ValueError, match="not one of this optimizer's parameters"):
        optimizer.set_update_mask(other, torch.ones(2, 3, dtype=torch.bool))
    assert p not in optimizer.state
