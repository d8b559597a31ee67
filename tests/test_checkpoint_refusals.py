"""Quantised state and masters that cannot be read: refused when they are loaded, and nothing is changed."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import assert_equal, train
from test_checkpoint import saved
from test_checkpoint_formats import ADAMW, RUNS, made, weights

import fusedopt

pytestmark = pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose

Change = Callable[[dict[str, Any]], Any]
BAD: dict[str, tuple[str, Change]] = {
    "no scales": (r"'exp_avg_q' \(\(48, 90\), torch.int8\) and no 'exp_avg_scale'", lambda s: s.pop("exp_avg_scale")),
    "no codes": ("no 'exp_avg_q' and 'exp_avg_scale'", lambda s: s.pop("exp_avg_q")),
    "codes of another dtype": (
        "torch.int16.*no format of signed state",
        lambda s: s.update(exp_avg_q=s["exp_avg_q"].short()),
    ),
    "codes of another shape": (r"'exp_avg_q' \(\(24, 90\)", lambda s: s.update(exp_avg_q=s["exp_avg_q"][:24])),
    "scales of another shape": (r"\(\(48, 1\)", lambda s: s.update(exp_avg_scale=s["exp_avg_scale"][:, :1])),
    "unsigned codes of a signed slot": ("'exp_avg_q'", lambda s: s.update(exp_avg_q=s["exp_avg_q"].to(torch.uint8))),
    "a slot unknown here": (
        "'mean_q' and 'mean_scale', but adamw keeps no quantised 'mean'",
        lambda s: s.update(mean_q=s["exp_avg_q"], mean_scale=s["exp_avg_scale"]),
    ),
    "an unknown residual": (
        "'param_residual' of dtype torch.int64 belongs to no weight format of torch.bfloat16",
        lambda s: s.update(param_residual=s["param_residual"].long()),
    ),
    "a residual of another shape": (
        r"'param_residual' of shape \(47, 90\)",
        lambda s: s.update(param_residual=s["param_residual"][1:]),
    ),
}


@pytest.mark.parametrize("target", [{}, RUNS["int8, split8"]], ids=["plain", "int8"])
@pytest.mark.parametrize("bad", BAD)
def test_what_cannot_be_read_is_refused_and_changes_nothing(bad: str, target: Any, device: str) -> None:
    source, ours = made(ADAMW, weights(device), **RUNS["int8, split8"]), made(ADAMW, weights(device), **target)
    train((0,), source, ours)
    file, before = saved(source), copy.deepcopy(ours)
    message, change = BAD[bad]
    change(file["state"][0])
    with pytest.raises(RuntimeError, match=message):
        ours.load_state_dict(file)
    assert_equal(ours, before)
    train((1,), ours, before)
    assert_equal(ours, before)


def test_quantised_state_of_another_class_is_refused(device: str) -> None:
    source = made(ADAMW, weights(device), state_dtype="int8")
    train((0,), source)
    for cls in (fusedopt.SGD, fusedopt.Adafactor):
        with pytest.raises(RuntimeError, match=r"keeps no quantised 'exp_avg"):
            cls(weights(device)).load_state_dict(saved(source))
    file = saved(source)
    for state in file["state"].values():  # z is a weight, which no option quantises
        state.update({key.replace("exp_avg_sq", "z"): state.pop(key) for key in [*state] if "exp_avg_sq" in key})
    with pytest.raises(RuntimeError, match=r"'z' .* no format of weight state"):
        fusedopt.AdamWScheduleFree(weights(device)).load_state_dict(file)
