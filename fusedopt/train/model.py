"""A decoder-only Transformer language model over bytes.

Pre-norm blocks, rotary positions, causal self-attention, GELU feed-forward of 4 × the hidden size, no biases, output
layer tied to the embedding: the usual small GPT. The tied weight and the two kinds of parameters (matrices, norm
gains) are also what an optimizer meets in practice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


def rotary_table(length: int, head_size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each (length, head_size / 2), of position × 10000^(−2i / head_size)."""
    frequency = 10000.0 ** (-torch.arange(0, head_size, 2, dtype=torch.float64) / head_size)
    angle = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + half]) of the last dimension. Su et al. 2021, arXiv:2104.09864, eq. 34."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class Attention(nn.Module):
    """Causal multi-head self-attention over (batch, time, hidden)."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (batch, time, 3, head, size)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            rotate(query, cos, sin), rotate(key, cos, sin), value, dropout_p=dropout, is_causal=True
        )
        return self.out(y.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Attention, then feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, bias=False)
        self.attention = Attention(hidden_size, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(hidden_size, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size, bias=False),
            nn.GELU(),
            nn.Linear(4 * hidden_size, hidden_size, bias=False),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), cos, sin))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Transformer(nn.Module):
    """Bytes (batch, time) in, mean cross-entropy in nats per byte out; labels are smoothed in training mode only."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, hidden_size: int, num_layers: int, num_heads: int, max_seq_len: int, dropout: float,
        label_smoothing: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.label_smoothing = label_smoothing
        self.embedding = nn.Embedding(VOCABULARY, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, bias=False)
        self.head = nn.Linear(hidden_size, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        cos, sin = rotary_table(max_seq_len, hidden_size // num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise(num_layers)

    def _initialise(self, num_layers: int) -> None:
        """Normal with deviation 0.02; layers that write to the residual stream are smaller by √(2 · layers)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers) if residual else 0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.dropout(self.embedding(tokens))
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.norm(x))
        if logits.dtype != torch.float64:
            logits = logits.float()
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=smoothing)
