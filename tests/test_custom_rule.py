"""A rule of the user's own: the tutorial as it stands, every feature around the rule, and what is refused."""

import copy
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from compare import BACKENDS, assert_equal, parameters, params_of, train

import fusedopt
from fusedopt.rules import adamw
from fusedopt_kernels import launch
from fusedopt_kernels.numerics import one_minus_power, sign

TUTORIAL = Path(fusedopt.__file__).parent / "docs" / "your_own_rule.md"


@triton.jit
def scalars(hyper, t, state):
    lr, _, beta = hyper
    total = state[0] + lr
    warm = tl.where(t > 2.0, 1.0, 0.5)
    return (lr * warm / one_minus_power(1.0 - beta, t), beta, 1.0 - beta), (total,)


@triton.jit
def update(g, p, state, s, VARIANT: tl.constexpr, EXACT: tl.constexpr):
    m = s[1] * state[0] + s[2] * g
    return s[0] * sign(m), (m,)


def reference(g: Any, p: Any, state: Any, s: Any, VARIANT: Any) -> Any:
    m = s[1] * state[0] + s[2] * g
    return s[0] * m.sign(), (m,)


SLOTS = [fusedopt.Slot("exp_avg", "signed"), fusedopt.Slot("total", "scalar")]
RULE = fusedopt.make_rule("mine", scalars, update, reference, hyper={"beta": 0.75}, state=SLOTS)


def test_the_tutorial_runs(tmp_path: Path) -> None:
    """Its blocks as one module, so that Triton finds the sources."""
    blocks = re.findall(r"```python\n(.*?)```", TUTORIAL.read_text(), re.DOTALL)
    assert len(blocks) >= 6
    path = tmp_path / "tutorial.py"
    path.write_text("\n\n".join(blocks))
    import importlib.util
    import sys

    spec = importlib.util.spec_from_file_location("tutorial", path)
    assert spec and spec.loader
    module = sys.modules["tutorial"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.last < 0.5 * module.first
    assert set(module.optimizer.state[module.model.weight]) == {"step", "exp_avg"}
    assert module.again.param_groups[0]["beta"] == 0.95
    both = [fusedopt.Optimizer(parameters("cpu"), module.signum, backend=b) for b in BACKENDS]
    train(range(3), *both)
    assert_equal(*both)


@pytest.mark.parametrize("options", [{}, {"cautious": True}, {"maximize": True, "weight_decay": 0.1}], ids=str)
def test_kernels_equal_the_reference(options: dict[str, Any], device: str) -> None:
    both = [fusedopt.Optimizer(parameters(device), RULE, lr=0.1, backend=b, **options) for b in BACKENDS]
    for optimizer in both:
        p = params_of(optimizer)[0]
        optimizer.set_update_mask(p, torch.ones_like(p, dtype=torch.bool))
    train(range(4), *both)
    assert_equal(*both)
    assert abs(both[0].state[params_of(both[0])[0]]["total"].item() - 0.4) < 1e-6


def test_one_update_launch_for_any_number_of_tensors(device: str) -> None:
    for count in (1, 50):
        optimizer = fusedopt.Optimizer(parameters(device, *[(3,)] * count), RULE, backend="triton")
        optimizer._launcher = recorder = launch.Recorder()
        train([0], optimizer)
        assert len(recorder.record) == 2


def test_state_dict_deepcopy_pickle_and_warmup(device: str) -> None:
    first = fusedopt.Optimizer(parameters(device), RULE, lr=0.1, beta=0.5)
    train(range(2), first)
    copies = [copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    fresh = fusedopt.Optimizer([p.detach().clone().requires_grad_() for p in params_of(first)], RULE, lr=0.2)
    fresh.load_state_dict(copy.deepcopy(first.state_dict()))
    assert fresh.warmup()[0] >= 0 and fresh.param_groups[0]["beta"] == 0.5
    train(range(2, 4), first, *copies, fresh)
    for other in (*copies, fresh):
        assert other.rule is RULE
        assert_equal(first, other)


def test_a_rule_of_the_library_runs_too(device: str) -> None:
    theirs = fusedopt.AdamW(parameters(device), lr=0.1)
    options: dict[str, Any] = dict(betas=(0.9, 0.999), eps=1e-8, amsgrad=False)
    ours = fusedopt.Optimizer(parameters(device), adamw.RULE, lr=0.1, weight_decay=0.01, **options)
    train(range(3), ours, theirs)
    assert_equal(ours, theirs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fusedopt.make_rule("x", reference, update, reference), "scalars must be decorated"),
        (lambda: fusedopt.make_rule("x", scalars, reference, reference), "update must be decorated"),
        (lambda: fusedopt.make_rule("x", scalars, update, update), "reference must be a plain"),
        (lambda: fusedopt.Optimizer([torch.ones(1)], "adamw"), "rule must be a fusedopt.Rule"),  # pyright: ignore[reportArgumentType] # that is the test
        (lambda: fusedopt.Optimizer([torch.ones(1)], adamw.RULE), "needs amsgrad, betas, eps"),
        (lambda: fusedopt.Optimizer([torch.ones(1)], RULE, gamma=1.0), "unexpected keyword argument 'gamma'"),
    ],
    ids=["scalars", "update", "reference", "rule", "missing", "unknown"],
)  # fmt: skip
def test_what_is_no_rule_is_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


def test_a_rule_without_a_name_cannot_be_pickled() -> None:
    nameless = replace(RULE)
    with pytest.raises(pickle.PicklingError, match="keep it in one"):
        pickle.dumps(fusedopt.Optimizer(parameters("cpu"), nameless))
