"""State in the layouts of apex, Transformer Engine and bitsandbytes, built with NumPy, beside the same in torch's."""

import math
from typing import Any

import numpy as np
import torch
from table import RuleRow

SHAPES = ((67, 70), (5,))
"""4690 elements, no multiple of 256, 2048 or 64, and some that every library keeps in fp32."""
NONNEGATIVE = {"exp_avg_sq", "square_avg", "sum"}
WRAPPED = "__bnb_optimizer_quant_state__"

BNB: dict[str, tuple[dict[str, Any], dict[str, Any], list[list[str]]]] = {
    "adam": (dict(betas=(0.8, 0.9), eps=1e-4), {}, [["exp_avg"], ["exp_avg_sq"]]),
    "adamw": (dict(betas=(0.8, 0.9), eps=1e-4), {}, [["exp_avg"], ["exp_avg_sq"]]),
    "lamb": (dict(betas=(0.8, 0.9), eps=1e-4), dict(bias_correction=True), [["exp_avg"], ["exp_avg_sq"]]),
    "ademamix": (
        dict(betas=(0.8, 0.9, 0.99), eps=1e-4, alpha=5.0, t_alpha=20, t_beta3=None),
        dict(alpha_warmup=20, beta3_warmup=None), [["exp_avg_fast", "exp_avg_slow"], ["exp_avg_sq"]],
    ),
    "sgd": (dict(betas=(0.8, 0.3), eps=0.0), dict(momentum=0.8), [["momentum_buffer"]]),
    "rmsprop": (dict(betas=(0.8, 0.3), eps=1e-4), dict(alpha=0.8, eps=1e-4), [["square_avg"]]),
    "adagrad": (dict(betas=(0.0, 0.0), eps=1e-4), dict(eps=1e-4), [["sum"]]),
    "lion": (dict(betas=(0.8, 0.9), eps=0.0), dict(betas=(0.8, 0.9)), [["exp_avg"]]),
}  # fmt: skip
"""By rule here: what bitsandbytes' group holds, what ours becomes beyond the same keys, what state1 and state2 are."""


def optimizer_of(name: str, device: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """One on the same parameters in every call, with hyper-parameters that no file here has."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(device, dtype)) for s in SHAPES]
    return RuleRow(name).cls(params, lr=0.5, **options)


def numbers(shape: tuple[int, ...], seed: int, nonnegative: bool = False) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return np.abs(x) if nonnegative else x


def coded(shape: tuple[int, ...], form: str, seed: int, nonnegative: bool, count: int) -> tuple[Any, list[np.ndarray]]:
    """(keys of bitsandbytes' 8-bit state without their number, what it stands for: table[code]·scale of its block)."""
    n, rng = math.prod(shape), np.random.default_rng(seed)
    block = n if form == "whole" else int(form)
    table = np.sort(rng.random(256) if nonnegative else rng.uniform(-1, 1, 256)).astype(np.float32)
    codes = rng.integers(0, 256, (count, n), dtype=np.uint8)
    scales = rng.uniform(1e-6, 3, (count, -(-n // block))).astype(np.float32)
    values = table[codes] * np.repeat(scales, block, axis=1)[:, :n]
    joined = {"state": codes.reshape(count, *shape), "max" if form == "whole" else "absmax": scales}
    kept = {key: x if count > 1 else x[0] for key, x in joined.items()} | {"qmap": table}
    return kept | ({"new_max": np.zeros(1, np.float32)} if form == "whole" else {}), list(values.reshape(count, *shape))


def bitsandbytes_state(name: str, form: str, step: int = 7) -> tuple[dict[int, Any], dict[int, Any]]:
    """(state as bitsandbytes keeps it, the same as torch would). form: fp32, or how many elements share a scale."""
    theirs: dict[int, Any] = {}
    plain: dict[int, Any] = {}
    for i, shape in enumerate(SHAPES):
        theirs[i], plain[i] = {"step": step}, {"step": torch.tensor(float(step))}
        for j, slots in enumerate(BNB[name][2], 1):
            seed, positive = 10 * i + j, slots[0] in NONNEGATIVE
            if form == "fp32" or i == 1:
                values = [numbers(shape, seed + 100 * k, positive) for k in range(len(slots))]
                kept: dict[str, Any] = {"state": np.stack(values) if len(slots) > 1 else values[0]}
            else:
                kept, values = coded(shape, form, seed, positive, len(slots))
            theirs[i] |= {f"{key}{j}": torch.from_numpy(x) for key, x in kept.items()}
            plain[i] |= {slot: torch.from_numpy(x) for slot, x in zip(slots, values, strict=True)}
        if name in ("sgd", "lion"):  # torch counts no steps there
            del plain[i]["step"]
    return theirs, plain


def saved(state: dict[int, Any], **group: Any) -> dict[str, Any]:
    """A state dict of one group; lr and weight_decay as no optimizer here has them."""
    return {"state": state, "param_groups": [{"lr": 0.01, "weight_decay": 0.1, **group, "params": [0, 1]}]}


APEX: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "adam": (dict(betas=(0.8, 0.9), eps=1e-4, bias_correction=True), {}, ["exp_avg", "exp_avg_sq"]),
    "adamw": (dict(betas=(0.8, 0.9), eps=1e-4, bias_correction=True), {}, ["exp_avg", "exp_avg_sq"]),
    "lamb": (
        dict(betas=(0.8, 0.9), eps=1e-4, bias_correction=False, grad_averaging=True),
        dict(bias_correction=False), ["exp_avg", "exp_avg_sq"],
    ),
    "sgd": (dict(momentum=0.8, dampening=0.0, nesterov=True), {}, ["momentum_buffer"]),
    "adagrad": (dict(eps=1e-4), {}, ["sum"]),
}  # fmt: skip
"""By rule here: what the group holds, what ours becomes beyond the same keys, the state."""


def apex_state(name: str, step: int = 7) -> tuple[dict[int, Any], dict[int, Any], dict[str, Any]]:
    """(state, the same as torch would keep it, what the group holds)."""
    group, _, slots = APEX[name]
    values = {i: {slot: torch.from_numpy(numbers(shape, 10 * i + j, slot in NONNEGATIVE))
                  for j, slot in enumerate(slots)} for i, shape in enumerate(SHAPES)}  # fmt: skip
    counted = name not in ("sgd", "adagrad")
    plain = {i: entry | ({"step": torch.tensor(float(step))} if counted else {}) for i, entry in values.items()}
    return values, plain, {**group, **({"step": step} if counted else {})}
