"""Parameter groups as a table of plain text: what fell where."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .grouping import clean_names
from .options import ENGINE_KEYS, KEY

ALWAYS = ("lr", "weight_decay")
"""Options that are shown also where all groups agree."""

Named = Sequence[tuple[str, Tensor]]

Pattern = tuple[tuple[str, ...], ...]
"""The parts of a name between dots, each with what may stand there."""


def describe_groups(groups: torch.optim.Optimizer | Iterable[Mapping[str, Any]], model: nn.Module | None = None) -> str:
    """A table of what fell where: a line per group with the options that differ, sizes and names.

    Names are abbreviated, ``blocks.{0–11}.mlp.{0,2}.weight``, and come without the prefixes of wrappers.

    groups: an optimizer, or groups as `fusedopt.param_groups` gives them. model: also shows which of its parameters
    are in no group, frozen ones apart; and names the parameters of an optimizer that was given none.
    """
    given = groups.param_groups if isinstance(groups, torch.optim.Optimizer) else list(groups)
    defaults = [_options(_defaults(groups, group)) for group in given]
    of_model = [] if model is None else list(model.named_parameters())
    known = {id(p): name for name, p in of_model}
    members = [_named(group, known) for group in given]
    taken = {id(p) for named in members for _, p in named}
    left = [(name, p) for name, p in of_model if id(p) not in taken]
    options = [_options(group) for group in given]
    keys = [key for key in dict.fromkeys(key for own in options for key in own) if _shown(key, options, defaults)]
    lines = [([str(i), *(own.get(key, "") for key in keys)], members[i]) for i, own in enumerate(options)]
    for title, trained in (("frozen", False), ("in no group", True)):
        if named := [(name, p) for name, p in left if p.requires_grad is trained]:
            lines.append(([title, *("" for _ in keys)], named))
    every = [name for _, named in lines for name, _ in named]
    clean = dict(zip(every, clean_names(every), strict=True))
    rows = [["group", *keys, "tensors", "parameters", "names"]]
    for cells, named in lines:
        names = abbreviate(dict.fromkeys(clean[name] for name, _ in named)) or [""]
        rows.append([*cells, str(len(named)), f"{sum(p.numel() for _, p in named):,}", names[0]])
        rows += [[*("" for _ in rows[0][1:]), name] for name in names[1:]]
    return _aligned(rows)


def abbreviate(names: Iterable[str]) -> list[str]:
    """The same names in fewer words: those that differ in one part become one, ``{0–3,7}`` or ``{weight,bias}``."""
    patterns: list[Pattern] = [tuple((part,) for part in name.split(".")) for name in names]
    for numbers in (True, False):
        for position in range(max(map(len, patterns), default=0)):
            patterns = _merged(patterns, position, numbers)
    return [".".join(map(_one_of, pattern)) for pattern in patterns]


def _merged(patterns: Sequence[Pattern], position: int, numbers: bool) -> list[Pattern]:
    """Patterns that differ at this position alone, in numbers or in words, become one."""
    merged: dict[Any, Pattern] = {}
    for pattern in patterns:
        if position >= len(pattern) or pattern[position][0].isdigit() is not numbers:
            merged[pattern] = pattern
            continue
        rest = pattern[:position], pattern[position + 1 :]
        parts = merged[rest][position] if rest in merged else ()
        merged[rest] = (*rest[0], parts + pattern[position], *rest[1])
    return list(merged.values())


def _one_of(parts: Sequence[str]) -> str:
    """``{a,b}``, and of integers ``{0–3,7}``."""
    if len(parts) == 1:
        return parts[0]
    if not all(part.isdigit() for part in parts):
        return "{" + ",".join(parts) + "}"
    runs: list[list[int]] = []
    for number in sorted(map(int, parts)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{a}" if a == b else f"{a}–{b}" for a, b in runs) + "}"


def _named(group: Mapping[str, Any], known: Mapping[int, str]) -> Named:
    """The group's parameters with names, or "unnamed"."""
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    names = group.get("param_names", [None] * len(params))
    pairs = [p if isinstance(p, tuple) else (n, p) for n, p in zip(names, params, strict=True)]
    return [(name or known.get(id(p), "unnamed"), p) for name, p in pairs]


def _options(group: Mapping[str, Any]) -> dict[str, str]:
    """A group's options as they are shown; those of `fusedopt.Options` beside torch's."""
    flat = {**{k: v for k, v in group.items() if k not in ("params", "param_names", KEY)}, **group.get(KEY, {})}
    return {key: _value(value) for key, value in flat.items() if key not in ENGINE_KEYS}


def _value(value: Any) -> str:
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"({', '.join(map(_value, value))})" if isinstance(value, tuple | list) else str(value)


def _defaults(optimizer: Any, group: Mapping[str, Any]) -> dict[str, Any]:
    """What the optimizer gives a group that sets nothing; {} without an optimizer."""
    of_group = getattr(optimizer, "defaults_of", None)
    return of_group(group) if of_group is not None else getattr(optimizer, "defaults", {})


def _shown(key: str, options: Sequence[Mapping[str, str]], defaults: Sequence[Mapping[str, str]]) -> bool:
    """Whether groups differ in an option; one that only some have must differ from its default."""
    if all(key in own for own in options):
        return key in ALWAYS or len({own[key] for own in options}) > 1
    return any(key in own and own[key] != default.get(key) for own, default in zip(options, defaults, strict=True))


def _aligned(rows: list[list[str]]) -> str:
    """Columns two spaces apart: the first and the last from the left, the others from the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = range(1, len(widths) - 1)
    return "\n".join(
        "  ".join(f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row)).rstrip()
        for row in rows
    )
