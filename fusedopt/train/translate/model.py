"""An encoder–decoder Transformer. Vaswani et al. 2017, arXiv:1706.03762.

As in the language model of `train.model`: norms before each layer, rotary positions, GELU feed-forward of 4 × the
hidden size, no biases. One embedding serves both languages and the output. Attention from the translation to the source
is rotated too, by the position in each: words keep much of their order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..model import rotary_table, rotate
from .batches import IGNORED
from .tokens import PAD

KeysValues = tuple[Tensor, Tensor]
"""Each (batch, head, time, size)."""
Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of the positions at hand."""


class Attention(nn.Module):
    """Multi-head attention over (batch, time, hidden)."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.query = nn.Linear(hidden_size, hidden_size, bias=False)
        self.key_value = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def keys_values(self, x: Tensor, rotary: Rotary) -> KeysValues:
        """Of what is looked at."""
        key, value = self.key_value(x).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return rotate(key, *rotary), value

    def forward(
        self, x: Tensor, rotary: Rotary, keys_values: KeysValues, mask: Tensor | None = None, causal: bool = False
    ) -> Tensor:
        """mask: True where a query may look, broadcastable to (batch, head, query, key)."""
        query = rotate(self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2), *rotary)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, *keys_values, attn_mask=mask, dropout_p=dropout, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(-2))


def feed_forward(hidden_size: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(hidden_size, 4 * hidden_size, bias=False),
        nn.GELU(),
        nn.Linear(4 * hidden_size, hidden_size, bias=False),
    )


class EncoderBlock(nn.Module):
    """Self-attention, then feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, bias=False)
        self.attention = Attention(hidden_size, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(hidden_size, bias=False)
        self.mlp = feed_forward(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Rotary, mask: Tensor) -> Tensor:
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention(y, rotary, self.attention.keys_values(y, rotary), mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Memory(NamedTuple):
    """The encoded source, its positions, and which of them are no padding."""

    encoded: Tensor
    rotary: Rotary
    mask: Tensor


@dataclass
class Past:
    """What a decoder block has computed for the tokens before: keys and values of them and of the source."""

    own: KeysValues | None = None
    source: KeysValues | None = None

    def extend(self, new: KeysValues) -> KeysValues:
        """Those of all tokens, once the new ones are known."""
        if self.own is not None:
            new = torch.cat((self.own[0], new[0]), 2), torch.cat((self.own[1], new[1]), 2)
        self.own = new
        return new


class DecoderBlock(nn.Module):
    """Causal self-attention, attention to the encoded source, feed-forward; norms and residuals as in the encoder."""

    def __init__(self, hidden_size: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size, bias=False)
        self.attention = Attention(hidden_size, num_heads, dropout)
        self.cross_norm = nn.LayerNorm(hidden_size, bias=False)
        self.cross = Attention(hidden_size, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(hidden_size, bias=False)
        self.mlp = feed_forward(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, rotary: Rotary, memory: Memory, past: Past | None = None) -> Tensor:
        """past: x is the token after those, the first one if it is empty, and is added to it."""
        y = self.attention_norm(x)
        own = self.attention.keys_values(y, rotary)
        own = own if past is None else past.extend(own)
        x = x + self.dropout(self.attention(y, rotary, own, causal=past is None))
        source = past.source if past and past.source else self.cross.keys_values(memory.encoded, memory.rotary)
        if past is not None:
            past.source = source
        x = x + self.dropout(self.cross(self.cross_norm(x), rotary, source, memory.mask))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


@dataclass
class Cache:
    """What decoding keeps from token to token: the encoded source, and the past of each decoder block."""

    pasts: list[Past]
    memory: Memory | None = None
    length: int = 0


@dataclass(frozen=True)
class Sizes:
    """num_layers: of the encoder, and as many of the decoder."""

    vocabulary: int
    hidden_size: int
    num_layers: int
    num_heads: int
    max_seq_len: int
    dropout: float
    label_smoothing: float


class Translator(nn.Module):
    """Ids (batch, time) of source and translation so far in; mean cross-entropy in nats per token out.

    `blocks`: the encoder's, then the decoder's.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.num_layers, self.label_smoothing = sizes.num_layers, sizes.label_smoothing
        arguments = sizes.hidden_size, sizes.num_heads, sizes.dropout
        self.embedding = nn.Embedding(sizes.vocabulary, sizes.hidden_size)
        self.dropout = nn.Dropout(sizes.dropout)
        encoder = [EncoderBlock(*arguments) for _ in range(sizes.num_layers)]
        decoder = [DecoderBlock(*arguments) for _ in range(sizes.num_layers)]
        self.blocks = nn.ModuleList([*encoder, *decoder])
        self.encoder_norm = nn.LayerNorm(sizes.hidden_size, bias=False)
        self.norm = nn.LayerNorm(sizes.hidden_size, bias=False)
        cos, sin = rotary_table(sizes.max_seq_len, sizes.hidden_size // sizes.num_heads)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """Normal; outputs of every matrix have the variance of its inputs, but for layers that write to a residual
        stream, 3 to a decoder block: together they add that.
        """
        for name, parameter in self.named_parameters():
            if parameter.ndim >= 2:
                writers = 3 * self.num_layers if name.endswith(("out.weight", "mlp.2.weight")) else 1
                nn.init.normal_(parameter, std=(parameter.shape[1] * writers) ** -0.5)

    def _encode(self, source: Tensor) -> Memory:
        mask = (source != PAD)[:, None, None]
        x, rotary = self.dropout(self.embedding(source)), self._rotary(0, source.shape[1])
        for block in self.blocks[: self.num_layers]:
            x = block(x, rotary, mask)
        return Memory(self.encoder_norm(x), rotary, mask)

    def _rotary(self, start: int, end: int) -> Rotary:
        return self.cos[start:end], self.sin[start:end]

    def forward(
        self, source: Tensor, inputs: Tensor, targets: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        """The loss; without targets the logits (batch, time, vocabulary).

        Labels are smoothed in training mode only. cache: `inputs` is the token after those that it holds.
        """
        memory = cache.memory if cache and cache.memory else self._encode(source)
        start, pasts = (cache.length, cache.pasts) if cache else (0, [None] * self.num_layers)
        x, rotary = self.dropout(self.embedding(inputs)), self._rotary(start, start + inputs.shape[1])
        for block, past in zip(self.blocks[self.num_layers :], pasts, strict=True):
            x = block(x, rotary, memory, past)
        if cache is not None:
            cache.memory, cache.length = memory, start + inputs.shape[1]
        logits = F.linear(self.norm(x), self.embedding.weight)
        if targets is None:
            return logits
        if logits.dtype != torch.float64:
            logits = logits.float()
        smoothing = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, label_smoothing=smoothing)
