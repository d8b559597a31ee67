"""Sparse COO gradients: torch's results on touched rows, lazily for rules where torch has none, in two launches."""

from typing import Any

import pytest
import torch
from compare import BACKENDS, assert_close, assert_equal, contents, params_of
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedopt
from fusedopt_kernels import launch

AS_TORCH = (
    ("SGD", dict(lr=0.1)),
    ("SGD", dict(lr=0.1, maximize=True)),
    ("SGD", dict(lr=0.1, momentum=0.9)),
    ("Adagrad", dict(lr=0.1)),
    ("Adagrad", dict(lr=0.1, lr_decay=0.1, initial_accumulator_value=0.5)),
    ("SparseAdam", dict(lr=0.1)),
    ("SparseAdam", dict(lr=0.1, maximize=True)),
)
LAZY = (
    ("RMSprop", dict(lr=0.1, momentum=0.9, centered=True)),
    ("Adam", dict(lr=0.1, amsgrad=True, weight_decay=0.1)),
    ("AdamW", dict(lr=0.1, weight_decay=0.1)),
    ("SGD", dict(lr=0.1, momentum=0.9, weight_decay=0.1)),
)
SHAPES: tuple[tuple[int, ...], ...] = ((40, 12), (7,), (5, 3, 2), (3, 20000))

pytestmark = [
    pytest.mark.filterwarnings("ignore:sgd with momentum moves every row"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # torch's own, in its Adagrad
]


def leaves(device: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in SHAPES]


def sparse_gradient(p: torch.Tensor, seed: int, sparse_dim: int = 1, empty: bool = False) -> torch.Tensor:
    """A few rows, some of them twice, as an embedding's backward makes them."""
    generator = torch.Generator().manual_seed(seed)
    n = 0 if empty else 5
    index = torch.stack([torch.randint(0, p.shape[d], (n,), generator=generator) for d in range(sparse_dim)])
    values = torch.randn((n, *p.shape[sparse_dim:]), generator=generator).to(p.device, p.dtype)
    return torch.sparse_coo_tensor(index.to(p.device), values, p.shape, check_invariants=True)


def step(t: int, *optimizers: Any) -> None:
    """Gradients over one leading dim or two (torch's sparse momentum buffer cannot take the change)."""
    for optimizer in optimizers:
        fixed = any(group.get("momentum") for group in optimizer.param_groups)
        for i, p in enumerate(params_of(optimizer)):
            dims = 1 if fixed else 1 + (p.dim() > 2 and t % 2)
            p.grad = sparse_gradient(p, 100 * t + i, dims, empty=(t + i) % 5 == 4)
        optimizer.step()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), AS_TORCH, ids=str)
def test_results_are_torchs(name: str, options: dict[str, Any], backend: str, device: str) -> None:
    ours = getattr(fusedopt, name)(leaves(device), **options, backend=backend)
    theirs = getattr(torch.optim, name)(leaves(device), **options)
    for t in range(6):
        step(t, ours, theirs)
    if "momentum" in options:  # torch's buffer is a sparse tensor
        for state in theirs.state.values():
            state["momentum_buffer"] = state["momentum_buffer"].to_dense()
    for state in theirs.state.values():
        if isinstance(state.get("step"), int):
            state["step"] = torch.tensor(float(state["step"]))
    assert_close(ours, theirs, 6)


@pytest.mark.parametrize(("name", "options"), (*AS_TORCH, *LAZY), ids=str)
def test_kernels_equal_twins(name: str, options: dict[str, Any], device: str) -> None:
    lazy = {"sparse": "lazy"} if (name, options) in LAZY else {}
    both = [getattr(fusedopt, name)(leaves(device), **options, **lazy, backend=b) for b in BACKENDS]
    for t in range(3):
        step(t, *both)
    assert_equal(*both)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "options"), LAZY, ids=str)
