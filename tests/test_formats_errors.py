"""Formats that cannot be followed are refused at the call that asks for them, by the argument's name."""

from typing import Any

import pytest
import torch
from format_cases import STATES, give, parameters, params_of
from table import RULES

import fusedopt
from fusedopt.formats import NAMES
from fusedopt.rule import Slot

ROUNDED = [name for name in STATES if name not in ("float32", "bfloat16", "float16")]


def make(rule: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    return getattr(fusedopt, rule)([torch.nn.Parameter(torch.ones(64, 64, dtype=dtype))], **options)


VALUE: dict[str, tuple[str, dict[str, Any], str]] = {
    "unknown": ("AdamW", dict(state_dtype="int7"), "state_dtype must be one of .* got 'int7'"),
    "dtype": ("AdamW", dict(state_dtype=torch.int32), "state_dtype must be one of .* got torch.int32"),
    "list": ("AdamW", dict(state_dtype=["int8"]), "state_dtype must be one of"),
    "unknown key": ("AdamW", dict(state_dtype={"exp_avgs": "int8"}), "adamw has no state 'exp_avgs'.*exp_avg, exp_avg"),
    "unknown in dict": ("AdamW", dict(state_dtype={"exp_avg": "int2"}), "got 'int2'"),
    "scalar": ("NAdam", dict(state_dtype={"mu_product": "int8"}), "nadam has no state 'mu_product'"),
    "uint8 for all": ("AdamW", dict(state_dtype="uint8"), "state_dtype='uint8' is for nonnegative state alone"),
    "uint8 signed": ("AdamW", dict(state_dtype={"exp_avg": "uint8"}), "'exp_avg' of adamw is signed state"),
    "weight": ("ASGD", dict(state_dtype={"ax": "int8"}), "'ax' of asgd is weight state"),
    "factored": ("Adafactor", dict(state_dtype="int8"), "not supported by adafactor"),
    "factored slot": ("Adafactor", dict(state_dtype={"row_var": "float8"}), "'row_var' of adafactor"),
    "factored rounding": ("Adafactor", dict(state_rounding="stochastic"), "state_rounding='stochastic' is not support"),
    "rounding": ("AdamW", dict(state_rounding="up"), "state_rounding must be 'nearest' or 'stochastic', got 'up'"),
    "master": ("AdamW", dict(master_weights="split32"), "master_weights must be None or one of .* got 'split32'"),
    "master list": ("AdamW", dict(master_weights=["kahan"]), "master_weights must be None or one of"),
    "no master": ("AdamW", dict(master_rounding="nearest"), "master_rounding='nearest' does nothing without"),
    "not split8": ("AdamW", dict(master_weights="kahan", master_rounding="nearest"), "for master_weights='split8' al"),
    "how": ("AdamW", dict(master_weights="split8", master_rounding="up"), "master_rounding must be"),
}


@pytest.mark.parametrize("case", VALUE)
def test_values(case: str) -> None:
    rule, options, message = VALUE[case]
    with pytest.raises(ValueError, match=message):
        make(rule, **options)
    optimizer = make(rule)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], **options})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("seed", [1.0, True, "0", None])
def test_seeds(seed: Any) -> None:
    with pytest.raises(TypeError, match="seed must be an int"):
        make("AdamW", seed=seed)


@pytest.mark.parametrize("name", ["split16", "split8"])
def test_splits_of_fp16_are_refused_with_the_group(name: str) -> None:
    """Whatever torch takes as parameters; beside fp32 ones, which the option leaves alone."""
    low, wide = (torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float16, torch.float32))
    message = f"master_weights='{name}' needs bfloat16 parameters, got torch\\.float16"
    for params in ([low], [wide, low], iter([low]), [("a", low)], [{"params": low}], [{"params": iter([low])}]):
        with pytest.raises(ValueError, match=message):
            fusedopt.AdamW(params, master_weights=name)  # pyright: ignore[reportArgumentType] # one of these
    optimizer = fusedopt.AdamW([wide])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": iter([low]), "master_weights": name})
    assert len(optimizer.param_groups) == 1
    other = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": iter([other]), "master_weights": name})
    assert optimizer.param_groups[1]["params"] == [other]


@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_parameter_cast_to_fp16_is_refused_before_anything_changes(backend: str, device: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16, device=device))
    optimizer = fusedopt.AdamW([p], master_weights="split16", backend=backend)  # pyright: ignore[reportArgumentType] # one of the backends
    p.data = p.detach().half()
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"needs bfloat16 parameters, got torch\.float16"):
        optimizer.step()
    assert not optimizer.state.get(p) and torch.equal(p, torch.ones_like(p))


@pytest.mark.parametrize("state", [*ROUNDED, "bfloat16", {"square_avg": "int8"}, {"grad_avg": "bfloat16"}], ids=str)
def test_differences_of_rounded_averages_are_refused(state: Any) -> None:
    """Their root would be NaN: of a constant gradient the variance is 0, and less once rounded."""
    with pytest.raises(ValueError, match="rmsprop with centered takes differences of its averages"):
        make("RMSprop", centered=True, state_dtype=state)
    make("RMSprop", centered=True, state_dtype="float32")
    make("RMSprop", state_dtype="float32" if isinstance(state, dict) and "grad_avg" in state else state)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("rule", ["ASGD", "AdamWScheduleFree", "SGDScheduleFree"])
def test_weight_slots_stay_fp32(rule: str, backend: str, device: str) -> None:
    optimizer = getattr(fusedopt, rule)(
        parameters(device, torch.bfloat16, [(64, 64)]), state_dtype="int8", master_weights="split8", backend=backend
    )
    give(0, params_of(optimizer), all_of=True)
    optimizer.step()
    (state,) = optimizer.state.values()
    weights = [slot.name for slot in optimizer.rule.state if slot.kind == "weight"]
    assert weights and all(state[name].dtype == torch.float32 for name in weights)


@pytest.mark.parametrize("row", RULES, ids=str)
def test_every_name_is_taken_or_refused_at_the_call(row: Any) -> None:
    for name in NAMES:
        for value in (name, *({slot.name: name} for slot in row.cls.rule.state)):
            try:
                row.cls([torch.nn.Parameter(torch.ones(64, 64))], **row.options, state_dtype=value)
            except ValueError as error:
                assert "state_dtype" in str(error)
                assert name not in ("float32", "int8") or row.options.get("centered") or not isinstance(value, str)


def test_names_of_the_engines_own_state_are_taken() -> None:
    for name in ("master_param", "param_residual", "ema"):
        with pytest.raises(ValueError, match="the engine keeps something else under this name"):
            Slot(name, "signed")
