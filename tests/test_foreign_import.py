"""Runs that go on from what apex, Transformer Engine and bitsandbytes saved."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from compare import BACKENDS, assert_equal, give_gradients, params_of
from foreign_layouts import APEX, BNB, SHAPES, apex_state, bitsandbytes_state, coded, numbers, optimizer_of, saved

import fusedopt
from fusedopt import import_state_dict

WRAPPED = "__bnb_optimizer_quant_state__"
FORMS = ("fp32", "256", "2048", "whole")
KINDS = [(name, form) for name in BNB for form in FORMS if (name, form) != ("ademamix", "whole")]
"""AdEMAMix came without scales of whole tensors."""


def loaded_plain(ours: Any, state: dict[int, Any], **group: Any) -> None:
    """Load torch-shaped state and set hyper-parameters by hand."""
    ours.load_state_dict(copy.deepcopy({**ours.state_dict(), "state": state}))
    ours.param_groups[0].update({"lr": 0.01, "weight_decay": 0.1, **group})


def check_runs_on(theirs: dict[str, Any], ours: Any, plain: Any, source: str | None = None) -> None:
    """A run from the import equals one from plain state bit for bit; the file stays as it was and shares no memory."""
    before = copy.deepcopy(theirs)
    made = import_state_dict(theirs, ours, source)
    ours.load_state_dict(made)
    for step in range(2):
        give_gradients(step, params_of(ours), params_of(plain))
        ours.step()
        plain.step()
    assert_equal(ours, plain)
    mine, others = ({k: v for k, v in o.param_groups[0].items() if k != "params"} for o in (ours, plain))
    assert mine == others
    torch.testing.assert_close(theirs, before, rtol=0, atol=0)
    addresses = {t.untyped_storage().data_ptr() for entry in theirs["state"].values() for t in tensors(entry)}
    assert addresses.isdisjoint(t.untyped_storage().data_ptr() for e in made["state"].values() for t in tensors(e))


def tensors(entry: dict[str, Any]) -> list[torch.Tensor]:
    return [value for value in entry.values() if isinstance(value, torch.Tensor)]


# ------------------------------------------------------------------------------------------------------ bitsandbytes
@pytest.mark.parametrize("name, form", KINDS)
def test_bitsandbytes(name: str, form: str, device: str) -> None:
    group, extra, _ = BNB[name]
    theirs, plain_state = bitsandbytes_state(name, form)
    if name == "lamb":
        theirs[0]["unorm_vec"] = torch.ones(1)
    ours, plain = optimizer_of(name, device), optimizer_of(name, device)
    decoupled = dict(decoupled_weight_decay=True) if name == "adam" else {}
    ours_too = {k: v for k, v in group.items() if k in plain.param_groups[0]}
    loaded_plain(plain, plain_state, **{**ours_too, **extra, **decoupled})
    check_runs_on(saved(theirs, **group), ours, plain)


FORMATS = (
    (None, "eager"),
    ("float8", "eager"),
    ("int4", "eager"),
    ("bfloat16", "eager"),
    *(("int8", b) for b in BACKENDS),
)


@pytest.mark.parametrize("state_dtype, backend", FORMATS)
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_bitsandbytes_into_other_formats(name: str, state_dtype: str | None, backend: str, device: str) -> None:
    """And hidden from FSDP as newer versions do."""
    group, extra, _ = BNB[name]
    theirs, plain_state = bitsandbytes_state(name, "256")
    theirs = {i: {"step": entry.pop("step"), WRAPPED: entry} for i, entry in theirs.items()}
    ours, plain = (optimizer_of(name, device, state_dtype=state_dtype, backend=backend) for _ in range(2))
    loaded_plain(plain, plain_state, **{k: v for k, v in group.items() if k in plain.param_groups[0]}, **extra)
    check_runs_on(saved(theirs, **group), ours, plain, "bitsandbytes")


def test_bitsandbytes_scales_of_ademamix_on_cuda() -> None:
    """Its kernel finds scales of the slow average at (n + i) // 256, one place early where 256 does not divide n."""
    theirs, plain = bitsandbytes_state("ademamix", "256")
    ours = optimizer_of("ademamix", "cpu")
    scales, codes, n = theirs[0]["absmax1"].view(-1), theirs[0]["state1"][1].reshape(-1), math.prod(SHAPES[0])
    scales[-1] = 0.0  # never written
    spread = scales[n // 256 + torch.arange(n) // 256]
    slow = (theirs[0]["qmap1"][codes.long()] * spread).view(SHAPES[0])
    made = import_state_dict(saved(theirs, **BNB["ademamix"][0]), ours)["state"][0]
    torch.testing.assert_close(made["exp_avg_slow"], slow, rtol=0, atol=0)
    torch.testing.assert_close(made["exp_avg_fast"][:-1], plain[0]["exp_avg_fast"][:-1], rtol=0, atol=0)
    codes[n // 256 * 256 :] = 0  # what a block of zeros gives on a CPU, which counts from the row's start
    made = import_state_dict(saved(theirs, **BNB["ademamix"][0]), ours)["state"][0]
    torch.testing.assert_close(made["exp_avg_slow"][:-2], plain[0]["exp_avg_slow"][:-2], rtol=0, atol=0)


def test_bitsandbytes_state_is_read_in_memory_order() -> None:
    """As zeros_like(parameter) it may be channels_last, but the CUDA kernels index it as the contiguous parameter's."""
    shape, kept = (4, 8, 16, 16), coded((8192,), "256", 0, False, 1)
    codes = torch.empty(shape, dtype=torch.uint8).to(memory_format=torch.channels_last)
    codes.as_strided((8192,), (1,)).copy_(torch.from_numpy(kept[0]["state"]))
    entry = {f"{key}1": torch.from_numpy(x) for key, x in kept[0].items()} | {"state1": codes, "step": 1}
    ours = fusedopt.Lion([torch.nn.Parameter(torch.zeros(shape).to(memory_format=torch.channels_last))])
    theirs = {"state": {0: entry}, "param_groups": [{"lr": 1.0, "betas": (0.9, 0.99), "params": [0]}]}
    made = import_state_dict(theirs, ours)["state"][0]["exp_avg"]
    torch.testing.assert_close(made, torch.from_numpy(kept[1][0]).view(shape), rtol=0, atol=0)


# ------------------------------------------------------------------------------------- apex and Transformer Engine
@pytest.mark.parametrize("name, backend", [*((name, "eager") for name in APEX), ("adamw", "triton")])
def test_apex(name: str, backend: str, device: str) -> None:
    theirs, plain_state, group = apex_state(name)
    ours, plain = (optimizer_of(name, device, backend=backend) for _ in range(2))
    same = {k: v for k, v in group.items() if k in plain.param_groups[0]}
    loaded_plain(plain, plain_state, **same, **{k: v for k, v in APEX[name][1].items() if k not in same})
    check_runs_on(saved(theirs, **group), ours, plain)


def test_apex_numbers_on_the_device_and_fp16_state() -> None:
    """capturable=True keeps lr and step in tensors; FusedSGD, FusedLAMB and FusedAdagrad keep fp16 state of fp16."""
    theirs, _, group = apex_state("lamb")
    group |= dict(step=torch.tensor([7], dtype=torch.int32), lr=torch.tensor(0.01))
    theirs[0]["exp_avg"] = theirs[0]["exp_avg"].half()
    ours = optimizer_of("lamb", "cpu")
    made = import_state_dict(saved(theirs, **group), ours)
    assert type(made["param_groups"][0]["lr"]) is float and made["param_groups"][0]["lr"] == torch.tensor(0.01).item()
    assert made["state"][0]["step"].shape == () and made["state"][0]["step"] == 7
    torch.testing.assert_close(made["state"][0]["exp_avg"], theirs[0]["exp_avg"].float(), rtol=0, atol=0)
    ours.param_groups[0]["lr"] = live = torch.tensor([0.5], dtype=torch.float64)
    lr = import_state_dict(saved(theirs, **group), ours)["param_groups"][0]["lr"]
    assert lr.dtype == torch.float64 and lr.shape == (1,) and lr is not live


def test_apex_novograd(device: str) -> None:
    """It keeps norms where squares are kept here, by dtype, in the order of the parameters that have state."""
    options = dict(grad_averaging=True, weight_decay=0.1)
    group = dict(betas=(0.8, 0.9), eps=1e-4, step=3, bias_correction=False, norm_type=2, init_zero=False)
    state = {i: {"exp_avg": torch.from_numpy(numbers(shape, i))} for i, shape in enumerate(SHAPES)}
    state[1]["exp_avg"] = state[1]["exp_avg"].half()
    norms = [torch.tensor([0.3]), torch.tensor([1.7])]
    plain_state = {i: {"step": torch.tensor(3.0), "exp_avg": state[i]["exp_avg"].float(),
                       "exp_avg_sq": norms[1 - i][0].double() ** 2} for i in range(2)}  # fmt: skip
    ours, plain = (optimizer_of("novograd", device, **options) for _ in range(2))
    loaded_plain(plain, plain_state, betas=(0.8, 0.9), eps=1e-4)
    theirs = saved(state, **group, grad_averaging=1, exp_avg_sq=norms)
    with pytest.warns(UserWarning, match="reg_inside_moment"):
        check_runs_on(theirs, ours, plain)
    for change, message in (
        (dict(bias_correction=True), "bias_correction=False"), (dict(norm_type=0), "norm_type=2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            import_state_dict(saved(state, **{**group, **change}, exp_avg_sq=norms), ours)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"1 fp16 and 1 fp32 parameters, got \[1, 2\]"):
        import_state_dict(saved(state, **group, exp_avg_sq=[norms[0], torch.ones(2)]), ours)


WEIGHTS = (*((name, "eager") for name in ("float32", "split8", "kahan", None)), *(("split16", b) for b in BACKENDS))


@pytest.mark.parametrize("weights, backend", WEIGHTS)
@pytest.mark.parametrize("remainders", [False, True])
def test_transformer_engine_masters(remainders: bool, weights: str | None, backend: str, device: str) -> None:
    """fp32 copies or int16 remainders become the live optimizer's format; a master is that of plain fp32 state."""
    theirs, plain_state, group = apex_state("adamw")
    start = optimizer_of("adamw", "cpu", torch.bfloat16)
    chosen = dict(master_weights=weights, backend=backend, seed=3)
    ours, plain = (optimizer_of("adamw", device, torch.bfloat16, **chosen) for _ in range(2))
    for i, p in enumerate(params_of(start)):
        bits = p.detach().float().view(torch.int32) + torch.from_numpy(
            np.random.default_rng(i).integers(-0x8000, 0x8000, p.shape).astype(np.int32)
        )
        bits.view(-1)[:2] += torch.tensor([0x8000, -0x8000]) - (bits.view(-1)[:2] & 0xFFFF)  # ties
        low = ((bits & 0xFFFF) ^ 0x8000) - 0x8000
        master = bits.view(torch.float32)
        up = ((bits - low) >> 16).to(torch.int16).view(torch.bfloat16)  # beside remainders ties are rounded up
        weight = up if remainders else master.bfloat16()
        with torch.no_grad():
            params_of(ours)[i].copy_(weight)
            params_of(plain)[i].copy_(weight if weights is None else master.bfloat16())
        theirs[i]["master_param"] = low.to(torch.int16) if remainders else master
        plain_state[i]["master_param"] = master
    loaded_plain(plain, plain_state, betas=(0.8, 0.9), eps=1e-4)
    check_runs_on(saved(theirs, **group), ours, plain)


def test_transformer_engine_masters_of_fp32_are_left_out(device: str) -> None:
    """It makes them and never updates them."""
    theirs, plain_state, group = apex_state("adamw")
    ours, plain = (optimizer_of("adamw", device, master_weights="float32") for _ in range(2))
    theirs[0]["master_param"] = torch.zeros(SHAPES[0])
    theirs[1]["exp_avg"] = theirs[1]["exp_avg"].clone()
    theirs[1]["master_param"] = None
    loaded_plain(plain, plain_state, betas=(0.8, 0.9), eps=1e-4)
    ours.load_state_dict(import_state_dict(saved(theirs, **group), ours))
    assert all("master_param" not in entry for entry in ours.state_dict()["state"].values())
    assert_equal(ours, plain)


# ------------------------------------------------------------------------------------------------- groups and errors
def test_groups_keep_what_the_file_does_not_say(device: str) -> None:
    """Options and keys of ours stay, a scheduler's come from the file, several groups keep their own numbers."""
    params = [torch.nn.Parameter(torch.ones(3, device=device)) for _ in range(3)]
    named = [("a", params[0]), ("b", params[1])]
    ours = fusedopt.AdamW(
        [{"params": named, "maximize": True}, {"params": [("c", params[2])]}], decay_mode="independent"
    )
    entry = {"exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    group = dict(lr=0.1, betas=[0.5, 0.6], eps=1e-3, weight_decay=0.2, bias_correction=1, step=4, initial_lr=0.3)
    theirs = {"state": {5: entry}, "param_groups": [{**group, "params": [5, 6]}, {**group, "lr": 0.7, "params": [7]}]}
    made = import_state_dict(theirs, ours)
    assert made["state"].keys() == {5}
    ours.load_state_dict(made)
    first, second = ours.param_groups
    expected = dict(lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.2, initial_lr=0.3, maximize=True)
    assert expected.items() <= first.items() and second["lr"] == 0.7 and second["maximize"] is False
    assert first["param_names"] == ["a", "b"] and first["fusedopt"]["decay_mode"] == "independent"
    assert first["fusedopt"]["lr_initial"] == 0.3
    assert "step" not in first and "bias_correction" not in first
    bad = {**theirs, "state": {7: {**entry, "exp_avg": torch.ones(2)}}}
    with pytest.raises(
        ValueError, match=r"exp_avg of parameter c is of shape \(2,\) .* floating point of shape \(3,\)"
    ):
        import_state_dict(bad, ours)


def test_lamb_s_clip_is_announced() -> None:
    theirs, _, group = apex_state("lamb")
    with pytest.warns(UserWarning, match="clipped to a global norm of 1 "):
        import_state_dict(saved(theirs, **group, max_grad_norm=1.0), optimizer_of("lamb", "cpu"))
    import_state_dict(saved(theirs, **group, max_grad_norm=1.0), optimizer_of("lamb", "cpu", clip_grad_norm=1.0))