def test_lazy_rules_are_the_dense_rule_on_touched_rows(
    name: str, options: dict[str, Any], backend: str, device: str
) -> None:
    """A row that is touched moves as under dense gradients when it has been touched at every step; others stay."""
    make = getattr(fusedopt, name)
    lazy, dense = make(leaves(device), **options, sparse="lazy", backend=backend), make(leaves(device), **options)
    start = [p.detach().clone() for p in params_of(lazy)]
    for t in range(3):
        for i, (p, q) in enumerate(zip(params_of(lazy), params_of(dense), strict=True)):
            index = torch.arange(0, p.shape[0], 2, device=p.device).unsqueeze(0)
            values = torch.randn((index.shape[1], *p.shape[1:]), generator=torch.Generator().manual_seed(10 * t + i))
            p.grad = torch.sparse_coo_tensor(index, values.to(p.device), p.shape, check_invariants=True)
            q.grad = p.grad.to_dense()
        lazy.step()
        dense.step()
    for (p, state), (q, other), before in zip(contents(lazy), contents(dense), start, strict=True):
        assert torch.equal(p[::2], q[::2]) and torch.equal(p[1::2], before[1::2])
        for key, value in state.items():
            if value.dim():
                assert torch.equal(value[::2], other[key][::2]) and not value[1::2].any()


