"""torch's own database of optimizer configurations and errors, which lies in its private testing package."""

from typing import Any

import pytest
import torch
from compare import assert_close, parameters, train

import fusedopt

CLASSES = ("SGD", "Adam", "AdamW")
pytestmark = pytest.mark.needs("expecttest")  # torch's package imports it


def info_of(name: str) -> Any:
    """The database's entry of a class."""
    from torch.testing._internal.common_optimizers import optim_db

    return next(info for info in optim_db if info.name == name)


@pytest.mark.parametrize("name", CLASSES)
def test_every_configuration_of_torchs_own_tests(name: str, device: str) -> None:
    """Also those for a GPU; on the CPU torch refuses `capturable`, so its own run goes without."""
    for given in info_of(name).optim_inputs_func(device="cuda"):
        kwargs = {k: v for k, v in given.kwargs.items() if k != "capturable"}
        ours = getattr(fusedopt, name)(parameters(device), **given.kwargs)
        theirs = getattr(torch.optim, name)(parameters(device), **kwargs, foreach=False)
        train(range(2), ours, theirs)
        assert_close(ours, theirs, 2)


@pytest.mark.parametrize("name", CLASSES)
def test_error_inputs_of_torchs_own_tests(name: str) -> None:
    func = info_of(name).optim_error_inputs_func
    assert func is not None
    for given in func("cpu", torch.float32):
        bad = given.optimizer_error_input
        params = [torch.ones(1)] if bad.params is None else bad.params
        with pytest.raises(given.error_type, match=given.error_regex):  # warnings are errors in these tests
            getattr(fusedopt, name)(params, **bad.kwargs)
