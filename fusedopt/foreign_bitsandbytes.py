"""State as bitsandbytes keeps it, read as plain fp32; `import_state_dict` in ``foreign.py`` calls this.

``state[p]`` holds ``step``, ``state1`` and for some classes ``state2``: fp32, or uint8 codes. A code's value is
``qmap[code]·absmax[block]`` (tables of 256 numbers in ``qmap1``, ``qmap2``), in blocks of 256 elements, 2048 before
0.44, in the order of a contiguous parameter; until 0.49 it may be ``qmap[code]·max`` for a whole tensor. AdEMAMix
stacks both its averages in ``state1``. From 0.49.2 on all but ``step`` stands in a dict of its own, hidden from FSDP.
State in another memory layout than contiguous is read in memory order, as the CUDA kernels index it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .layout import flat, is_dense
from .rule import Rule

Entry = tuple[Any, dict[str, Any], Tensor, str]
"""A parameter that has state: its key in the file, that state, the parameter here, its name."""

WRAPPED = "__bnb_optimizer_quant_state__"
"""Key of the dict that hides the other tensors."""

ADAM = (("exp_avg",), ("exp_avg_sq",))
SLOTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "adam": ADAM, "adamw": ADAM, "lamb": ADAM, "ademamix": (("exp_avg_fast", "exp_avg_slow"), ("exp_avg_sq",)),
    "sgd": (("momentum_buffer",),), "rmsprop": (("square_avg",),), "adagrad": (("sum",),), "lion": (("exp_avg",),),
}  # fmt: skip
"""What state1 and state2 are, by rule here. LARS is left out: its momentum is of gradients, ours of steps."""

BETAS = {"betas": "betas", "eps": "eps"}
HYPERS: dict[str, dict[str, str]] = {
    "adam": BETAS, "adamw": BETAS, "lamb": BETAS, "lion": {"betas": "betas"}, "sgd": {"momentum": "betas.0"},
    "rmsprop": {"alpha": "betas.0", "eps": "eps"}, "adagrad": {"eps": "eps"},
    "ademamix": {**BETAS, "alpha": "alpha", "alpha_warmup": "t_alpha", "beta3_warmup": "t_beta3"},
}  # fmt: skip
"""Group keys here and there. Dampening, Nesterov and RMSprop's momentum are accepted there and have no effect."""

BLOCKS = (256, 2048)
"""Elements that share a scale."""


def always(group: Mapping[str, Any], live: Mapping[str, Any]) -> dict[str, Any]:
    """Group keys whose value their update has fixed: Adam's weight decay is decoupled, LAMB corrects its bias."""
    fixed = {"bias_correction": True, **({"decoupled_weight_decay": True} if group["weight_decay"] else {})}
    return {key: value for key, value in fixed.items() if key in live}


def check_group(rule: Rule, saved: Mapping[str, Any], where: str) -> None:
    """Refuse a group that a class of another rule must have saved."""
    betas, wanted = saved["betas"], 3 if rule.name == "ademamix" else 2
    first = {"sgd": betas[0] != 0, "rmsprop": betas[0] != 0, "adagrad": betas[0] == 0}.get(rule.name, True)
    if len(betas) != wanted or not first:
        raise ValueError(f"{where} has betas {tuple(betas)}, which no bitsandbytes counterpart of {rule.name} has")


def read(
    source: str, rule: Rule, saved: Mapping[str, Any], entries: Iterable[Entry]
) -> Iterable[tuple[Any, Tensor, str, dict[str, Tensor], Any]]:
    """(key, parameter, name, values by slot, step count) of every parameter of a group.

    Raises:
        ValueError: state that is missing, of another shape or dtype, or of another class.
    """
    layout = SLOTS[rule.name]
    for key, entry, p, name in entries:
        entry = {**entry, **entry.get(WRAPPED, {})}
        held = [f"state{i}" for i in (1, 2) if f"state{i}" in entry]
        if len(held) != len(layout) or "step" not in entry:
            raise ValueError(
                f"state of parameter {name} has {sorted(entry)}; bitsandbytes' counterpart of {rule.name} "
                f"keeps 'step', {' and '.join(repr(f'state{i + 1}') for i in range(len(layout)))}"
            )
        values: dict[str, Tensor] = {}
        for i, slots in enumerate(layout, 1):
            values.update(zip(slots, _values(entry, i, len(slots), p, name), strict=True))
        yield key, p, name, values, entry["step"]


def _values(entry: Mapping[str, Any], i: int, count: int, p: Tensor, name: str) -> list[Tensor]:
    """The fp32 tensors, of the parameter's shape, that ``state1`` or ``state2`` stands for."""
    kept = entry[f"state{i}"]
    shape = (count, *p.shape) if count > 1 else tuple(p.shape)
    if kept.shape != shape or kept.dtype not in (torch.uint8, torch.float32):
        raise ValueError(
            f"state{i} of parameter {name} is of shape {tuple(kept.shape)} and dtype {kept.dtype}; expected uint8 or "
            f"float32 of shape {shape}"
        )
    flats = [flat(x) if is_dense(x) else x.reshape(-1) for x in (kept if count > 1 else (kept,))]
    if kept.dtype == torch.uint8:
        flats = _multiplied_out(flats, *_table_and_scales(entry, i, count, p, name))
    return [x.view(p.shape) for x in flats]


def _table_and_scales(entry: Mapping[str, Any], i: int, count: int, p: Tensor, name: str) -> tuple[Tensor, Tensor, int]:
    """(the codes' values, scales in a row, elements in a block) of 8-bit state."""
    table = entry.get(f"qmap{i}")
    if not isinstance(table, Tensor) or table.shape != (256,):
        raise ValueError(f"8-bit state of parameter {name} needs the 256 values of its codes in 'qmap{i}'")
    n = p.numel()
    if (scales := entry.get(f"absmax{i}")) is None:
        if (scales := entry.get(f"max{i}")) is None or scales.numel() != 1 or count > 1:
            raise ValueError(f"8-bit state of parameter {name} needs its scales in 'absmax{i}', or one in 'max{i}'")
        return table.float(), scales.reshape(-1).float(), n
    for size in BLOCKS:
        if scales.numel() == count * -(-n // size):
            return table.float(), scales.reshape(-1).float(), size
    raise ValueError(
        f"absmax{i} of parameter {name} has {scales.numel()} scales; {count} times {n} elements have "
        f"{' or '.join(f'{count * -(-n // size)} in blocks of {size}' for size in BLOCKS)}"
    )


def _multiplied_out(codes: list[Tensor], table: Tensor, scales: Tensor, size: int) -> list[Tensor]:
    """Values of codes, one tensor or two that share the row of scales."""
    n = codes[0].numel()
    blocks = scales.numel() // len(codes)
    starts = [0, blocks]
    # CUDA's kernel finds the second average's scales n//size behind the first's and never writes the last place
    if len(codes) > 1 and n % size and scales[-1] == 0 and codes[1][(blocks - 1) * size :].any():
        starts[1] = n // size
    values = []
    for each, start in zip(codes, starts, strict=False):
        x = F.pad(table.index_select(0, each.int()), (0, blocks * size - n)).view(blocks, size)
        values.append((x * scales[start : start + blocks, None]).view(-1)[:n])
    return values
