"""Parameter groups by rules, for any optimizer: each parameter in one group, one group for equal options.

The group of a parameter: the options of the first rule that it matches (else none), and with layer-wise decay

    lr ← lr·decay^d    d: layers between it and the top

Source of the order of layers: Clark et al. (2020), "ELECTRA"; Bao et al. (2022), "BEiT": embeddings lie below the first
layer, what follows the last one (norm, head) above it.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from .arguments import check_lr, check_number
from .depths import Layers, depths

Matcher = str | re.Pattern[str] | type[nn.Module] | Callable[[str, Tensor, nn.Module | None], bool]
GroupRule = tuple[Matcher | tuple[Matcher, ...], Mapping[str, Any]]
Checked = tuple[tuple[Matcher, ...], dict[str, Any]]

WRAPPERS = ("_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
"""Parts of names that FSDP1, torch.compile and activation checkpointing put in."""


@dataclass(frozen=True)
class Member:
    """A parameter. name: as torch gives it; clean: without wrappers; modules: those that hold it, outermost first.

    others: further names of a tied parameter, clean.
    """

    name: str
    clean: str
    parameter: Tensor
    modules: tuple[nn.Module, ...]
    others: list[str]


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    rules: Iterable[GroupRule] = (),
    *,
    lr: float | Tensor | None = None,
    layer_decay: float | None = None,
    layers: Layers | None = None,
    allow_unused: bool = False,
) -> list[dict[str, Any]]:
    """Groups of named parameters for an optimizer: every parameter that requires a gradient, exactly once.

    First comes the group of parameters that no rule matches, then those of the rules in their order; under layer_decay
    each from the top layer down. Groups of equal options are one. Tied parameters count once, under their first name.

    Args:
        model: a module; or (name, parameter) pairs, enough for rules that do not look at modules.
        rules: pairs (what it matches, options of its group); the first match wins. What it matches: a glob over the
            whole name (``"*.bias"``, as `fnmatch.fnmatchcase`; ``*`` also matches dots), a compiled regular expression
            that is searched, a module class (all parameters inside such modules), a function of (name, parameter, the
            module that owns it), or a tuple of these. Names come without the prefixes of DDP, FSDP1 and torch.compile.
        lr: of groups whose rule gives none; default: the optimizer's.
        layer_decay: factor in (0, 1] from each layer to the one below it; needs lr, which the top layer has.
        layers: finds a layer's number: a compiled regular expression by its groups, or a function of the name that
            returns None for none. Default: the first integer. A parameter without a number is below or above the
            layers, as it comes before or after them in the innermost module that holds both.
        allow_unused: take a rule or pattern that matches nothing, or only what earlier rules take.

    Raises:
        ValueError: an unused rule, a rule about modules without the model, numbers out of range. TypeError: what is
            no rule, parameters without names.
    """
    checked = [_checked(number, rule) for number, rule in enumerate(rules, 1)]
    members = _members(model)
    if not isinstance(model, nn.Module) and any(isinstance(m, type) for matchers, _ in checked for m in matchers):
        raise ValueError("a rule names a module class: pass the model instead of its named parameters")
    chosen = _choose(members, checked, allow_unused)
    depth = _depths(members, lr, layer_decay, layers)
    buckets: dict[tuple[int, int], list[int]] = {}
    for i, member in enumerate(members):
        if member.parameter.requires_grad:
            buckets.setdefault((chosen[i], depth[i]), []).append(i)
    merged: list[tuple[dict[str, Any], list[int]]] = []
    for (rule, below), indices in sorted(buckets.items()):
        options = {**({} if lr is None else {"lr": lr}), **(checked[rule - 1][1] if rule else {})}
        if layer_decay is not None and below:
            options["lr"] = options["lr"] * layer_decay**below
        same = next((own for known, own in merged if _equal(known, options)), None)
        if same is None:
            merged.append((options, indices))
        else:
            same.extend(indices)
    return [{"params": [(members[i].name, members[i].parameter) for i in sorted(own)], **o} for o, own in merged]


def no_decay(*also: Matcher, **options: Any) -> GroupRule:
    """The usual rule: no weight decay for biases, norms and embeddings (by the class of the module that owns them).

    also: what else it matches, such as ``"pos_embed"``. options: further options of the group.
    """
    return (_undecayed, *also), {"weight_decay": 0.0, **options}


def _undecayed(name: str, parameter: Tensor, module: nn.Module | None) -> bool:
    """Norms have Norm in the name of their class; torch.nn's biases are called bias, in_proj_bias, bias_ih_l0 …"""
    if module is None:
        raise ValueError("no_decay() looks at modules: pass the model instead of its named parameters")
    last = name.rpartition(".")[2]
    embeds = isinstance(module, nn.Embedding | nn.EmbeddingBag)
    return embeds or "norm" in type(module).__name__.lower() or last.startswith("bias") or last.endswith("bias")


def clean_names(names: Sequence[str]) -> list[str]:
    """Names without what wrappers add; ``module.``, DDP's, goes where every name begins with it."""
    clean = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names]
    while clean and all(name.startswith("module.") for name in clean):
        clean = [name.removeprefix("module.") for name in clean]
    return clean


