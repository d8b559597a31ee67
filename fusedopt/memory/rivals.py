"""AdamW of other packages, from the formats that they publish: bytes per element, and how they fill blocks.

Only arithmetic: none of them is imported or run here. Each takes the model wholly in its own parameter dtype.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from .held import Memory

Moment = Callable[[int], tuple[int, int]]
"""Elements of a parameter → bytes of one of its two moments, and of the scales and tables that belong to it."""

MIN_BLOCKED = 4096
"""Elements from which on bitsandbytes and torchao quantise."""

TABLE = 256 * 4
"""Bytes of a table of 256 fp32 values."""


def plain(width: int) -> Moment:
    """A number of ``width`` bytes for each element."""
    return lambda n: (width * n, 0)


def flash(n: int) -> tuple[int, int]:
    """8-bit codes and an fp16 scale for every 32 elements, whatever the size of the parameter."""
    return n, 2 * ceil(n / 32)


def bitsandbytes(n: int) -> tuple[int, int]:
    """8-bit codes and an fp32 scale for every 256 elements; small parameters in fp32."""
    return (n, 4 * ceil(n / 256)) if n >= MIN_BLOCKED else (4 * n, 0)


def torchao(width: int, bits: int, block: int, table: int) -> Moment:
    """Codes of ``bits``, an fp32 scale for every ``block`` elements and a table of values of its own; parameters that
    are small or that blocks do not fill in the parameter's dtype, of ``width`` bytes.
    """

    def moment(n: int) -> tuple[int, int]:
        if n < MIN_BLOCKED or n % block:
            return width * n, 0
        return n * bits // 8, 4 * n // block + table

    return moment


@dataclass(frozen=True)
class Package:
    """Where a format comes from. format: in words. source: package and version, or commit, and file."""

    name: str
    format: str
    source: str


@dataclass(frozen=True)
class Rival:
    """A published format. weights, gradients, master: bytes per element. counter: of each parameter's step count where
    it is kept on the device. shared: of tables that all parameters share.
    """

    package: Package
    variant: str
    weights: int
    gradients: int
    moment: Moment
    master: int = 0
    counter: int = 0
    shared: int = 0

    @property
    def name(self) -> str:
        """Package and variant."""
        return f"{self.package.name}, {self.variant}"

    def memory(self, params: Iterable[Tensor]) -> Memory:
        """What it holds for parameters of these shapes; their dtypes do not matter."""
        params = list(params)
        sizes = [p.numel() for p in params if p.requires_grad]
        moments = [self.moment(n) for n in sizes]
        codes, scales = (sum(column) for column in zip(*moments, strict=True)) if moments else (0, 0)
        count = sum(p.numel() for p in params)
        return Memory(
            parameters=count,
            trainable=sum(sizes),
            tensors=len(params),
            weights=self.weights * count,
            gradients=self.gradients * sum(sizes),
            state={"exp_avg": codes, "exp_avg_sq": codes},
            scales=2 * scales + (self.shared if scales else 0),
            masters=self.master * sum(sizes),
            counters=self.counter * len(sizes),
        )


TORCH = Package("torch fused", "moments in the parameter's dtype", "torch.optim.AdamW(fused=True)")
APEX = Package(
    "apex FusedAdam", "fp32 copy of the weights, fp32 moments", "NVIDIA/apex, FusedAdam(master_weights=True)"
)
MEGATRON = Package(
    "Megatron-LM", "fp32 gradients, copy and moments; unsharded", "NVIDIA/Megatron-LM, dist_optimizer.md"
)
OPTIMI = Package("optimi", "compensation and moments in bf16", "warner-benjamin/optimi 0.3.3, adam.py")
SPLIT = Package("bf16_fused_adam", "low halves of the weights, bf16 moments", "imoneoi/bf16_fused_adam at 6637534")
FLASH = Package(
    "FlashAdamW", "8 or 16 bits beside a weight; 8-bit moments, fp16 scale per 32", "databricks/flashoptim 0.1.3"
)
BNB = Package(
    "bitsandbytes 8bit",
    "8-bit moments, fp32 scale per 256; fp32 below 4096 elements",
    "bitsandbytes 0.50, optimizer.py",
)
AO = Package(
    "torchao", "8-, 4-bit, FP8 moments, fp32 scale per 256, 128, 256; plain below 4096", "pytorch/ao at 36027d8, optim"
)

RIVALS = (
    Rival(TORCH, "fp32", 4, 4, plain(4), counter=4),
    Rival(TORCH, "bf16", 2, 2, plain(2), counter=4),
    Rival(APEX, "bf16, fp32 copy", 2, 2, plain(4), master=4),
    Rival(MEGATRON, "bf16, fp32 copy", 2, 4, plain(4), master=4),
    Rival(OPTIMI, "bf16, Kahan", 2, 2, plain(2), master=2),
    Rival(SPLIT, "bf16, 16 + 16", 2, 2, plain(2), master=2, counter=4),
    Rival(FLASH, "bf16, 32-bit", 2, 2, flash, master=2),
    Rival(FLASH, "bf16, 24-bit", 2, 2, flash, master=1),
    Rival(FLASH, "bf16, no master", 2, 2, flash),
    Rival(FLASH, "fp32", 4, 4, flash),
    Rival(BNB, "fp32", 4, 4, bitsandbytes, shared=2 * TABLE),
    Rival(BNB, "bf16", 2, 2, bitsandbytes, shared=2 * TABLE),
    Rival(AO, "8-bit, bf16", 2, 2, torchao(2, 8, 256, TABLE)),
    Rival(AO, "FP8, bf16", 2, 2, torchao(2, 8, 256, 0)),
    Rival(AO, "4-bit, bf16", 2, 2, torchao(2, 4, 128, TABLE // 16)),
)
"""AdamW elsewhere."""