@given(
    st.integers(1, 50), st.integers(1, 40), st.integers(0, 60),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64]), st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_any_sparse_gradient(rows: int, columns: int, touched: int, dtype: torch.dtype, seed: int) -> None:
    """Repeated rows, none, all: SGD's step is that of the dense gradient."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(rows, columns, generator=generator).to(dtype)
    index = torch.randint(0, rows, (1, touched), generator=generator)
    values = torch.randn(touched, columns, generator=generator).to(dtype)
    grad = torch.sparse_coo_tensor(index, values, start.shape, check_invariants=True).coalesce()
    results = []
    for backend, gradient in (("eager", grad), ("triton", grad), ("eager", grad.to_dense())):
        p = start.clone().requires_grad_()
        p.grad = gradient
        fusedopt.SGD([p], lr=0.5, backend=backend).step()  # pyright: ignore[reportArgumentType]  # one of BACKENDS
        results.append(p.detach())
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_two_launches_for_any_number_of_sparse_parameters(device: str) -> None:
    for count in (1, 30):
        params = [torch.ones(4, 3, device=device, requires_grad=True) for _ in range(count)]
        optimizer = fusedopt.SparseAdam(params, backend="triton")
        optimizer._launcher = recorder = launch.Recorder()
        step(0, optimizer)
        assert [spec.name for spec, _, _ in recorder.record] == ["sparse_adam_scalars", "sparse_adam_rows"]


def test_dense_and_sparse_parameters_in_one_optimizer(device: str) -> None:
    both = []
    for module in (fusedopt, torch.optim):
        torch.manual_seed(0)
        net = torch.nn.ModuleDict({"e": torch.nn.Embedding(20, 6, sparse=True), "l": torch.nn.Linear(6, 2)}).to(device)
        optimizer = module.Adagrad(net.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad()
            words = torch.randint(0, 20, (8,), generator=torch.Generator().manual_seed(seed)).to(device)
            net["l"](net["e"](words)).square().sum().backward()
            optimizer.step()
        both.append(optimizer)
    assert_close(*both, 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_that_change_between_sparse_and_dense(backend: str, device: str) -> None:
    ours, dense = (fusedopt.SGD(leaves(device), lr=0.1, backend=backend) for _ in range(2))  # pyright: ignore[reportArgumentType]  # one of BACKENDS
    for t in range(4):
        for i, (p, q) in enumerate(zip(params_of(ours), params_of(dense), strict=True)):
            q.grad = sparse_gradient(p, t + i).to_dense()
            p.grad = sparse_gradient(p, t + i) if (t + i) % 2 else q.grad
        ours.step()
        dense.step()
    assert_equal(ours, dense)


def test_masks_hold_under_sparse_gradients(device: str) -> None:
    both = [fusedopt.SparseAdam(leaves(device), lr=0.1, backend=b) for b in BACKENDS]  # pyright: ignore[reportArgumentType]  # as above
    for optimizer in both:
        for i, p in enumerate(params_of(optimizer)):
            optimizer.set_update_mask(p, torch.arange(p.numel(), device=p.device).reshape(p.shape) % (2 + i) == 0)
    start = [p.detach().clone() for p in params_of(both[0])]
    for t in range(3):
        step(t, *both)
    assert_equal(*both)
    for (p, state), before in zip(contents(both[0]), start, strict=True):
        assert torch.equal(p[~state["update_mask"]], before[~state["update_mask"]])


def test_warmup_compiles_the_sparse_variant(device: str) -> None:
    optimizer = fusedopt.SparseAdam(leaves(device), backend="triton")
    optimizer._launcher = launch.Recorder()
    for i, p in enumerate(params_of(optimizer)):
        p.grad = sparse_gradient(p, i)
    assert optimizer.warmup()[0] == 2
    step(0, optimizer)
    assert optimizer._launcher.compiles == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Adam", {}, "does not support sparse gradients, please consider SparseAdam instead, or pass sparse='lazy'"),
        ("RMSprop", {}, "RMSprop does not support sparse gradients"),
        ("Adadelta", {}, "Adadelta does not support sparse gradients"),
        ("SGD", dict(weight_decay=0.1), "weight_decay option is not compatible with sparse gradients"),
        ("Adagrad", dict(weight_decay=0.1), "weight_decay option is not compatible with sparse gradients"),
        ("SGD", dict(cautious=True), "do not take sparse gradients"),
    ],
    ids=str,
)
def test_what_cannot_take_them_refuses_before_anything_changes(
    name: str, options: dict[str, Any], message: str, device: str
) -> None:
    params = leaves(device)
    optimizer = getattr(fusedopt, name)(params, **options)
    start = [p.detach().clone() for p in params]
    with pytest.raises(RuntimeError, match=message):
        step(0, optimizer)
    assert all(map(torch.equal, params, start)) and not any(optimizer.state.values())


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("kind", [2.0, 1.0, float("inf")])
def test_clipping_takes_the_norm_of_the_coalesced_gradient(kind: float, backend: str, device: str) -> None:
    """Together with a dense parameter; torch clips the same gradients made dense."""
    ours, theirs = [*leaves(device), torch.ones(3, device=device)], [*leaves(device), torch.ones(3, device=device)]
    optimizer = fusedopt.SGD(ours, lr=0.5, clip_grad_norm=0.5, clip_norm_type=kind, backend=backend)  # pyright: ignore[reportArgumentType] # one of the backends
    reference = torch.optim.SGD(theirs, lr=0.5)
    for t in range(3):
        for i, (p, q) in enumerate(zip(ours[:-1], theirs[:-1], strict=True)):
            p.grad = sparse_gradient(p, 10 * t + i)
            q.grad = p.grad.to_dense()
        ours[-1].grad, theirs[-1].grad = torch.full_like(ours[-1], 0.25), torch.full_like(ours[-1], 0.25)
        torch.nn.utils.clip_grad_norm_(theirs, 0.5, norm_type=kind)
        optimizer.step()
        reference.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_sparse_gradient_that_is_not_finite_skips_the_step(backend: str, device: str) -> None:
    params = leaves(device)
    optimizer = fusedopt.SGD(params, lr=0.5, skip_nonfinite=True, backend=backend)  # pyright: ignore[reportArgumentType] # one of the backends
    start = [p.detach().clone() for p in params]
    for i, p in enumerate(params):
        p.grad = sparse_gradient(p, i)
    params[0].grad = params[0].grad * float("inf") if params[0].grad is not None else None
    optimizer.step()
    assert all(map(torch.equal, params, start)) and optimizer.metrics()["skipped_steps"] == 1


def test_sparse_adam_refuses_dense_gradients(device: str) -> None:
    p = leaves(device)[0]
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="SparseAdam does not support dense gradients, please consider Adam instead"):
        fusedopt.SparseAdam([p]).step()


def test_a_parameter_with_gaps_is_refused(device: str) -> None:
    p = torch.ones(6, 4, device=device).t().requires_grad_()
    p.grad = sparse_gradient(p, 0)
    with pytest.raises(RuntimeError, match="must be contiguous"):
        fusedopt.SGD([p]).step()
