"""For torchtitan (0.3): its optimizer container with the optimizers of fusedopt. Importing this needs torchtitan."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer  # pyright: ignore[reportMissingImports] # brings its own

import fusedopt

from ..groups import GroupOptions
from ..optimizer import FusedOptimizer
from ..rules import RULES


class FusedOptimizersContainer(OptimizersContainer):
    """In place of torchtitan's, with ``FusedOptimizersContainer.Config(param_groups=[…])`` as the optimizer's config.

    ``optimizer_name`` is a class of fusedopt (``"AdamW"``, ``"Lion"``, …) or one that only torchtitan has.
    ``optimizer_kwargs`` takes its hyper-parameters and options of a group, ``optimizer_factory_kwargs_by_name`` those
    of a whole optimizer. torchtitan clips by itself; ``implementation`` selects nothing.

    Raises:
        ValueError: ``fused_opt_states_bf16``, for which there is ``state_dtype``; or clipping or skipping by the norm
            in one of several optimizers, whose step sees a part of the gradients.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """torchtitan's fields."""

    def __init__(self, config: "FusedOptimizersContainer.Config", *, model_parts: list[nn.Module]) -> None:
        if config.implementation == "fused_opt_states_bf16":
            raise ValueError(
                "implementation='fused_opt_states_bf16' is torch.optim's: leave it out, and give "
                "'state_dtype': 'bfloat16' in optimizer_kwargs"
            )
        super().__init__(config, model_parts=model_parts)
        ours = [optimizer for optimizer in self.optimizers if isinstance(optimizer, FusedOptimizer)]
        for optimizer in ours if len(self.optimizers) > 1 else ():
            if any(GroupOptions(optimizer.rule_of(group), group).uses_total for group in optimizer.param_groups):
                raise ValueError(
                    f"{len(self.optimizers)} optimizers share the model's gradients, whose norm none of them can take: "
                    "leave clip_grad_norm, skip_norm_above and skip_nonfinite out; training.max_norm clips"
                )

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        """The class of that name."""
        here = name in RULES.values()
        return getattr(fusedopt, name) if here else OptimizersContainer._resolve_optimizer_factory(name)

    def state_dict(self) -> dict[str, Any]:
        """As torchtitan's, for which state must be there; it is made without a step that would count."""
        self._materialize()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torchtitan's."""
        self._materialize()
        super().load_state_dict(state_dict)

    def _materialize(self) -> None:
        for optimizer in self.optimizers:
            if isinstance(optimizer, FusedOptimizer) and not optimizer.state:
                optimizer.materialize_state()
