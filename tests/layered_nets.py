"""Small networks with the names and the ties of real ones."""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.attn = nn.MultiheadAttention(4, 2)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))


class Bert(nn.Module):
    """Embeddings, encoder.layer.N, pooler, and an output layer tied to the embedding."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.embeddings = nn.ModuleDict({"word": nn.Embedding(9, 4), "position": nn.Embedding(5, 4)})
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(Layer() for _ in range(layers))
        self.encoder.final_norm = nn.LayerNorm(4)
        self.pooler = nn.Linear(4, 4)
        self.output = nn.Linear(4, 9)
        self.output.weight = self.embeddings["word"].weight  # pyright: ignore[reportAttributeAccessIssue] # an Embedding


class ViT(nn.Module):
    """Tokens of its own, patch_embed, blocks.N, norm, head."""

    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 4, 2)
        self.blocks = nn.ModuleList(Layer() for _ in range(layers))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
