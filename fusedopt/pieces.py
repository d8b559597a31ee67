"""Optimizers that hold a piece of a model: under FullyShardedDataParallel (FSDP1) and ZeroRedundancyOptimizer (ZeRO-1).

FSDP1 keeps all parameters of a module in a flat one, cut anywhere. With ``use_orig_params=True`` a rank has 1-D
fragments of the parameters, some empty and without gradient; without it, its piece of the flat one. Nothing on them
says which elements of which parameter they are. So rules and options that treat every element alike are right, and
what looks at rows, at whole tensors or at places is refused. ZeRO-1 leaves parameters whole, some on each rank.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from .formats import WIDE, is_random
from .groups import GroupOptions

if TYPE_CHECKING:
    from .stepper import Stepper

FRAGMENTS = "parameters of FullyShardedDataParallel are pieces of tensors:"
REMEDY = "use fully_shard (FSDP2), whose parameters are DTensors"


def is_fragment(p: Tensor) -> bool:
    """Whether FSDP1 keeps a parameter in a flat one, or it is that one."""
    return getattr(p, "_fsdp_flattened", False)


def check_pieces(optimizer: "Stepper", groups: Sequence[GroupOptions], lists: Sequence[Sequence[Tensor]]) -> None:
    """Refuse what cannot be right with a piece of a model alone; the same on every rank.

    Raises:
        RuntimeError: names rule or option and what to do.
    """
    cut = [options for options, params in zip(groups, lists, strict=True) if any(map(is_fragment, params))]
    for options in cut:
        _check_fragments(optimizer, options)
    joins = any(g.uses_total for g in groups) or optimizer._check_nonfinite or bool(optimizer._metrics.names)
    if joins and optimizer._norm_group is None and (cut or _in_zero()):
        raise RuntimeError(
            f"{type(optimizer).__name__} has this rank's piece of the model alone, and so would norms and skip "
            "decisions (clip_grad_norm, skip_nonfinite, skip_norm_above, metrics, GradScaler): make it with "
            "norm_group=, the process group that shares the model out (for ZeroRedundancyOptimizer: "
            "optimizer_class=functools.partial(fusedopt.AdamW, norm_group=...)), or clip before the step"
        )


def _check_fragments(optimizer: "Stepper", options: GroupOptions) -> None:
    for rule in (options.rule, optimizer.rule):  # a matrix rule's optimizer gives what is no matrix to another
        if rule.kernel_part is not None or rule.n_norms or rule.grad_norm:
            raise RuntimeError(f"{FRAGMENTS} {rule.name} works on whole ones; {REMEDY}, or a rule such as AdamW")
    for option, why in _beyond(optimizer, options):
        raise RuntimeError(f"{FRAGMENTS} {option} {why}; leave it out, or {REMEDY}")


def _beyond(optimizer: "Stepper", options: GroupOptions) -> Iterator[tuple[str, str]]:
    """(option, why it is refused)."""
    if options.clips_alone:
        yield "clip_scope='tensor'", "clips by the norm of whole ones"
    if options.cautious:
        yield "cautious=True", "counts over whole ones"
    if optimizer._metrics.change:
        yield "metrics of parameters and updates", "are norms of whole ones"
    asked = options.options.get("state_dtype", {})
    quantised = [x for x in ([asked] if isinstance(asked, str) else asked.values()) if x not in WIDE]
    if quantised:
        yield f"state_dtype={quantised[0]!r}", "has a scale for every few neighbours in a row"
    if is_random(options.options):
        yield "stochastic rounding", "(the default of split8: master_rounding='nearest') goes by places in whole ones"


def _in_zero() -> bool:
    """Whether ZeroRedundancyOptimizer is the caller, which nothing else tells: it makes and steps a plain optimizer."""
    zero = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    frame = sys._getframe() if zero is not None else None
    while frame is not None and frame.f_globals is not zero.__dict__:
        frame = frame.f_back
    return frame is not None
