"""Translating with a model: the likeliest token, again and again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batches import pad
from .model import Cache, Past, Translator
from .tokens import END, PAD, START

ROWS = 64


@torch.no_grad()
def translate(model: Translator, sources: Sequence[list[int]], limit: int) -> list[list[int]]:
    """Greedy translations of at most `limit` tokens, in the order of `sources`; ids without marks."""
    order = sorted(range(len(sources)), key=lambda i: len(sources[i]))
    translations: dict[int, list[int]] = {}
    for start in range(0, len(order), ROWS):
        rows = order[start : start + ROWS]
        source = pad([[*sources[i], END] for i in rows], PAD)
        translations.update(zip(rows, _greedy(model, source, limit), strict=True))
    return [translations[i] for i in range(len(sources))]


def _greedy(model: Translator, source: Tensor, limit: int) -> list[list[int]]:
    """Only `model.forward` is called, which under fsdp gathers the weights; all ranks call it equally often."""
    source = source.to(next(model.parameters()).device)
    cache = Cache([Past() for _ in range(model.num_layers)])
    newest = torch.full((len(source), 1), START, device=source.device)
    ended = torch.zeros_like(newest, dtype=torch.bool)
    translation: list[Tensor] = []
    while len(translation) < limit and not ended.all():
        logits = model(source, newest, cache=cache)
        newest = logits[..., END:].argmax(-1) + END  # padding and start are never an answer
        ended |= newest == END
        translation.append(newest)
    rows = torch.cat(translation, 1).tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]
