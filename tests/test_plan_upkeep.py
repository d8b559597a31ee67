"""What a kept plan does at every step: uploads only what changed, and sees changes that leave objects the same."""

import gc
import itertools
import weakref
from typing import Any

import pytest
import torch
from compare import BACKENDS, THREE, assert_close, assert_equal, give_gradients, parameters, params_of, train, uniform
from table import RULES, RuleRow, private

from fusedopt import guard as guard_module
from fusedopt_kernels import launch, table

SGD, ADAMW = THREE[0], THREE[2]


def recorded(row: RuleRow, *shapes: tuple[int, ...], **options: Any) -> Any:
    """An optimizer whose kernels are planned but not run."""
    optimizer = row.cls(parameters("cpu", *shapes), **{**row.options, **options}, backend="triton")
    optimizer._launcher = launch.Recorder()
    return optimizer


def uploads(optimizer: Any) -> tuple[int, int, int]:
    (tables,) = optimizer._tables
    return tables.rows.uploads, tables.grads.uploads, tables.hypers.values.uploads


def test_a_steady_step_uploads_nothing_and_a_change_uploads_itself() -> None:
    optimizer = recorded(ADAMW, (4,), (5,))
    give_gradients(0, params_of(optimizer))
    optimizer.step()
    rows, grads, hypers = uploads(optimizer)
    optimizer.step()
    assert uploads(optimizer) == (rows, grads, hypers)
    kept = [p.grad for p in params_of(optimizer)]
    give_gradients(1, params_of(optimizer))
    optimizer.step()
    assert uploads(optimizer) == (rows, grads + 1, hypers) and kept
    optimizer.param_groups[0]["lr"] = 0.5
    optimizer.step()
    assert uploads(optimizer) == (rows, grads + 1, hypers + 1)
    optimizer.step()
    assert uploads(optimizer) == (rows, grads + 1, hypers + 1)


def test_only_the_step_that_changes_an_alignment_uploads_rows() -> None:
    optimizer = recorded(SGD, (8,))
    (p,) = params_of(optimizer)
    spare = torch.zeros(16)
    assert spare.data_ptr() % 16 == 0
    seen = []
    for offset in (0, 4, 1, 2, 8):
        p.grad = spare[offset : offset + 8]
        optimizer.step()
        flags = optimizer._tables[0].rows.array[0, table.FLAGS.value]
        seen.append((bool(flags & table.ALIGNED.value), optimizer._tables[0].rows.uploads))
    assert [aligned for aligned, _ in seen] == [True, True, False, False, True]
    counts = [count for _, count in seen]
    assert [b - a for a, b in itertools.pairwise(counts)] == [0, 1, 0, 1]


