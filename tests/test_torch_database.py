"""torch's own database of optimizer configurations, errors and schedulers, from its private testing package.

Every class that torch.optim and fusedopt both have takes part, a new one by itself.
"""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from compare import EACH, assert_close, give_gradients, make_sparse, parameters_of, params_of, reference, train

import fusedopt

NAMES = tuple(name for name in torch.optim.__all__ if name in fusedopt.__all__ and name != "Optimizer")
DTYPES = (torch.float32, torch.float64, torch.complex64)
EVERY_FOURTH = slice(None, None, 4)
"""What the interpreter runs of a class's configurations."""
pytestmark = [
    pytest.mark.needs("expecttest"),  # torch's package imports it
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # torch's own, in its Adagrad
]


def info_of(name: str) -> Any:
    """The database's entry of a class."""
    from torch.testing._internal.common_optimizers import optim_db

    return next(info for info in optim_db if info.name == name)


def configurations(name: str, device: str, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    """Keyword arguments of the database, also those for a GPU.

    Without `capturable` on the CPU, where torch refuses it, and under fp64 parameters, since torch would then compute
    factors in fp32. Tensors become fp64 under these, for the same reason.
    """

    def fit(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(fit, value))
        return value.double() if isinstance(value, torch.Tensor) and dtype == torch.float64 else value

    every = [given.kwargs for given in info_of(name).optim_inputs_func(device="cuda")]
    dropped = {"capturable"} if device == "cpu" or dtype == torch.float64 else set()
    return [{k: fit(v) for k, v in kwargs.items() if k not in dropped} for kwargs in every]


def makers(name: str, kwargs: dict[str, Any], backend: str = "eager") -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Constructors of our optimizer and torch's, each with tensors of its own, from parameters."""
    ours, theirs = getattr(fusedopt, name), partial(reference, getattr(torch.optim, name))
    return (
        lambda params: ours(params, **copy.deepcopy(kwargs), backend=backend),
        lambda params: theirs(params, **copy.deepcopy(kwargs)),
    )


def exchanged(source: Any, make: Callable[..., Any]) -> Any:
    """Another optimizer on copies of one's parameters, with its state from a file."""
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    optimizer = make([torch.nn.Parameter(p.detach().clone()) for p in params_of(source)])
    optimizer.load_state_dict(torch.load(file, weights_only=True))
    return optimizer


def run(name: str, kwargs: dict[str, Any], dtype: torch.dtype, backend: str, device: str) -> None:
    """Two steps each; then two more, also of two optimizers that took over each other's state."""
    makes = makers(name, kwargs, backend)
    ours, theirs = (make(parameters_of(getattr(torch.optim, name), device, dtype)) for make in makes)
    train((0, 1), ours, theirs)
    assert_close(ours, theirs, 2)
    ours_from_torch, torch_from_ours = exchanged(theirs, makes[0]), exchanged(ours, makes[1])
    train((2, 3), ours, theirs, ours_from_torch, torch_from_ours)
    assert_close(ours, theirs, 4)
    assert_close(ours_from_torch, theirs, 4)
    assert_close(ours, torch_from_ours, 4, loaded=True)


def test_the_database_is_seen() -> None:
    assert set(NAMES) >= {row.cls.__name__ for row in EACH}
    assert sum(len(configurations(name, "cuda")) for name in NAMES) > 100


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration(name: str, dtype: torch.dtype, device: str) -> None:
    if dtype.is_complex and not info_of(name).supports_complex:
        optimizer = torch.nn.Parameter(torch.ones(2, 3, dtype=dtype, device=device))
        optimizer.grad = torch.ones_like(optimizer)
        with pytest.raises((ValueError, RuntimeError), match="does not support complex parameters"):
            getattr(fusedopt, name)([optimizer]).step()
        return
    for kwargs in configurations(name, device, dtype):
        run(name, kwargs, dtype, "eager", device)


@pytest.mark.parametrize("name", NAMES)
def test_some_configurations_with_kernels(name: str, device: str) -> None:
    for kwargs in configurations(name, device)[EVERY_FOURTH]:
        run(name, kwargs, torch.float32, "triton", device)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_with_compiled_kernels(name: str, dtype: torch.dtype) -> None:
    if info_of(name).supports_complex or not dtype.is_complex:
        for kwargs in configurations(name, "cuda", dtype):
            run(name, kwargs, dtype, "triton", "cuda")


def errors(name: str, device: str) -> None:
    theirs, ours = getattr(torch.optim, name), getattr(fusedopt, name)
    for given in info_of(name).optim_error_inputs_func(device, torch.float32):
        bad, texts = given.optimizer_error_input, []
        for cls in (theirs, ours):
            params = [torch.ones(1, 1, device=device)] if bad.params is None else copy.copy(bad.params)
            with pytest.raises(given.error_type, match=given.error_regex) as caught:  # warnings are errors here
                cls(params, **bad.kwargs).step()
            texts.append(str(caught.value))
        assert texts[1].startswith(texts[0])


@pytest.mark.parametrize("name", NAMES)
def test_every_error(name: str) -> None:
    errors(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_every_error_on_a_gpu(name: str) -> None:
    errors(name, "cuda")


def scheduled(makes: Any, schedulers: Any, params: Any, sparse: bool = False) -> None:
    """Twelve steps, which reach what happens after the tenth; learning rates are the same after each."""
    both = [make(params()) for make in makes]
    plans = [[make(optimizer) for make in schedulers] for optimizer in both]
    for step in range(12):
        give_gradients(step, *map(params_of, both))
        for optimizer, plan in zip(both, plans, strict=True):
            if sparse:
                make_sparse(step, params_of(optimizer))
            optimizer.step()
            for scheduler in plan:
                plateau = isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([1.0] if plateau else []))
        assert both[0].param_groups[0]["lr"] == both[1].param_groups[0]["lr"]
    assert_close(*both, 12)


@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01, dtype=torch.float64)], ids=["float", "tensor"])
@pytest.mark.parametrize("name", NAMES)
def test_schedulers(name: str, lr: Any, device: str) -> None:
    info = info_of(name)
    params = partial(parameters_of, info.optim_cls, device, torch.float64)
    for schedulers in info.scheduler_inputs:
        scheduled(makers(name, {"lr": lr}), schedulers, params, info.only_supports_sparse_grads)


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "SparseAdam"])
def test_sparse_gradients(name: str, device: str) -> None:
    """With the options and schedulers that the database has for them."""
    info = info_of(name)
    assert info.supports_sparse or info.only_supports_sparse_grads
    kwargs, schedulers = info.metadata_for_sparse
    params = partial(parameters_of, torch.optim.SparseAdam, device, torch.float64)
    scheduled(makers(name, kwargs), schedulers, params, sparse=True)
