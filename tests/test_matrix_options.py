"""Options of ours under the rules of matrices: clipping and skipping reach every part of their steps."""

from typing import Any

import pytest
import torch
from compare import BACKENDS, assert_equal, contents, params_of, train, uniform

from fusedopt.rules.adafactor import Adafactor
from fusedopt.rules.muon import Muon

MAKERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "adafactor": (Adafactor, dict(lr=0.05, weight_decay=0.1)),
    "muon": (Muon, dict(lr=0.02, adamw=dict(lr=0.05))),
}
SHAPES = ((9, 8), (5, 6), (7,))


def make(name: str, device: str, **options: Any) -> Any:
    cls, given = MAKERS[name]
    params = [torch.nn.Parameter(t) for t in uniform(SHAPES, device, torch.float32, 3)]
    return cls(params, **given, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(clip_grad_norm=0.7), dict(clip_grad_norm=0.7, clip_scope="tensor"), dict(clip_grad_value=0.25),
        dict(skip_nonfinite=True), dict(decay_mode="independent"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", MAKERS)
def test_kernels_agree_with_twins(name: str, options: dict[str, Any], device: str) -> None:
    """Bit for bit; a norm over matrices and vectors is the same number in all parts."""
    if options.get("decay_mode") and name == "muon":
        options = {**options, "clip_grad_value": 0.5}
    eager, kernels = (make(name, device, backend=backend, **options) for backend in BACKENDS)
    train(range(2), eager, kernels)
    assert_equal(eager, kernels)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKERS)
def test_clipping_is_that_of_torch(name: str, backend: str, device: str) -> None:
    """As after torch.nn.utils.clip_grad_norm_ over all gradients, to the rounding of the coefficient."""
    ours, plain = make(name, device, backend=backend, clip_grad_norm=0.7), make(name, device, backend=backend)
    for step in range(2):
        for optimizer in (ours, plain):
            for i, p in enumerate(params_of(optimizer)):
                p.grad = uniform([tuple(p.shape)], device, p.dtype, 10 * step + i)[0]
        torch.nn.utils.clip_grad_norm_(params_of(plain), 0.7)
        ours.step()
        plain.step()
    bf16 = 2e-2 * 0.02 if name == "muon" else 0.0  # a direction may round the other way
    torch.testing.assert_close(params_of(ours), params_of(plain), rtol=1e-6, atol=1e-6 + bf16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MAKERS)
def test_a_skipped_step_changes_nothing(name: str, backend: str, device: str) -> None:
    """Whichever part the bad gradient lies in."""
    optimizer = make(name, device, backend=backend, skip_nonfinite=True)
    train([0], optimizer)
    for bad in range(len(SHAPES)):
        before = [(p.detach().clone(), {k: v.clone() for k, v in s.items()}) for p, s in contents(optimizer)]
        for i, p in enumerate(params_of(optimizer)):
            p.grad = torch.full_like(p, torch.inf if i == bad else 0.5)
        optimizer.step()
        torch.testing.assert_close(contents(optimizer), before, rtol=0, atol=0)
    train([1], optimizer)
    assert all(not torch.equal(p, was) for (p, _), (was, _) in zip(contents(optimizer), before, strict=True))


@pytest.mark.parametrize("name", MAKERS)
def test_what_they_cannot_follow_is_named(name: str, device: str) -> None:
    for options, word in ((dict(l1=0.1), "l1"), (dict(cautious=True), "cautious")):
        with pytest.raises(ValueError, match=word):
            train([0], make(name, device, backend="eager", **options))
