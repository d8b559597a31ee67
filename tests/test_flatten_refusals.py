"""What flatten_ cannot move is refused by name, with a remedy, and nothing is changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flat_nets import one_storage
from torch import nn

import fusedopt
from fusedopt import buffers


def _tensor_like(p: Any) -> Any:
    p.to_local = lambda: p
    return p


def _marked(p: Any, name: str) -> Any:
    setattr(p, name, True)
    return p


def _inference() -> Any:
    with torch.inference_mode():
        return nn.Parameter(torch.ones(3))


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dtensor": (lambda: _tensor_like(nn.Parameter(torch.ones(3))), "a DTensor"),
    "fsdp": (lambda: _marked(nn.Parameter(torch.ones(3)), "_fsdp_flattened"), "FullyShardedDataParallel"),
    "flat": (lambda: _marked(nn.Parameter(torch.ones(3)), "_is_flat_param"), "FullyShardedDataParallel"),
    "lazy": (lambda: nn.LazyLinear(3).weight, "run one forward pass"),
    "meta": (lambda: nn.Parameter(torch.ones(3, device="meta")), "to_empty"),
    "sparse": (lambda: nn.Parameter(torch.eye(3).to_sparse()), "layout"),
    "inference": (_inference, "inference_mode"),
    "computed": (lambda: torch.ones(3, requires_grad=True) * 2, "computed from"),
    "expanded": (lambda: nn.Parameter(torch.ones(1).expand(3)), "expanded"),
    "gaps": (lambda: nn.Parameter(torch.ones(6)[::2]), "part of a larger tensor"),
    "part": (lambda: nn.Parameter(torch.ones(6)[3:]), "part of a larger tensor"),
    "shared": (lambda: nn.Parameter(torch.ones(3).share_memory_()), "share_memory_"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_move_is_refused_by_name_and_nothing_happens(kind: str) -> None:
    make, reason = REFUSED[kind]
    first = nn.Parameter(torch.ones(3))
    address = first.data_ptr()
    for grads in (False, True):
        with pytest.raises(ValueError, match=f"cannot flatten parameter 'block.bad': it is .*{reason}"):
            fusedopt.flatten_([("first", first), ("block.bad", make())], grads=grads)
        with pytest.raises(ValueError, match="cannot flatten parameter 1: "):
            fusedopt.flatten_([first, make()], grads=grads)
    assert first.data_ptr() == address and not first._post_accumulate_grad_hooks


@pytest.mark.parametrize("kind", ["expanded", "gaps", "part"])
def test_the_remedy_works(kind: str) -> None:
    p = REFUSED[kind][0]()
    fusedopt.unflatten_([p])
    fusedopt.flatten_([p])
    assert torch.equal(p, torch.ones(3)) and buffers.is_placed(p)


def test_partial_overlaps_are_refused_and_shared_memory_too() -> None:
    params = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    fusedopt.flatten_(params)
    inside = nn.Parameter(params[0].data[:2])
    for names in ([params[0], inside], [inside]):
        with pytest.raises(ValueError, match="part of a larger tensor"):
            fusedopt.flatten_(names)
    cast = nn.Parameter(torch.ones(4))
    with pytest.raises(ValueError, match=r"cannot flatten parameter 'b': it shares part .* parameter 'a'"):
        fusedopt.flatten_([("a", cast), ("b", nn.Parameter(cast.data.view(torch.int32), requires_grad=False))])
    nn.ParameterList(params).share_memory()
    for change in (fusedopt.flatten_, fusedopt.unflatten_):
        with pytest.raises(ValueError, match="parameter 0: it is in memory shared"):
            change(params)
    assert params[0].is_shared() and one_storage(params)


def test_an_error_in_the_middle_puts_everything_back() -> None:
    class Stubborn(nn.Parameter):
        def __setattr__(self, name: str, value: Any) -> None:
            raise MemoryError

    first = nn.Parameter(torch.ones(3))
    address = first.data_ptr()
    with pytest.raises(MemoryError):
        fusedopt.flatten_([first, Stubborn(torch.ones(3))], grads=True)
    assert first.data_ptr() == address and not first._post_accumulate_grad_hooks
