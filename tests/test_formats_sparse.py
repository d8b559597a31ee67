"""Sparse gradients with formats: touched rows as under dense gradients, all others with every code and scale."""

from typing import Any

import pytest
import torch
from format_cases import FORMATS, assert_same, each_backend, parameters, params_of, same, snapshot, tensors_of
from test_sparse import sparse_gradient

import fusedopt

SHAPES = ((64, 64), (70, 100), (90, 5, 16), (40,))
each_format = pytest.mark.parametrize("name", FORMATS)


def give_sparse(step: int, dims: int, *optimizers: Any) -> None:
    for optimizer in optimizers:
        for i, p in enumerate(params_of(optimizer)):
            sparse_dims = dims if p.dim() > 2 else 1
            p.grad = sparse_gradient(p, 100 * step + i, sparse_dims, empty=(step + i) % 5 == 4)


@each_format
@pytest.mark.parametrize("rule", ["AdamW", "SparseAdam"])
def test_kernels_equal_twins(rule: str, name: str, device: str) -> None:
    lazy: Any = {"sparse": "lazy"} if rule == "AdamW" else {}
    pair = [
        getattr(fusedopt, rule)(
            parameters(device, torch.bfloat16, SHAPES), lr=0.1, **FORMATS[name], **lazy, backend=backend
        )
        for backend in ("eager", "triton")
    ]
    for step in range(2):
        give_sparse(step, 1, *pair)
        for optimizer in pair:
            optimizer.step()
        assert_same(*pair)


@pytest.mark.filterwarnings("ignore:sgd with momentum moves every row")
@pytest.mark.parametrize("options", [{}, dict(momentum=0.9, state_dtype="int8")], ids=str)
def test_stochastic_weights_without_and_with_momentum(options: dict[str, Any], device: str) -> None:
    pair = [
        fusedopt.SGD(
            parameters(device, torch.bfloat16, SHAPES), lr=0.1, master_weights="stochastic", **options, backend=backend
        )
        for backend in ("eager", "triton")
    ]
    for step in range(2):
        give_sparse(step, 1 if options else 2, *pair)
        for optimizer in pair:
            optimizer.step()
        assert_same(*pair)


@each_backend
@each_format
def test_touched_rows_are_those_of_a_dense_step_and_others_stay(name: str, backend: str, device: str) -> None:
    """Random numbers go by the index in the whole tensor, not by the place among touched rows."""
    make: Any = fusedopt.AdamW
    shapes = SHAPES[:2]
    lazy, dense = (
        make(parameters(device, torch.bfloat16, shapes), lr=0.1, **FORMATS[name], sparse=sparse, backend=backend)
        for sparse in ("lazy", "error")
    )
    start = [p.detach().clone() for p in params_of(lazy)]
    rows = torch.tensor([3, 17, 40, 63], device=device)
    for step in range(2):
        for i, (p, q) in enumerate(zip(params_of(lazy), params_of(dense), strict=True)):
            values = torch.randn((4, p.shape[1]), generator=torch.Generator().manual_seed(10 * step + i)).to(p)
            p.grad = torch.sparse_coo_tensor(rows[None], values, p.shape, check_invariants=True)
            q.grad = p.grad.to_dense()
        first = snapshot(lazy) if step else []
        lazy.step()
        dense.step()
    for i, (x, y) in enumerate(zip(tensors_of(lazy), tensors_of(dense), strict=True)):
        others = torch.ones(SHAPES[i][0], dtype=torch.bool, device=device)
        others[rows] = False
        for key, t in x.items():
            if t.dim():
                assert same(t[rows], y[key][rows]), key
                assert same(t[others], first[i][key][others]), key
        assert torch.equal(x["parameter"][others], start[i][others])


@each_backend
def test_parts_of_rows_are_refused_where_they_share_a_scale(backend: str, device: str) -> None:
    """Before anything changes, also when gradients become such in mid-run; other state takes them."""
    make: Any = fusedopt.SparseAdam
    optimizer = make(parameters(device, torch.float32, SHAPES), state_dtype="int8", backend=backend)
    give_sparse(0, 1, optimizer)
    optimizer.step()
    before = snapshot(optimizer)
    give_sparse(1, 2, optimizer)
    with pytest.raises(RuntimeError, match="2 sparse dimensions touches parts of rows"):
        optimizer.step()
    assert all(same(x[key], y[key]) for x, y in zip(tensors_of(optimizer), before, strict=True) for key in y)
    optimizer = make(parameters(device, torch.float32, SHAPES), state_dtype="bfloat16", backend=backend)
    give_sparse(1, 2, optimizer)
    optimizer.step()
