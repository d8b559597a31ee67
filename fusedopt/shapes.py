"""Parameter shapes of well-known models, computed from their published hyper-parameters. Nothing is downloaded.

Names and shapes are those of the implementation that ``source`` ends with. Tied parameters stand once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch

Shapes = dict[str, tuple[int, ...]]
"""Name → shape of every parameter."""


@dataclass(frozen=True)
class Model:
    """title: the model in words. source: of its hyper-parameters; and of its parameters' names."""

    title: str
    source: str
    shapes: Callable[[], Shapes]

    @property
    def count(self) -> int:
        """Number of parameters."""
        return sum(map(prod, self.shapes().values()))

    def parameters(self, dtype: torch.dtype = torch.float32) -> dict[str, torch.nn.Parameter]:
        """Parameters without memory, on the meta device, by name."""
        meta = torch.device("meta")
        return {
            name: torch.nn.Parameter(torch.empty(shape, dtype=dtype, device=meta))
            for name, shape in self.shapes().items()
        }


def _gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, positions: int = 1024) -> Shapes:
    """Linear weights as (in, out), which is how this model keeps them; the head is the embedding."""
    shapes: Shapes = {"transformer.wte.weight": (vocabulary, width), "transformer.wpe.weight": (positions, width)}
    block = {
        "ln_1": (width,), "attn.c_attn": (width, 3 * width), "attn.c_proj": (width, width),
        "ln_2": (width,), "mlp.c_fc": (width, 4 * width), "mlp.c_proj": (4 * width, width),
    }  # fmt: skip
    for layer in range(layers):
        for name, shape in block.items():
            shapes |= _with_bias(f"transformer.h.{layer}.{name}", shape, shape[-1])
    return shapes | _with_bias("transformer.ln_f", (width,), width)


def _with_bias(name: str, weight: tuple[int, ...], bias: int) -> Shapes:
    return {f"{name}.weight": weight, f"{name}.bias": (bias,)}


@dataclass(frozen=True)
class _Decoder:
    """A Llama-like decoder. feedforward: width of its MLP, or of one expert; experts: 0 for a dense model;
    expert: format of an expert's names; norm_heads: whether queries and keys are normalised.
    tied: whether the head is the embedding.
    """

    layers: int
    width: int
    feedforward: int
    heads: int
    kv_heads: int
    vocabulary: int
    head_width: int = 128
    experts: int = 0
    expert: tuple[str, tuple[str, str, str]] = ("mlp", ("gate_proj", "up_proj", "down_proj"))
    norm_heads: bool = False
    tied: bool = False

    def __call__(self) -> Shapes:
        shapes: Shapes = {"model.embed_tokens.weight": (self.vocabulary, self.width)}
        for layer in range(self.layers):
            shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in self._block().items()}
        shapes["model.norm.weight"] = (self.width,)
        return shapes if self.tied else shapes | {"lm_head.weight": (self.vocabulary, self.width)}

    def _block(self) -> Shapes:
        width, queries, keys = self.width, self.heads * self.head_width, self.kv_heads * self.head_width
        shapes: Shapes = {"self_attn.q_proj": (queries, width), "self_attn.k_proj": (keys, width)}
        shapes |= {"self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, queries)}
        if self.norm_heads:
            shapes |= {"self_attn.q_norm": (self.head_width,), "self_attn.k_norm": (self.head_width,)}
        home, (gate, up, down) = self.expert
        if self.experts:
            shapes[f"{home}.gate"] = (self.experts, width)
        for prefix in [f"{home}.experts.{i}" for i in range(self.experts)] or [home]:
            shapes |= {f"{prefix}.{gate}": (self.feedforward, width), f"{prefix}.{up}": (self.feedforward, width)}
            shapes[f"{prefix}.{down}"] = (width, self.feedforward)
        return shapes | {"input_layernorm": (width,), "post_attention_layernorm": (width,)}


def _vit(layers: int = 32, width: int = 1280, patch: int = 14, patches: int = 256, classes: int = 1000) -> Shapes:
    shapes: Shapes = {"class_token": (1, 1, width)} | _with_bias("conv_proj", (width, 3, patch, patch), width)
    shapes["encoder.pos_embedding"] = (1, patches + 1, width)
    for layer in range(layers):
        block = f"encoder.layers.encoder_layer_{layer}"
        attention = f"{block}.self_attention"
        shapes |= _with_bias(f"{block}.ln_1", (width,), width)
        shapes |= {f"{attention}.in_proj_weight": (3 * width, width), f"{attention}.in_proj_bias": (3 * width,)}
        shapes |= _with_bias(f"{attention}.out_proj", (width, width), width)
        shapes |= _with_bias(f"{block}.ln_2", (width,), width)
        shapes |= _with_bias(f"{block}.mlp.0", (4 * width, width), 4 * width)
        shapes |= _with_bias(f"{block}.mlp.3", (width, 4 * width), width)
    shapes |= _with_bias("encoder.ln", (width,), width)
    return shapes | _with_bias("heads.head", (classes, width), classes)


def _resnet50(classes: int = 1000) -> Shapes:
    """Convolutions without bias, each with a batch norm; bottlenecks are four times as wide outside."""
    shapes: Shapes = {"conv1.weight": (64, 3, 7, 7)} | _with_bias("bn1", (64,), 64)
    inputs = 64
    for stage, (blocks, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), 1):
        for block in range(blocks):
            home, outputs = f"layer{stage}.{block}", 4 * width
            kernels = ((width, inputs, 1, 1), (width, width, 3, 3), (outputs, width, 1, 1))
            for number, kernel in enumerate(kernels, 1):
                shapes[f"{home}.conv{number}.weight"] = kernel
                shapes |= _with_bias(f"{home}.bn{number}", kernel[:1], kernel[0])
            if block == 0:
                shapes[f"{home}.downsample.0.weight"] = (outputs, inputs, 1, 1)
                shapes |= _with_bias(f"{home}.downsample.1", (outputs,), outputs)
            inputs = outputs
    return shapes | _with_bias("fc", (classes, inputs), classes)


