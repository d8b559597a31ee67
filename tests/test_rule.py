"""The contract of rules: what a row holds, how state begins."""

from dataclasses import replace

import pytest
import torch

import fusedopt
from fusedopt.rules.adam import RULE


@pytest.mark.parametrize(
    ("init", "value"), [("zeros", 0.0), ("param", 3.0), ("eps", 0.25), ("betas.1", 0.5)], ids=lambda v: str(v)
)
def test_slots_begin_as_declared(init: str, value: float) -> None:
    class Variant(fusedopt.Adam):
        rule = replace(RULE, state=(fusedopt.Slot("exp_avg", "signed", init=init), *RULE.state[1:]))

    p = torch.nn.Parameter(torch.full((2, 3), 3.0))
    optimizer = Variant([p], eps=0.25, betas=(0.0, 0.5))
    optimizer.materialize_state()
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.full((2, 3), value))
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], torch.zeros(2, 3))


def test_scalar_slots_begin_as_declared_and_come_last() -> None:
    class Variant(fusedopt.Adam):
        rule = replace(
            RULE, state=(*RULE.state, fusedopt.Slot("a", "scalar", 1.5), fusedopt.Slot("b", "scalar", "eps"))
        )

    p = torch.nn.Parameter(torch.zeros(2, 3))
    optimizer = Variant([p], eps=0.25)
    optimizer.materialize_state()
    assert (optimizer.state[p]["a"].item(), optimizer.state[p]["b"].item()) == (1.5, 0.25)
    assert optimizer.state[p]["a"].dtype == torch.float32 and optimizer.state[p]["a"].shape == ()
    with pytest.raises(ValueError, match="scalar slots come after"):
        replace(RULE, state=(fusedopt.Slot("a", "scalar"), *RULE.state))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(state=RULE.state * 3), "9 state slots.* holds 8"),
        (dict(hyper=("eps",) * 17), "17 hyper-parameters.* holds 16"),
        (dict(n_scalars=21), "21 scalars.* holds 20"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_rule_that_would_overflow_a_row_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RULE, **change)  # pyright: ignore[reportArgumentType]  # values of several types