def _members(model: Any) -> list[Member]:
    """Every parameter once, in the model's order."""
    modules: dict[str, nn.Module] = {}
    pairs: Iterable[Any] = model
    if isinstance(model, nn.Module):
        modules = dict(model.named_modules(remove_duplicate=False))
        pairs = model.named_parameters(remove_duplicate=False)
    pairs = list(pairs)
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
            raise TypeError("rules go by names: pass the model or its named_parameters(), not parameters alone")
        if pair[0].endswith("_flat_param"):
            raise ValueError(f"{pair[0]} is FSDP1's flat parameter: wrap the model with use_orig_params=True")
    members: dict[int, Member] = {}
    for (name, parameter), clean in zip(pairs, clean_names([name for name, _ in pairs]), strict=True):
        if id(parameter) in members:
            members[id(parameter)].others.append(clean)
            continue
        path = name.split(".")
        inside = [modules[p] for length in range(len(path)) if (p := ".".join(path[:length])) in modules]
        members[id(parameter)] = Member(name, clean, parameter, tuple(inside), [])
    return list(members.values())


def _checked(number: int, rule: Any) -> Checked:
    """A rule's matchers and options."""
    if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[1], Mapping)):
        raise TypeError(f"rule {number} must be a pair (what it matches, dict of options), got {rule!r}")
    matchers = rule[0] if isinstance(rule[0], tuple) else (rule[0],)
    for matcher in matchers:
        known = issubclass(matcher, nn.Module) if isinstance(matcher, type) else callable(matcher)
        if not (known or isinstance(matcher, str | re.Pattern)):
            raise TypeError(
                f"rule {number} matches by a glob, a compiled regular expression, a class of modules, a function or a "
                f"tuple of these, not by {matcher!r}"
            )
    if filled := sorted({"params", "param_names"} & rule[1].keys()):
        raise ValueError(f"rule {number} sets {filled[0]!r}, which param_groups fills in: leave it out")
    return matchers, dict(rule[1])


def _matches(matcher: Matcher, member: Member) -> bool:
    if isinstance(matcher, str | re.Pattern):
        return _named(matcher, member.clean)
    if isinstance(matcher, type):
        return any(isinstance(module, matcher) for module in member.modules)
    return bool(matcher(member.clean, member.parameter, member.modules[-1] if member.modules else None))


def _named(pattern: str | re.Pattern[str], name: str) -> bool:
    return fnmatchcase(name, pattern) if isinstance(pattern, str) else pattern.search(name) is not None


def _choose(members: list[Member], rules: list[Checked], allow_unused: bool) -> list[int]:
    """For each parameter the number of the first rule that it matches, from 1; 0: none."""
    chosen = [0] * len(members)
    for number, (matchers, _) in enumerate(rules, 1):
        hits = [{i for i, member in enumerate(members) if _matches(matcher, member)} for matcher in matchers]
        matched = sorted(set().union(*hits))
        if not allow_unused:
            for matcher, own in zip(matchers, hits, strict=True):
                if not own and (isinstance(matcher, str | re.Pattern) or not matched):
                    raise ValueError(f"rule {number}: {_nothing(matcher, members)}")
            if all(chosen[i] for i in matched):
                first = " and ".join(map(str, sorted({chosen[i] for i in matched})))
                raise ValueError(
                    f"rule {number} gets no parameter: rule {first} before it takes all that it matches, such as "
                    f"{members[matched[0]].clean}; put it first, or pass allow_unused=True"
                )
        for i in matched:
            chosen[i] = chosen[i] or number
    return chosen


def _nothing(matcher: Matcher, members: list[Member]) -> str:
    """What is wrong with a matcher that matches no parameter."""
    if not isinstance(matcher, str | re.Pattern):
        name = getattr(matcher, "__name__", repr(matcher))
        return f"{name} matches no parameter; leave it out, or pass allow_unused=True"
    pattern = matcher if isinstance(matcher, str) else matcher.pattern
    for member in members:
        if other := next((name for name in member.others if _named(matcher, name)), None):
            return f"{pattern!r} matches {other}, which is tied to {member.clean}: match it by that name"
    close = difflib.get_close_matches(pattern, [member.clean for member in members], n=1, cutoff=0.0)
    hint = f"; the closest is {close[0]}" if close else ""
    return f"{pattern!r} matches no parameter{hint}. Mend it, or pass allow_unused=True"


def _equal(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Equal options; tensors only as the same object, since each may change."""
    return a.keys() == b.keys() and all(
        a[key] is b[key] if isinstance(a[key], Tensor) or isinstance(b[key], Tensor) else a[key] == b[key] for key in a
    )


def _depths(members: list[Member], lr: Any, layer_decay: float | None, layers: Layers | None) -> list[int]:
    """For each parameter the number of layers above its own; all 0 without decay."""
    if lr is not None:
        check_lr(lr)
    if layer_decay is None:
        if layers is not None:
            raise ValueError("layers finds the layers for layer_decay: give that too")
        return [0] * len(members)
    check_number("layer_decay", layer_decay)
    if not 0.0 < layer_decay <= 1.0:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    if lr is None:
        raise ValueError("layer_decay sets the lr of each group: give lr, that of the top layer")
    return depths([member.clean for member in members], layers)
