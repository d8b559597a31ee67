"""Options that every optimizer here takes by keyword, beyond torch.optim's: names, types, defaults and checks.

Those that differ from torch's behaviour live in the one group key ``"fusedopt"``; a parameter group may give its own.
"""

from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from . import formats
from .arguments import check_number
from .rule import Rule, switched_on

KEY = "fusedopt"
"""The group key."""

FORMAT_VERSION = 1
"""Version of what the key holds, written beside it; older ones stay readable."""


StateDtype = str | torch.dtype
"""One of `formats.NAMES`, or a dtype that means one."""


class Options(TypedDict, total=False):
    """Keyword options of every optimizer.

    backend: ``"auto"`` (default) runs Triton kernels on GPU tensors and eager twins on others; ``"triton"`` insists
    on kernels; ``"eager"`` runs the twins everywhere. For the whole optimizer.

    amp_scaling: `torch.amp.GradScaler` hands its scale and overflow flag to the step, which unscales on the way into
    the update and skips on the device; default False: the scaler unscales ``p.grad`` itself and leaves the step out,
    which Lightning and accelerate rely on. `fusedopt.GradScaler` needs neither. For the whole optimizer.

    metrics: names of what `FusedOptimizer.metrics` is to have measured; default none. For the whole optimizer.

    norm_at_backward: sum up each gradient for the norm when backward has produced it, so that a step reads gradients
    once; ``"check"`` makes the norm pass too and compares. Default False. ``docs/norm_at_backward.md`` says what it
    needs. For the whole optimizer.

    release_gradients: update every parameter in backward, as soon as its gradient is there, and free that; ``step()``
    is still called after each backward pass. Default False. Gradients never exist all at once, so nothing that needs
    all of them works with it: clipping by their norm, skipping, metrics, accumulation, a GradScaler; nor do CUDA
    graphs. ``docs/release_gradients.md`` has the rest, DistributedDataParallel too. For the whole optimizer.

    offload_state: keep state in pinned host memory and stream it through the GPU in every step, in buffers of which one
    arrives, one is updated and one leaves at a time; the same bits. Default False. Weight averages stay on the GPU. For
    the whole optimizer.

    norm_group: a `torch.distributed.ProcessGroup` (or a DeviceMesh of one dimension) whose other ranks hold other
    parameters of the same model, as pipeline stages, FSDP1 and ZeRO do: the norm of the gradients and whether to skip
    are those of all ranks of the group, one more all-reduce of 16 bytes. Default None. DTensors need none for the ranks
    of their meshes. For the whole optimizer.

    clip_grad_norm: largest norm of the gradients after unscaling, float or one-element tensor; default None. Each
    gradient is multiplied by min(1, clip_grad_norm/(norm + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does, but on
    its way into the update: ``p.grad`` is left as it is. clip_scope: ``"global"`` (default) clips the norm of all the
    optimizer's gradients, ``"tensor"`` each parameter's own. clip_norm_type: 2.0 (default), 1.0 or inf; groups agree.

    clip_grad_value: largest magnitude of a gradient element, after norm clipping; float or tensor, default None.

    skip_nonfinite: a step whose gradients hold inf or NaN changes nothing; default False. skip_norm_above: likewise a
    step whose norm before clipping is above this, or is not finite; float or tensor, default None. Both are decided on
    the device, for the whole optimizer: groups must agree.

    ema_decay: keep a running average of the weights, ema ← ema_decay·ema + (1 − ema_decay)·p after every step that is
    not skipped, in ``state[p]["ema"]`` (fp32, fp64 for fp64 parameters); float or tensor in [0, 1), default None. The
    first average is the parameter itself, as in `torch.optim.swa_utils.AveragedModel`. Parameters without a gradient
    are averaged too. ema_warmup: after n averaged steps the decay is min(ema_decay, (1 + n)/(10 + n)); default False.

    l1: coupled L1 penalty, l1·sign(p) is added to the gradient; float or tensor, default 0.

    decay_mode: ``"lr"`` (default): decoupled decay takes off lr·weight_decay·p. ``"independent"``: it takes off
    weight_decay·(lr/lr_initial)·p, so that it follows the schedule but not the size of the learning rate; lr_initial is
    the group's ``initial_lr`` if a scheduler set one, else its lr when it was added. Loshchilov & Hutter (2019),
    "Decoupled Weight Decay Regularization", Algorithm 2 with η = lr/lr_initial.

    cautious: update only where descent and gradient agree in sign, scaled by n/(agreeing + 1) of each parameter;
    default False. Liang, Chen, Liu, Liu (2024), "Cautious Optimizers", Algorithm 1.

    cautious_decay: decoupled weight decay only where it and the descent agree in sign; default False. Chen et al.
    (2025), "Cautious Weight Decay", Algorithm 1.

    state_dtype: what the optimizer's state is kept in: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"int8"``,
    ``"float8_e4m3"`` (or ``"float8"``), ``"float8_e5m2"``, ``"int4"``, or a dict of these by state key (there also
    ``"uint8"``). Default None: the parameter's dtype as in torch, fp32 under ``master_weights``. The quantised ones (a
    scale for every 64 elements of a row) hold averages of gradients and of their squares, of real parameters of two or
    more dimensions and at least 4096 elements; other state stays fp32. ``docs/low_precision.md`` compares them.

    state_rounding: ``"nearest"`` (default), or ``"stochastic"``: state is rounded up or down so that its expected value
    is right, where steps too small for the format would otherwise be lost; for every dtype but fp32.

    master_weights: how bf16 and fp16 parameters keep what rounding would lose. ``"float32"``: an fp32 copy;
    ``"split16"``: 16 more bits, exact (bf16); ``"split8"``: 8 more bits, 24 in all (bf16); ``"kahan"``: the
    rounding error in the parameter's dtype; ``"stochastic"``: nothing beside them, rounded up or down at random.
    Default None. Other parameters are left as they are.

    master_rounding: how ``"split8"`` rounds, ``"stochastic"`` (default) or ``"nearest"``. seed: of all random numbers,
    int, default 0.

    sparse: ``"error"`` (default) takes sparse gradients where torch.optim does; ``"lazy"`` also where it does not,
    updating the touched rows alone.
    """

    backend: Literal["auto", "triton", "eager"]
    metrics: Sequence[str]
    amp_scaling: bool
    norm_at_backward: bool | Literal["check"]
    release_gradients: bool
    offload_state: bool
    norm_group: Any
    clip_grad_norm: float | Tensor | None
    clip_norm_type: float
    clip_scope: Literal["global", "tensor"]
    clip_grad_value: float | Tensor | None
    skip_nonfinite: bool
    skip_norm_above: float | Tensor | None
    ema_decay: float | Tensor | None
    ema_warmup: bool
    l1: float | Tensor
    decay_mode: Literal["lr", "independent"]
    cautious: bool
    cautious_decay: bool
    sparse: Literal["error", "lazy"]
    state_dtype: StateDtype | Mapping[str, StateDtype] | None
    state_rounding: Literal["nearest", "stochastic"]
    master_weights: Literal["float32", "split16", "split8", "kahan", "stochastic"] | None
    master_rounding: Literal["stochastic", "nearest"]
    seed: int