def test_alignment_changes_no_bits(device: str) -> None:
    """A full chunk takes the unmasked path when everything is aligned and the masked one when it is not."""
    n = table.CHUNK + 3
    ps, qs = ([torch.nn.Parameter(v) for v in uniform([(n,)], device, torch.float32, 0)] for _ in range(2))
    ours, plain = SGD.cls(ps, **SGD.options, backend="triton"), SGD.cls(qs, **SGD.options, backend="eager")
    spare = torch.zeros(n + 1, device=device)
    for step, offset in enumerate((0, 1)):
        ps[0].grad = spare[offset : offset + n].copy_(uniform([(n,)], device, torch.float32, step + 1)[0])
        qs[0].grad = ps[0].grad.clone()
        ours.step()
        plain.step()
        assert_equal(ours, plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", THREE, ids=str)
def test_gradients_that_come_and_go(row: RuleRow, backend: str, device: str) -> None:
    """Step counts and first steps are those of each parameter."""
    ours = row.cls(parameters(device), **row.options, backend=backend)
    theirs = row.torch_cls(parameters(device), **row.options, foreach=False)
    for step, present in enumerate(((0,), (), (0, 1, 3), (2,), (1, 2))):
        give_gradients(step, params_of(ours), params_of(theirs))
        for optimizer in (ours, theirs):
            for index, p in enumerate(params_of(optimizer)):
                if index not in present:
                    p.grad = None
            optimizer.step()
    assert_close(ours, theirs, 3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_parameters_change_their_dtype(dtype: torch.dtype, backend: str, device: str) -> None:
    """As ``module.to(dtype)`` does it. State keeps its dtype, where torch would fail."""
    ours, plain = (ADAMW.cls(parameters(device), **ADAMW.options, backend=b) for b in (backend, "eager"))
    train([0], ours, plain)
    for optimizer in (ours, plain):
        for p in params_of(optimizer):
            p.grad = None
            p.data = p.data.to(dtype)
    plain._plan = None
    train([1], ours, plain)
    assert_equal(ours, plain)
    assert ours.state[params_of(ours)[0]]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("row", [SGD, ADAMW], ids=str)
def test_numbers_change_inside_their_objects(row: RuleRow, device: str) -> None:
    """A tensor's memory is swapped, a list is written to: neither the group nor its values are new objects."""
    ours, fresh = (row.cls(parameters(device), **row.options) for _ in range(2))
    for optimizer in (ours, fresh):
        optimizer.param_groups[0]["lr"] = torch.tensor(0.5, device=device)
        if row.name != "sgd":
            optimizer.param_groups[0]["betas"] = [0.5, 0.75]
    train([0], ours, fresh)
    for optimizer in (ours, fresh):
        optimizer.param_groups[0]["lr"].data = torch.tensor(0.125, device=device)
        if row.name != "sgd":
            optimizer.param_groups[0]["betas"][1] = 0.875
    fresh._plan = None
    train([1], ours, fresh)
    assert_equal(ours, fresh)


def test_a_cpu_tensor_is_read_at_every_step_whatever_device_has_the_parameters() -> None:
    """Schedulers fill such an lr in place; a GPU's tables hold a copy, which must be renewed."""
    lr = torch.tensor(0.5)
    optimizer = recorded(ADAMW, (4,), lr=lr)
    give_gradients(0, params_of(optimizer))
    optimizer.step()
    optimizer._tables[0].hypers.device = torch.device("meta")  # one that cannot read the CPU's memory
    lr.fill_(0.125)
    optimizer.step()
    before = uploads(optimizer)
    optimizer.step()
    assert uploads(optimizer) == before
    lr.fill_(0.25)
    optimizer.step()
    assert uploads(optimizer) == (*before[:2], before[2] + 1)


def test_private_options_written_in_place_are_seen(device: str) -> None:
    ours, plain = (private(ADAMW.cls(parameters(device)), clip_grad_norm=0.5) for _ in range(2))
    train([0], ours, plain)
    ours.param_groups[0]["fusedopt"]["clip_grad_norm"] = 0.125
    private(plain, clip_grad_norm=0.125)
    plain._plan = None
    train([1], ours, plain)
    assert_equal(ours, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_parameter_that_shrinks_in_place_is_not_written_beyond_its_end(backend: str, device: str) -> None:
    """Same address, dtype and strides; only the shape tells."""
    memory = torch.ones(10, device=device)
    p = torch.nn.Parameter(memory)
    optimizer = RULES[0].cls([p], lr=0.5, backend=backend)
    p.grad = torch.ones_like(p)
    optimizer.step()
    p.grad = None
    p.data = p.data[:4]
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert memory.tolist() == [0.0] * 4 + [0.5] * 6


def test_a_refused_step_leaves_the_optimizer_usable(device: str) -> None:
    ours, plain = (ADAMW.cls(parameters(device), **ADAMW.options) for _ in range(2))
    train([0], ours, plain)
    give_gradients(1, params_of(ours))
    params_of(ours)[1].grad = torch.ones(5, device=device).to_sparse()
    before = [p.detach().clone() for p in params_of(ours)]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="sparse"):
            ours.step()
    assert all(torch.equal(p, q) for p, q in zip(params_of(ours), before, strict=True))
    train([1], ours, plain)
    assert_equal(ours, plain)


def test_copies_of_gradients_reuse_their_buffers(device: str) -> None:
    optimizer = ADAMW.cls(parameters(device, (3, 4)))
    (p,) = params_of(optimizer)
    places = set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusedopt.layout._announced", {"relaid"})
        for step in range(3):
            p.grad = uniform([(4, 3)], device, torch.float32, step)[0].t()
            optimizer.step()
            places.add(optimizer._plan.grad_addresses[0])
    assert len(places) == 1


@pytest.mark.parametrize("row", [SGD, ADAMW], ids=str)
def test_a_plan_keeps_no_parameter_alive_that_left(row: RuleRow, device: str) -> None:
    optimizer = row.cls(parameters(device), **row.options)
    train([0], optimizer)
    gone = weakref.ref(params_of(optimizer)[0])
    optimizer.state.pop(params_of(optimizer)[0])
    del optimizer.param_groups[0]["params"][0]
    train([1], optimizer)
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("guard", [guard_module.guard_of, guard_module.AttributeGuard])
def test_both_guards_see_the_same_changes(guard: Any) -> None:
    """The fast guard is torch-private; the one in Python stands in where it is missing."""
    tensors = [torch.nn.Parameter(torch.zeros(4, 3)), torch.zeros(4, dtype=torch.complex64)]
    check = guard(tensors).check
    assert check(*tensors) and check(torch.nn.Parameter(torch.ones(4, 3)), tensors[1])
    plain = tensors[0].detach()
    for other in (plain, plain.double(), plain.t(), plain[:2], plain.to_sparse(), torch.nn.Parameter(plain.t())):
        assert not check(other, tensors[1])
    assert not check(tensors[0], tensors[1].conj())
