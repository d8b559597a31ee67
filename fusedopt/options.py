"""Options that every optimizer here takes by keyword, beyond torch.optim's: names, types, defaults and checks.

Those that differ from torch's behaviour live in the one group key ``"fusedopt"``; a parameter group may give its own.
"""

from collections.abc import Mapping
from typing import Any, Literal, TypedDict

from .rule import Rule

KEY = "fusedopt"
"""The group key."""

FORMAT_VERSION = 1
"""Version of what the key holds, written beside it; older ones stay readable."""


class Options(TypedDict, total=False):
    """Keyword options of every optimizer.

    backend: ``"auto"`` (default) runs Triton kernels on GPU tensors and eager twins on others; ``"triton"`` insists
    on kernels; ``"eager"`` runs the twins everywhere. For the whole optimizer.

    cautious: update only where descent and gradient agree in sign, scaled by n/(agreeing + 1) of each parameter;
    default False. Liang, Chen, Liu, Liu (2024), "Cautious Optimizers", Algorithm 1.

    cautious_decay: decoupled weight decay only where it and the descent agree in sign; default False. Chen et al.
    (2025), "Cautious Weight Decay", Algorithm 1.

    sparse: ``"error"`` (default) takes sparse gradients where torch.optim does; ``"lazy"`` also where it does not,
    updating the touched rows alone.
    """

    backend: Literal["auto", "triton", "eager"]
    cautious: bool
    cautious_decay: bool
    sparse: Literal["error", "lazy"]


DEFAULTS: dict[str, Any] = {"cautious": False, "cautious_decay": False, "sparse": "error"}
"""Options of a group, with the value that changes nothing."""


def given(name: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The group options among a constructor's keyword options; ``name`` is the class, for the error.

    Raises:
        TypeError: a keyword that is no option.
    """
    for key in chosen:
        if key not in Options.__annotations__:
            raise TypeError(f"{name}.__init__() got an unexpected keyword argument {key!r}")
    return {key: value for key, value in chosen.items() if key != "backend"}


def of_group(group: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """What goes under a new group's key: nothing when every option is at its default."""
    chosen = {**inherited, **group.get(KEY, {}), **{k: group[k] for k in DEFAULTS if k in group}}
    chosen = {k: v for k, v in chosen.items() if k not in DEFAULTS or v != DEFAULTS[k]}
    chosen.pop("version", None)
    return {"version": FORMAT_VERSION, **chosen} if chosen else {}


def check(rule: Rule, group: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse an option that has no meaning for a rule under a group's other options.

    Raises:
        ValueError: names the option and what to do.
    """
    for name in ("cautious", "cautious_decay"):
        if not isinstance(options.get(name, False), bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")
    if options.get("cautious") and (rule.n_norms or not rule.cautious):
        why = (
            "its step is scaled by norms of the whole step" if rule.n_norms else "its step does not follow the gradient"
        )
        raise ValueError(f"cautious=True is not defined for {rule.name}: {why}; leave it out")
    if options.get("cautious_decay") and not rule.decoupled(group):
        raise ValueError(
            f"cautious_decay=True needs decoupled weight decay, which {rule.name} does not have under these options"
        )
    if options.get("sparse", "error") not in ("error", "lazy"):
        raise ValueError(f"sparse must be 'error' or 'lazy', got {options['sparse']!r}")
    if options.get("sparse") == "lazy" and rule.sparse in (None, "only"):
        raise ValueError(f"sparse='lazy' is not defined for {rule.name}; make its gradients dense (sparse=False)")