DEFAULTS: dict[str, Any] = {
    "clip_grad_norm": None, "clip_norm_type": 2.0, "clip_scope": "global", "clip_grad_value": None,
    "skip_nonfinite": False, "skip_norm_above": None, "ema_decay": None, "ema_warmup": False, "l1": 0.0,
    "decay_mode": "lr", "cautious": False, "cautious_decay": False, "sparse": "error",
    "state_dtype": None, "state_rounding": "nearest", "master_weights": None, "master_rounding": "stochastic",
    "seed": 0,
}  # fmt: skip
"""Options of a group, with the value that changes nothing."""

WHOLE = ("backend", "metrics", "amp_scaling", "norm_at_backward", "release_gradients", "offload_state", "norm_group")
"""Options of the whole optimizer."""


def given(name: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The group options among a constructor's keyword options; ``name`` is the class, for the error.

    Raises:
        TypeError: a keyword that is no option.
    """
    for key in chosen:
        if key not in Options.__annotations__:
            raise TypeError(f"{name}.__init__() got an unexpected keyword argument {key!r}")
    return {key: value for key, value in chosen.items() if key not in WHOLE}


def of_group(group: Mapping[str, Any], inherited: Mapping[str, Any]) -> dict[str, Any]:
    """What goes under a new group's key: nothing when every option is at its default."""
    chosen = {**inherited, **group.get(KEY, {}), **{k: group[k] for k in DEFAULTS if k in group}}
    chosen = {k: v for k, v in chosen.items() if isinstance(v, Tensor) or k not in DEFAULTS or v != DEFAULTS[k]}
    chosen.pop("version", None)
    if "state_dtype" in chosen:
        chosen["state_dtype"] = formats.canonical(chosen["state_dtype"])
    if chosen.get("decay_mode") == "independent":
        chosen.setdefault("lr_initial", float(group["lr"]))
    return {"version": FORMAT_VERSION, **chosen} if chosen else {}


def lr_initial(group: Mapping[str, Any]) -> float | Tensor:
    """What ``decay_mode="independent"`` divides lr by; a scheduler keeps a tensor beside a tensor lr."""
    value = group.get("initial_lr", group.get(KEY, {}).get("lr_initial", 1.0))
    return value if isinstance(value, Tensor) else float(value)


def check_effect(chosen: Mapping[str, Any], used: Container[str] = ()) -> None:
    """Refuse options that do nothing without others; used: those that do something elsewhere.

    Raises:
        ValueError: names the option and what it needs.
    """
    for name in (name for name in useless(chosen) if name not in used):
        raise ValueError(f"{name}={chosen[name]!r} does nothing without {' or '.join(NEEDS[name])}: give that too")


def without_useless(chosen: dict[str, Any], own: Container[str]) -> dict[str, Any]:
    """A new group's options but for inherited ones that refine what this group does not have.

    Raises:
        ValueError: one of its own that does nothing.
    """
    kept = {name: value for name, value in chosen.items() if name in own or name not in useless(chosen)}
    check_effect(kept)
    return kept if kept.keys() - {"version"} else {}


def useless(chosen: Mapping[str, Any]) -> list[str]:
    """Options that refine others which are not there."""
    return [name for name, needs in NEEDS.items() if name in chosen and all(chosen.get(x) is None for x in needs)]


NEEDS = {
    "clip_scope": ("clip_grad_norm",), "clip_norm_type": ("clip_grad_norm", "skip_norm_above"),
    "ema_warmup": ("ema_decay",), "master_rounding": ("master_weights",),
}  # fmt: skip
"""Options that refine others."""


def check(rule: Rule, group: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse an option that has no meaning for a rule under a group's other options.

    Raises:
        TypeError, ValueError: names the option and what to do.
    """
    if unknown := sorted(options.keys() - DEFAULTS.keys() - ENGINE_KEYS):
        raise ValueError(f"group key {KEY!r} holds unknown option {unknown[0]!r}; known: {', '.join(DEFAULTS)}")
    for name, value in options.items():
        if isinstance(DEFAULTS.get(name), bool) and not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
        if name in CHOICES and (isinstance(value, Tensor) or value not in CHOICES[name]):
            raise ValueError(f"{name} must be {' or '.join(map(repr, CHOICES[name]))}, got {value!r}")
        if name in NUMBERS and value is not None:
            _check_limit(name, value)
    _check_formats(rule, group, options)
    if rule.kernel_part is not None and (beyond := [name for name in options if name not in MATRIX]):
        raise ValueError(f"{rule.name} does not support {beyond[0]!r}; leave it out of its groups")
    if options.get("cautious") and (rule.n_norms or not rule.cautious):
        why = "its step is scaled by norms of all of it" if rule.n_norms else "its step does not follow the gradient"
        raise ValueError(f"cautious=True is not defined for {rule.name}: {why}; leave it out")
    if options.get("cautious") and rule.sparse == "only":
        raise ValueError(f"cautious=True is not defined for {rule.name}: it counts over whole parameters; leave it out")
    for name in ("cautious_decay", "decay_mode"):
        if options.get(name, DEFAULTS[name]) != DEFAULTS[name] and not rule.decoupled(group):
            raise ValueError(
                f"{name}={options[name]!r} needs decoupled weight decay, which {rule.name} does not have under these "
                "options"
            )
    if options.get("decay_mode") == "independent" and not ("initial_lr" in group or "lr_initial" in options):
        raise ValueError(
            "decay_mode='independent' set in mid-run does not know the initial lr: give it as 'lr_initial' beside it"
        )
    initial = lr_initial({**group, KEY: options})
    if options.get("decay_mode") == "independent" and not isinstance(initial, Tensor) and initial <= 0.0:
        raise ValueError("decay_mode='independent' divides by the initial lr, which is 0: start from an lr above 0")
    if options.get("clip_norm_type", 2.0) != 2.0 and rule.grad_norm:
        raise ValueError(f"{rule.name} takes the 2-norm of gradients: leave clip_norm_type at 2.0")
    if options.get("sparse") == "lazy" and rule.sparse in (None, "only"):
        raise ValueError(f"sparse='lazy' is not defined for {rule.name}; make its gradients dense (sparse=False)")


def _check_formats(rule: Rule, group: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    if options.get("state_dtype") is not None:
        formats.check_state_dtype(rule, options["state_dtype"])
        if rule.subtracts is not None and switched_on(group.get(rule.subtracts)):
            formats.check_exact(rule, options["state_dtype"])
    if options.get("state_rounding", "nearest") != "nearest" and any(slot.shape is not None for slot in rule.state):
        raise ValueError(f"state_rounding={options['state_rounding']!r} is not supported by {rule.name}: leave it out")
    weights = options.get("master_weights")
    if weights is not None and (not isinstance(weights, str) or weights not in formats.WEIGHTS):
        raise ValueError(f"master_weights must be None or one of {', '.join(formats.WEIGHTS)}, got {weights!r}")
    if "master_rounding" in options and weights not in (None, "split8"):
        raise ValueError(f"master_rounding is for master_weights='split8' alone, not for {weights!r}: leave it out")
    seed = options.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be an int, got {type(seed).__name__}")


CHOICES = {
    "clip_norm_type": (1.0, 2.0, float("inf")), "clip_scope": ("global", "tensor"),
    "decay_mode": ("lr", "independent"), "sparse": ("error", "lazy"), "state_rounding": ("nearest", "stochastic"),
    "master_rounding": ("stochastic", "nearest"),
}  # fmt: skip
FORMATS = ("state_dtype", "state_rounding", "master_weights", "master_rounding", "seed")
"""How numbers are kept."""
MATRIX = {
    "version", "lr_initial", "streams", *FORMATS, "clip_grad_norm", "clip_norm_type", "clip_scope",
    "clip_grad_value", "skip_nonfinite", "skip_norm_above", "ema_decay", "ema_warmup", "cautious_decay", "decay_mode",
}  # fmt: skip
"""What matrix rules follow."""
ENGINE_KEYS = {"version", "lr_initial", "streams"}
"""What else stands under the key."""
NUMBERS = ("clip_grad_norm", "clip_grad_value", "skip_norm_above", "ema_decay", "l1")


def _check_limit(name: str, value: Any) -> None:
    check_number(name, value)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a one-element tensor, got shape {tuple(value.shape)}")
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be a float32 or float64 tensor, got {value.dtype}")
        return  # its value may change on the device
    if name == "ema_decay":
        if not 0.0 <= value < 1.0:
            raise ValueError(f"ema_decay must be at least 0 and below 1, got {value!r}")
        return
    if not value >= 0.0 or (value == 0.0 and name != "l1"):
        raise ValueError(f"{name} must be {'at least' if name == 'l1' else 'above'} 0, got {value!r}")
