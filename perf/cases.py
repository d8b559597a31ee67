"""What is stepped: the parameter shapes of real models, and a few extremes, by name.

Models come from `fusedopt.shapes`. One that does not fit is cut to whole layers, and says so.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod

from fusedopt.shapes import MODELS, Shapes


@dataclass(frozen=True)
class Case:
    """title: in words. shapes: name → shape of every parameter, those of a layer numbered ``.3.`` or ``_3.``."""

    name: str
    title: str
    shapes: Callable[[], Shapes]

    def fitted(self, elements: float) -> "Fitted | None":
        """The case with at most so many elements: whole, else as many whole layers as fit; None if none does."""
        shapes = self.shapes()
        layers = {name: _layer(name) for name in shapes}
        numbers = sorted({n for n in layers.values() if n is not None})
        total = sum(map(prod, shapes.values()))
        if total <= elements:
            return Fitted(self, shapes, "whole")
        for count in range(len(numbers) - 1, 0, -1):
            kept = set(numbers[:count])
            cut = {name: s for name, s in shapes.items() if layers[name] is None or layers[name] in kept}
            if sum(map(prod, cut.values())) <= elements:
                return Fitted(self, cut, f"{count} of {len(numbers)} layers")
        return None


@dataclass(frozen=True)
class Fitted:
    """A case as it is measured. part: ``"whole"`` or how many of its layers."""

    case: Case
    shapes: Shapes
    part: str

    @property
    def tensors(self) -> int:
        """Number of parameters."""
        return len(self.shapes)

    @property
    def elements(self) -> int:
        """Elements of all of them."""
        return sum(map(prod, self.shapes.values()))


def _layer(name: str) -> int | None:
    found = re.search(r"[._](\d+)\.", name)
    return int(found[1]) if found else None


def _many(count: int, *shape: int) -> Shapes:
    return {f"tensor{i}": shape for i in range(count)}


def _one(*shape: int) -> Shapes:
    return {"weight": shape}


def _model(name: str) -> Case:
    return Case(name, MODELS[name].title, MODELS[name].shapes)


OVER_INT32 = (2**16 + 1, 2**15)
"""2³¹ + 2¹⁵ elements."""

CASES = {
    case.name: case
    for case in (
        _model("gpt2"),
        _model("llama3.2-1b"),
        _model("llama3-8b"),
        _model("resnet50"),
        _model("vit-h-14"),
        _model("qwen3-30b-a3b"),
        Case("tiny-1000", "1,000 tensors of 1,024 elements", partial(_many, 1000, 32, 32)),
        Case("tiny-10000", "10,000 tensors of 64 elements", partial(_many, 10000, 8, 8)),
        Case("over-int32", "one tensor of 2³¹ + 2¹⁵ elements", partial(_one, *OVER_INT32)),
        Case("embedding", "one embedding, 128,256 × 4,096", partial(_one, 128256, 4096)),
    )
}
"""The most telling first. qwen3-30b-a3b is the mixture of experts with thousands of tensors: 18,867, 393 a layer."""