MODELS = {
    "gpt2": Model(
        "GPT-2 124M, head tied to the embedding",
        "Radford et al. (2019), Table 2 and the published configuration; transformers' GPT2LMHeadModel",
        _gpt2,
    ),
    "llama3.2-1b": Model(
        "Llama 3.2 1B, head tied to the embedding",
        "Meta (2024), the published configuration; transformers' LlamaForCausalLM",
        _Decoder(
            layers=16, width=2048, feedforward=8192, heads=32, kv_heads=8, vocabulary=128256, head_width=64, tied=True
        ),
    ),
    "llama3-8b": Model(
        "Llama 3 8B",
        "Llama Team (2024), The Llama 3 Herd of Models, Table 3; transformers' LlamaForCausalLM",
        _Decoder(layers=32, width=4096, feedforward=14336, heads=32, kv_heads=8, vocabulary=128256),
    ),
    "llama3-70b": Model(
        "Llama 3 70B",
        "Llama Team (2024), The Llama 3 Herd of Models, Table 3; transformers' LlamaForCausalLM",
        _Decoder(layers=80, width=8192, feedforward=28672, heads=64, kv_heads=8, vocabulary=128256),
    ),
    "resnet50": Model(
        "ResNet-50, head of 1000 classes", "He et al. (2016), Table 1; torchvision's resnet50", _resnet50
    ),
    "vit-h-14": Model(
        "ViT-H/14 for 224 × 224 images, head of 1000 classes",
        "Dosovitskiy et al. (2021), Table 1; torchvision's vit_h_14",
        _vit,
    ),
    "mixtral-8x7b": Model(
        "Mixtral 8x7B: 8 experts a layer, each of 3 matrices",
        "Jiang et al. (2024), Mixtral of Experts, Table 1; transformers 4's MixtralForCausalLM",
        _Decoder(
            layers=32, width=4096, feedforward=14336, heads=32, kv_heads=8, vocabulary=32000, experts=8,
            expert=("block_sparse_moe", ("w1", "w3", "w2")),
        ),
    ),
    "qwen3-30b-a3b": Model(
        "Qwen3-30B-A3B: 128 experts a layer, each of 3 matrices",
        "Yang et al. (2025), Qwen3 Technical Report, Table 2, and the published configuration; transformers 4's "
        "Qwen3MoeForCausalLM",
        _Decoder(
            layers=48, width=2048, feedforward=768, heads=32, kv_heads=4, vocabulary=151936, experts=128,
            norm_heads=True,
        ),
    ),
}  # fmt: skip
"""Built-in models by the name that commands take."""
