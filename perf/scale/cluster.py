"""GPUs in nodes, and the time of collectives among them: assumptions, each with its source. Nothing was measured."""

from dataclasses import dataclass
from math import ceil, log2

BF16 = 2
"""Bytes of an element that `fully_shard` gathers or reduces under MixedPrecisionPolicy(param_dtype=torch.bfloat16)."""


@dataclass(frozen=True)
class Cluster:
    """per_node: GPUs of a node. nvlink, network: bytes per second of a GPU, one way. reached: share of both that large
    collectives reach. flops: dense bf16 operations per second of a GPU; mfu: share of them that a model's 6·N·tokens
    reach. The rest: seconds of NCCL's own cost model, before the first hop, for a hop inside a node and between nodes.
    """

    per_node: int = 8
    nvlink: float = 450e9
    network: float = 50e9
    reached: float = 0.8
    flops: float = 989e12
    mfu: float = 0.4
    tree: tuple[float, float, float] = (6.8e-6, 0.6e-6, 5.0e-6)
    ring: tuple[float, float, float] = (8.4e-6, 3.4e-6, 14.0e-6)

    def nodes(self, world: int) -> int:
        """That so many ranks fill."""
        return ceil(world / self.per_node)

    def all_reduce(self, world: int) -> float:
        """Seconds of an all-reduce of a few bytes: up a tree and down again."""
        begin, inside, between = self.tree
        local = min(world, self.per_node) - 1
        return begin + 2 * (local * inside + log2(self.nodes(world)) * between) if world > 1 else 0.0

    def ring_latency(self, world: int) -> float:
        """Seconds that one all-gather or reduce-scatter takes however few bytes it moves."""
        begin, inside, between = self.ring
        crossings = self.nodes(world) - 1
        return begin + (world - 1 - crossings) * inside + crossings * between if world > 1 else 0.0

    def gathering(self, world: int, moved: float) -> float:
        """Seconds in which so many bytes, as large as the whole, are gathered or reduced and scattered.

        Every GPU takes what the others have through its NVLink. A node takes what the other nodes have through all its
        network cards, once.
        """
        inside = (world - 1) / world * moved / self.nvlink
        between = max(world - self.per_node, 0) / world * moved / (self.per_node * self.network)
        return max(inside, between) / self.reached

    def compute(self, parameters: int, tokens: float) -> float:
        """Seconds of forward and backward for so many tokens on this GPU; attention's own products are left out."""
        return 6 * parameters * tokens / (self.flops * self.mfu)


SOURCES = (
    ("GPUs of a node", "8", "NVIDIA HGX H100 and H200"),
    ("NVLink of a GPU, one way", "450 GB/s", "data sheets of H100 and H200 SXM: 900 GB/s both ways"),
    ("network card of a GPU, one way", "50 GB/s", "DGX H100 and H200 user guides: eight ConnectX-7, 400 Gb/s NDR"),
    ("share of both that collectives reach", "80 %", "assumed"),
    ("dense bf16 of a GPU", "989 TFLOP/s", "data sheets of H100 and H200 SXM: 1,979 with sparsity"),
    ("share of it that 6 · parameters · tokens reach", "40 %",
     "assumed; 38 to 43 % are reported of Llama 3 405B (Llama Team, 2024)"),
    ("all-reduce of a few bytes", "6.8 µs + 2 · (0.6 µs · 7 + 5.0 µs · log₂ nodes)",
     "NCCL 2.28, src/graph/tuning.cc, Tree and LL"),
    ("all-gather, reduce-scatter, however short", "8.4 µs + 3.4 µs a hop in a node, 14.0 µs between nodes",
     "the same, Ring and Simple"),
)  # fmt: skip
"""What is assumed, for the page."""
