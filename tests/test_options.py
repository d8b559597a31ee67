"""Options of every optimizer: where they live, what is refused, and cautious steps against the paper in float64."""

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compare import BACKENDS, assert_equal, give_gradients, parameters, params_of, train
from table import RULES, RuleRow

import fusedopt

SHAPES = ((33, 7), (5,), (), (0,), (16400,))
CAUTIOUS = [row for row in RULES if row.cls.rule.cautious and not row.cls.rule.n_norms]


def agree(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sign(a) * np.sign(b) > 0


def cautious_adamw(history: list[np.ndarray], p: np.ndarray, decay: float, masks: tuple[bool, bool]) -> np.ndarray:
    """Liang et al. (2024), Algorithm 1; with masks[1] the decay of Chen et al. (2025), Algorithm 1. float64."""
    m = v = np.zeros_like(p)
    lr, b1, b2 = 0.01, 0.9, 0.999
    for t, g in enumerate(history, 1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        u = m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8)
        if masks[0]:
            mask = agree(u, g)
            u = u * mask * (p.size / (mask.sum() + 1))
        shrink = ~agree(u, -p) if masks[1] else True
        p = p - lr * (u + decay * p * shrink)
    return p


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masks", [(True, False), (False, True), (True, True)], ids=str)
def test_cautious_adamw_is_the_papers(masks: tuple[bool, bool], backend: str, device: str) -> None:
    params = parameters(device, *SHAPES, dtype=torch.float64)
    starts = [p.detach().cpu().numpy().copy() for p in params]
    optimizer = fusedopt.AdamW(
        params, lr=0.01, weight_decay=0.5, cautious=masks[0], cautious_decay=masks[1], backend=backend  # pyright: ignore[reportArgumentType] # one of BACKENDS
    )  # fmt: skip
    history: list[list[np.ndarray]] = [[] for _ in params]
    for step in range(6):
        give_gradients(step, params)
        for own, p in zip(history, params, strict=True):
            assert p.grad is not None
            own.append(p.grad.cpu().numpy().copy())
        optimizer.step()
    for start, own, p in zip(starts, history, params, strict=True):
        expected = cautious_adamw(own, start, 0.5, masks)
        np.testing.assert_allclose(p.detach().cpu().numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("row", CAUTIOUS, ids=str)
def test_cautious_kernels_equal_twins(row: RuleRow, device: str) -> None:
    decay = (
        {"cautious_decay": True}
        if row.cls(parameters(device)).rule.decoupled(row.cls([torch.ones(1)]).param_groups[0])
        else {}
    )
    ours = [row.cls(parameters(device, *SHAPES), **row.options, cautious=True, **decay, backend=b) for b in BACKENDS]
    train(range(4), *ours)
    assert_equal(*ours)
    plain = row.cls(parameters(device, *SHAPES), **row.options, backend="eager")
    train(range(4), plain)
    moved = [not torch.equal(p, q) for p, q in zip(params_of(ours[0]), params_of(plain), strict=True)]
    assert any(moved), "the mask changed nothing"


def test_a_cautious_step_takes_one_launch_more(device: str) -> None:
    from fusedopt_kernels import launch

    for options, count in (({}, 2), ({"cautious": True}, 3), ({"cautious_decay": True}, 2)):
        for tensors in (2, 40):
            optimizer = fusedopt.AdamW(parameters(device, *[(3,)] * tensors), backend="triton", **options)
            optimizer._launcher = recorder = launch.Recorder()
            train([0], optimizer)
            assert len(recorder.record) == count


def test_options_live_in_one_key_and_only_when_they_differ() -> None:
    a, b, c = parameters("cpu", (2,), (3,), (4,))
    plain = fusedopt.AdamW([a], cautious=False, sparse="error", backend="eager")
    assert list(plain.param_groups[0]) == list(torch.optim.AdamW([a]).param_groups[0])
    mixed = fusedopt.AdamW([{"params": [a], "cautious": False}, {"params": [b]}], cautious=True)
    mixed.add_param_group({"params": [c], "cautious_decay": True})
    keys = [group.get("fusedopt") for group in mixed.param_groups]
    assert keys == [None, {"version": 1, "cautious": True}, {"version": 1, "cautious": True, "cautious_decay": True}]
    other = fusedopt.AdamW([{"params": [p]} for p in parameters("cpu", (2,), (3,), (4,))])
    other.load_state_dict(mixed.state_dict())
    assert [group.get("fusedopt") for group in other.param_groups] == keys
    assert [group.get("fusedopt") for group in copy.deepcopy(mixed).param_groups] == keys


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda p: fusedopt.AdamW(p, cautios=True), TypeError, "unexpected keyword argument 'cautios'"),  # pyright: ignore[reportCallIssue] # wrong on purpose
        (lambda p: fusedopt.AdamW(p, cautious=1), ValueError, "cautious must be True or False"),  # pyright: ignore[reportArgumentType] # wrong on purpose, as above
        (lambda p: fusedopt.Adam(p, cautious_decay=True), ValueError, "needs decoupled weight decay"),
        (lambda p: fusedopt.SparseAdam(p, cautious=True), ValueError, "not defined for sparse_adam"),
        (lambda p: fusedopt.AdamW(p, sparse="rows"), ValueError, "sparse must be 'error' or 'lazy'"),  # pyright: ignore[reportArgumentType] # wrong on purpose, as above
        (lambda p: fusedopt.AdamW(p, backend="gpu"), ValueError, "backend must be"),  # pyright: ignore[reportArgumentType] # wrong on purpose, as above
    ],
    ids=["unknown", "type", "coupled", "only sparse", "sparse", "backend"],
)  # fmt: skip
def test_bad_options_are_refused_at_the_call(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(parameters("cpu"))


def test_a_refused_group_is_not_added() -> None:
    optimizer = fusedopt.Adam(parameters("cpu", (2,)))
    with pytest.raises(ValueError, match="cautious_decay"):
        optimizer.add_param_group({"params": parameters("cpu", (3,)), "cautious_decay": True})
    assert len(optimizer.param_groups) == 1


def test_the_page_on_options_runs() -> None:
    text = (Path(fusedopt.__file__).parent / "docs" / "options.md").read_text()
    names: dict[str, Any] = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)), names)
    assert names["touched"] == [3, 7]


def test_the_page_on_options_names_them_all() -> None:
    text = (Path(fusedopt.__file__).parent / "docs" / "options.md").read_text()
    assert all(f"| `{name}=" in text or f", `{name}=" in text for name in fusedopt.Options.__annotations__)
