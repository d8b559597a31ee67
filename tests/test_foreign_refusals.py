"""State dicts of other libraries that cannot be imported: each is refused with what is wrong."""

from typing import Any

import pytest
import torch
from compare import params_of
from foreign_layouts import BNB, SHAPES, apex_state, bitsandbytes_state, optimizer_of, saved

from fusedopt import import_state_dict


def test_layouts_that_cannot_be_told() -> None:
    ours = optimizer_of("adamw", "cpu")
    theirs, plain, group = apex_state("adamw")
    for state_dict, message in (
        (saved(plain, betas=(0.9, 0.99)), "torch.optim's and fusedopt's own need no import"),
        (ours.state_dict(), "torch.optim's and fusedopt's own need no import"),
        (saved({0: {"momentum": torch.ones(1)}}), r"its state \['momentum'\]; there is neither 'step' in the groups"),
        (saved({0: theirs[0] | {"state1": torch.ones(1)}}, **group), "cannot tell what saved this state_dict"),
        (saved({0: theirs[0] | {"master_param": torch.ones(1), "state1": torch.ones(1)}}), "cannot tell"),
    ):
        with pytest.raises(ValueError, match=message):
            import_state_dict(state_dict, ours)
    with pytest.raises(ValueError, match=r"source must be None or one of apex, .*, got 'x'"):
        import_state_dict(saved(theirs, **group), ours, "x")
    with pytest.raises(TypeError, match="state_dict must be what another optimizer's"):
        import_state_dict({"model": {}}, ours)
    with pytest.raises(TypeError, match="optimizer must be one of fusedopt's, got AdamW"):
        import_state_dict(saved(theirs, **group), torch.optim.AdamW(params_of(ours)))


BAD_APEX = (
    ("adamw", dict(bias_correction=False), {}, r"param_groups\[0\] has bias_correction=False"),
    ("lamb", dict(grad_averaging=False), {}, "grad_averaging=False: its exp_avg is a sum"),
    ("adamw", dict(params=[0]), {}, r"groups of \[1\] parameters, the optimizer has \[2\]"),
    ("adamw", dict(step=None), {}, "parameter 0.0 has state, but its group has no 'step'"),
    ("adamw", {}, dict(exp_avg_sq=None), "state of parameter 0.0 has no 'exp_avg_sq'"),
    ("adamw", {}, dict(exp_avg_sq=-torch.ones(SHAPES[0])), "exp_avg_sq of parameter 0.0 is negative somewhere"),
    ("adamw", {}, dict(exp_avg=torch.ones(SHAPES[0]).byte()), "exp_avg of parameter 0.0 .* torch.uint8; expected"),
    ("adamw", {}, dict(more=torch.ones(1)), r"parameter 0.0 has \['more'\], which apex does not keep"),
)


@pytest.mark.parametrize("name, change, entry, message", BAD_APEX, ids=lambda x: x if isinstance(x, str) else "")
def test_apex_state_that_does_not_fit(name: str, change: Any, entry: Any, message: str) -> None:
    theirs, _, group = apex_state(name)
    theirs[0] |= entry
    state_dict = saved(theirs, **group)
    state_dict["param_groups"][0] |= change
    with pytest.raises(ValueError, match=message):
        import_state_dict(state_dict, optimizer_of(name, "cpu"), "apex")


def test_apex_adagrad_counts_no_steps() -> None:
    theirs, _, group = apex_state("adagrad")
    with pytest.raises(ValueError, match="no step counts, which lr_decay needs"):
        import_state_dict(saved(theirs, **group), optimizer_of("adagrad", "cpu", lr_decay=0.1))
    with pytest.raises(ValueError, match="apex has no state for lion here; it can be imported into adam, adamw, lamb"):
        import_state_dict(saved(theirs, **group), optimizer_of("lion", "cpu"))


BAD_BITSANDBYTES = (
    ("adamw", dict(state1=torch.ones(3)), r"state1 of parameter 0.0 is of shape \(3,\)"),
    ("ademamix", dict(state1=torch.ones(SHAPES[0])), r"expected uint8 or float32 of shape \(2, 67, 70\)"),
    ("adamw", dict(qmap2=torch.ones(3)), "needs the 256 values of its codes in 'qmap2'"),
    ("adamw", dict(absmax1=torch.ones(5)), "has 5 scales; 1 times 4690 elements have 19 in blocks of 256 or 3 in"),
    ("adamw", dict(absmax1=None), "needs its scales in 'absmax1', or one in 'max1'"),
    ("adamw", dict(state2=None), r"keeps 'step', 'state1' and 'state2'"),
    (
        "rmsprop",
        dict(qmap1=-torch.ones(256)),
        "square_avg of parameter 0.0 is negative somewhere: not",
    ),
)


@pytest.mark.parametrize("name, entry, message", BAD_BITSANDBYTES)
def test_bitsandbytes_state_that_does_not_fit(name: str, entry: dict[str, Any], message: str) -> None:
    theirs, _ = bitsandbytes_state(name, "256")
    theirs[0] |= entry
    with pytest.raises(ValueError, match=message):
        import_state_dict(saved(theirs, **BNB[name][0]), optimizer_of(name, "cpu"))


@pytest.mark.parametrize(
    "file, into", [("adagrad", "sgd"), ("sgd", "adagrad"), ("ademamix", "adamw"), ("lion", "adamw")]
)
def test_bitsandbytes_state_of_another_class(file: str, into: str) -> None:
    theirs, _ = bitsandbytes_state(file, "256")
    with pytest.raises(ValueError, match=f"bitsandbytes('|) counterpart of {into}"):
        import_state_dict(saved(theirs, **BNB[file][0]), optimizer_of(into, "cpu"))
