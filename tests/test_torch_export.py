"""`to_torch_state_dict`: what the class of the same name in torch.optim loads and goes on from."""

import copy

import pytest
import torch
from compare import assert_equal, contents, parameters, params_of, reference, train
from table import RULES, RuleRow
from test_checkpoint_formats import ADAMW, ROWS, RUNS, bit_equal, made, slots, weights

import fusedopt
from fusedopt.encoded import values

pytestmark = pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose


@pytest.mark.parametrize("name", [None, *RUNS])
@pytest.mark.parametrize("row", [row for row in ROWS if row.in_torch], ids=str)
def test_torch_goes_on_from_an_export(row: RuleRow, name: str | None, device: str) -> None:
    """With torch's own keys; what it holds are the values here, in fp32, so that it steps as from plain state."""
    formats = {} if name is None else RUNS[name]
    ours = made(row, weights(device), **formats, ema_decay=0.9)
    ours.set_update_mask(params_of(ours)[1], torch.ones(5, dtype=torch.bool, device=device))
    train((0, 1), ours)
    before = copy.deepcopy(ours)
    exported = ours.to_torch_state_dict()
    assert_equal(ours, before)
    theirs = reference(row.torch_cls, weights(device, torch.float32), **row.options)
    train((0, 1), theirs)
    plain = theirs.state_dict()
    assert {**exported["param_groups"][0], "foreach": False} == plain["param_groups"][0]
    assert {k: set(s) for k, s in exported["state"].items()} == {k: set(s) for k, s in plain["state"].items()}
    for i, (p, state) in enumerate(contents(ours)):
        for slot in slots(row):
            x = values(state, slot, p.shape)
            assert x is not None and bit_equal(exported["state"][i][slot.name], x.float())
    masters = ours.master_state_dict()
    theirs = reference(row.torch_cls, [torch.nn.Parameter(x) for x in masters.values()], **row.options)
    theirs.load_state_dict(copy.deepcopy(exported))
    here = made(row, [torch.nn.Parameter(x.clone()) for x in masters.values()])
    here.load_state_dict(copy.deepcopy(exported))
    for p, q in zip(params_of(theirs), params_of(here), strict=True):
        p.grad = q.grad = torch.ones_like(p)
    theirs.step()
    here.step()
    for p, q in zip(params_of(theirs), params_of(here), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=8 * torch.finfo(torch.float32).eps)


def test_an_export_of_fp32_state_is_the_state(device: str) -> None:
    ours = made(ADAMW, weights(device, torch.float32))
    assert ours.to_torch_state_dict() == {**ours.state_dict(), "state": {}}
    params_of(ours)[1].requires_grad_(False)
    train((0,), ours)
    assert ours.to_torch_state_dict()["state"].keys() == {0, 1}
    for i, state in ours.state_dict()["state"].items():
        assert all(bit_equal(ours.to_torch_state_dict()["state"][i][key], value) for key, value in state.items())


def test_a_parameter_that_was_never_stepped_is_not_in_an_export(device: str) -> None:
    """torch would take a dict without averages for one that has them."""
    ours = made(ADAMW, weights(device), ema_decay=0.9, state_dtype="int8")
    params_of(ours)[0].grad = torch.ones_like(params_of(ours)[0])
    ours.step()
    assert "step" in ours.state[params_of(ours)[1]] and ours.to_torch_state_dict()["state"].keys() == {0}


def test_what_torch_has_no_class_for_is_not_exported(device: str) -> None:
    with pytest.raises(RuntimeError, match=r"torch.optim has no Lion; .* without state_dtype"):
        fusedopt.Lion(weights(device)).to_torch_state_dict()
    with pytest.raises(RuntimeError, match="no Optimizer"):
        fusedopt.Optimizer(
            weights(device), RULES[0].cls.rule, momentum=0.9, nesterov=False, dampening=0.0
        ).to_torch_state_dict()
    with pytest.raises(RuntimeError, match="groups of another rule"):
        fusedopt.Muon(parameters(device, (4, 4), (4,)), adamw={}).to_torch_state_dict()
