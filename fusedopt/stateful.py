"""The state of `FusedOptimizer`: made, moved, masked, saved, loaded, exported."""

from typing import Any, Self

import torch
from torch import Tensor

from . import checkpoint, masters, streams
from .average import ema_parameters, refuse_swapped
from .dcp import movable
from .groups import GroupOptions
from .offload import finish
from .options import KEY
from .segment import Segment, in_order
from .shards import is_dtensor, take
from .state import MASK
from .stepper import Stepper
from .support import check_supported


class Stateful(Stepper):
    """What users do with state outside of steps."""

    def materialize_state(self) -> None:
        """Create the state of every parameter that requires a gradient, and all weight averages, without stepping.

        Raises:
            RuntimeError: inside `swap_ema`.
        """
        refuse_swapped(self, "materialize_state()")
        streams.assign(self)
        plan_groups = [GroupOptions(self.rule_of(group), group) for group in self.param_groups]
        for index, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad:
                    check_supported(self, p, plan_groups[index])
                    self._init_state(Segment(p, index, 0, in_order(p, plan_groups[index])), plan_groups[index])
        if any(group.averaged for group in plan_groups):
            ema_parameters(self)

    def set_update_mask(self, param: Tensor, mask: Tensor | None) -> None:
        """Let only some elements of a parameter change; its state follows the whole gradient all the same.

        Args:
            param: one of the optimizer's parameters.
            mask: bool, of the parameter's shape, True where it may change; a copy is kept in
                ``state[param]["update_mask"]`` and saved in checkpoints. None: every element may change again.

        Raises:
            ValueError: a tensor that is no parameter of this optimizer, or a mask of another shape or dtype.
        """
        if not any(p is param for group in self.param_groups for p in group["params"]):
            raise ValueError("set_update_mask: param is not one of this optimizer's parameters")
        if mask is None:
            self.state.get(param, {}).pop(MASK, None)
            return
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != param.shape:
            got = f"{mask.dtype} of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"set_update_mask: mask must be a bool tensor of shape {tuple(param.shape)}, got {got}")
        here = take(mask.detach(), param, MASK)
        self.state[param][MASK] = torch.empty_like(param.detach(), dtype=torch.bool).copy_(here)

    def to(self, device: torch.device | str) -> Self:
        """Move all state to a device, to free memory elsewhere; a step brings it back to its parameters."""
        for state in self.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.to(device)
        self._forget_plan()
        return self

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with codes, scales and what weight formats keep; waits for state on its way to the host."""
        if self._offload_state:
            finish()
        packed = super().state_dict()
        for group in packed["param_groups"]:  # torch.distributed.checkpoint writes into what it is given
            if KEY in group:
                group[KEY] = _copied(group[KEY])
        if any(map(is_dtensor, self.state)):
            packed["state"] = {k: movable(v) if isinstance(v, dict) else v for k, v in packed["state"].items()}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of this class or of its torch.optim namesake.

        The formats of state and weights (``state_dtype``, ``master_weights`` and how they round) stay those of this
        optimizer, and what the file holds in others is converted when it is next needed. Plain state whose dtype no
        option names keeps the dtype it was saved with. Everything else, random streams too, comes from the file.

        Raises:
            ValueError: groups that do not match, or a file written by a newer format.
            RuntimeError: quantised state or masters that cannot be read, or inside `swap_ema`. Nothing is changed.
        """
        refuse_swapped(self, "load_state_dict()")
        checkpoint.load(self, state_dict, super().load_state_dict)

    def to_torch_state_dict(self) -> dict[str, Any]:
        """A state dict for the class of the same name in torch.optim: its group keys, its state keys, plain numbers.

        State is fp32 (fp64 and complex as it is); quantised state takes new memory for it. What torch has no place for
        is left out: our options, weight averages, update masks, and what a weight's format keeps beside the weight, for
        which see `master_state_dict`.

        Raises:
            RuntimeError: torch.optim has no such class, or none that could take these groups.
        """
        return checkpoint.to_torch(self)

    def master_state_dict(self) -> dict[str | int, Tensor]:
        """Exactly the values that the parameters hold, in new tensors: fp32 for bf16 and fp16, else of their dtype.

        Keys are names where the optimizer was given named parameters, else numbers through all groups in order.

        Raises:
            RuntimeError: inside `swap_ema`. ValueError: two parameters of one name.
        """
        return masters.state_dict(self)

    def load_master_state_dict(self, values: dict[str | int, Tensor]) -> None:
        """Set parameters, and what their format keeps beside them, to given values, of `master_state_dict` or a model.

        ``"float32"`` and ``"split16"`` hold fp32 values exactly, other formats the nearest they can; parameters without
        a format are rounded to their dtype. State that is missing is created.

        Raises:
            TypeError, ValueError: missing or unknown keys, tensors of another shape; nothing is changed then.
            RuntimeError: inside `swap_ema`.
        """
        masters.load_state_dict(self, values)


def _copied(options: dict[str, Any]) -> dict[str, Any]:
    """A group's options in new dicts."""
    return {key: _copied(value) if isinstance(value, dict) else value for key, value in options.items()}
