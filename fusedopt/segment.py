"""One parameter of a step: where its numbers are and how they are laid out."""

import torch
from torch import Tensor

from fusedopt_kernels.param.format import WeightFormat
from fusedopt_kernels.state.format import StateFormat

from . import layout, shards
from .formats import needs_order
from .groups import GroupOptions


class Segment:
    """One parameter of the step: where its numbers are and how they are laid out.

    local: what of the parameter lies on this rank; itself unless it is a DTensor. span: where that lies in the whole;
    ranks: which others hold the rest, None for a whole parameter; mesh: what it is placed on, and how, or None. weight:
    local, or its packed copy when it has gaps or, ``in_order``, is not contiguous. grad_buffer: where a gradient of
    another layout is copied to, or None. slots: state tensors in the rule's order, codes where a slot is quantised;
    scales, formats: what belongs to those, else None. weight_format: None for a plain weight; residual: what it keeps
    beside the weight. keys: of the random streams that round the weight and each slot, None where nothing does. rows:
    numbers of the parameter's rows that these are, None for all. numbers: its scalar slots, 0-dim. counter: 0-dim step
    count, or None; counted: another part of the step counts in it. mask: a byte per stored number, 0 where it may not
    change; or None. ema, ema_step: running average of the weight and its 0-dim count of steps, or None.
    """

    __slots__ = (
        "counted", "counter", "ema", "ema_step", "formats", "grad_buffer", "group", "keys", "local", "mask", "mesh",
        "numbers", "param", "position", "ranks", "residual", "rows", "scales", "slots", "span", "weight",
        "weight_format",
    )  # fmt: skip

    def __init__(self, param: Tensor, group: int, position: int, in_order: bool = False) -> None:
        self.param, self.group, self.position = param, group, position
        self.local: Tensor = shards.here(param)
        self.place_as(param)
        fits = self.local.is_contiguous() if in_order else layout.is_dense(self.local)
        self.weight = self.local if fits else _packed(self.local, in_order)
        self.grad_buffer: Tensor | None = None
        self.slots: list[Tensor] = []
        self.scales: list[Tensor | None] = []
        self.formats: list[StateFormat | None] = []
        self.weight_format: WeightFormat | None = None
        self.keys: tuple[int | None, ...] = ()
        self.rows: Tensor | None = None
        self.counted = False
        self.numbers: list[Tensor] = []
        self.mask: Tensor | None = None
        self.residual: Tensor | None = None
        self.counter: Tensor | None = None
        self.ema: Tensor | None = None
        self.ema_step: Tensor | None = None

    def place_as(self, param: Tensor) -> None:
        """Take the place among the ranks that a parameter has."""
        self.span, self.ranks, self.mesh = shards.span_of(param), shards.ranks_of(param), shards.mesh_of(param)

    @property
    def grad_dtype(self) -> torch.dtype:
        """Dtype of the gradient."""
        assert self.param.grad is not None
        return self.param.grad.dtype

    @property
    def numel(self) -> int:
        """Stored real numbers."""
        return self.weight.numel() * (2 if self.weight.is_complex() else 1)

    @property
    def whole_numel(self) -> int:
        """The same over all ranks."""
        return self.numel if self.ranks is None else self.param.numel() * (2 if self.weight.is_complex() else 1)


def in_order(p: Tensor, options: GroupOptions) -> bool:
    """Whether elements must lie in the order of their indices: matrix rules see rows and columns, groups are runs in a
    row, random numbers go by the index.
    """
    return options.rule.kernel_part is not None or needs_order(p, options.options, options.rule)


def _packed(param: Tensor, in_order: bool) -> Tensor:
    if layout.overlaps_itself(param):
        raise RuntimeError(
            f"a parameter of shape {tuple(param.shape)} and strides {param.stride()} has elements that share "
            "memory (an expanded tensor); make it a tensor of its own with .clone() before optimising it"
        )
    layout.warn_once(
        "packed",
        "a parameter with gaps between its elements (for a matrix rule, quantised state and stochastic rounding: one "
        "that is not contiguous) is packed and unpacked at every step; make it contiguous to save two copies",
    )
    memory_format = torch.contiguous_format if in_order else torch.preserve_format
    return torch.empty_like(param.detach(), memory_format=memory_format)
