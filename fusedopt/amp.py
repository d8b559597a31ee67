"""`GradScaler`: torch's dynamic loss scaling, with the search for overflows left to the step's own norm pass."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from .optimizer import FusedOptimizer
from .release import refuse_scaler


class GradScaler(torch.amp.GradScaler):
    """Drop-in for `torch.amp.GradScaler`: same arguments, methods, state dict and schedule of the scale.

    torch's own reads and writes every gradient once more to find inf and NaN (8 B per fp32 element; `unscale_` does
    so too) and, before most optimizers, waits for the device to learn the result. Around a `FusedOptimizer` this class
    does neither: `step` hands the scale over, the norm pass of the step finds what is not finite, the step is skipped
    on the device, and `update` takes the flag from there. ``p.grad`` keeps the scaled gradients.

    After `unscale_` the step takes the flag that torch's pass has found, without a host sync. Other optimizers are
    stepped as torch does. `step` is called at every iteration, also at those that change nothing, so learning rate
    schedules and hooks count them; only inf and NaN lower the scale, a step skipped by ``skip_norm_above`` does not.
    """

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Unscale, check and step; ``args`` and ``kwargs`` go to ``optimizer.step()``, whose result is returned.

        A ``grad_scale`` that the user has set on the optimizer multiplies the scale and is gone afterwards, as with
        torch; if the step raises, it is as it was.

        Raises:
            RuntimeError, AssertionError: torch's, for calls out of order, ``closure=`` and no gradient at all.
            RuntimeError: the optimizer is a wrapper whose step is that of another object.
        """
        if not isinstance(optimizer, FusedOptimizer) or not self._enabled or self._scale is None or "closure" in kwargs:
            return super().step(optimizer, *args, **kwargs)
        if optimizer._release_gradients:
            refuse_scaler()
        state = self._per_optimizer_states[id(optimizer)]
        if state["stage"] is OptState.STEPPED:
            return super().step(optimizer, *args, **kwargs)
        users, flags = getattr(optimizer, "grad_scale", None), state["found_inf_per_device"]
        result = None
        if state["stage"] is OptState.READY and any(p.grad is not None for p in _params(optimizer)):
            scale = self._scale if users is None else self._scale * users
            given = {"grad_scale": scale, "found_inf": None, "_check_nonfinite": True}
            result = _step(optimizer, given, args, kwargs)
            flags.update((flag.device, flag) for flag in optimizer._found_inf())
        elif flags:
            found = sum(flag.to(self._scale.device, non_blocking=True) for flag in flags.values())
            result = _step(optimizer, {"grad_scale": users, "found_inf": found}, args, kwargs)
        if not flags:
            raise AssertionError("No inf checks were recorded for this optimizer.")
        state["stage"] = OptState.STEPPED
        return result


def _params(optimizer: FusedOptimizer) -> Iterator[torch.Tensor]:
    return (p for group in optimizer.param_groups for p in group["params"])


def _step(optimizer: FusedOptimizer, given: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``optimizer.step()`` with attributes that are gone afterwards, or as before if it raises."""
    attributes = vars(optimizer)
    before = {name: attributes[name] for name in (*given, "_reported") if name in attributes}
    attributes.update(given, _reported=None)
    try:
        result = optimizer.step(*args, **kwargs)
        if optimizer._reported is None:
            raise RuntimeError(
                f"step() of this {type(optimizer).__name__} wraps another optimizer, which was given no loss scale: "
                "pass that one to the scaler"
            )
    except BaseException:
        _remove(attributes, given)
        attributes.update(before)
        raise
    _remove(attributes, given)
    return result


def _remove(attributes: dict[str, Any], names: Iterable[str]) -> None:
    for name in names:
        attributes.pop(name, None)
