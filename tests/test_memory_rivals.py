"""Built-in model shapes against published parameter counts, and other packages' formats against what they hold."""

import copy
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn

from fusedopt.memory.rivals import RIVALS, Rival
from fusedopt.shapes import MODELS

BY_NAME = {rival.name: rival for rival in RIVALS}

PUBLISHED = {
    "gpt2": (124_439_808, 148),
    "llama3.2-1b": (1_235_814_400, 146),  # the model card's 1.23 billion
    "llama3-8b": (8_030_261_248, 291),
    "llama3-70b": (70_553_706_496, 723),
    "resnet50": (25_557_032, 161),  # torchvision's own count
    "vit-h-14": (632_045_800, 392),  # as above
    "mixtral-8x7b": (46_702_792_704, 995),
    "qwen3-30b-a3b": (30_532_122_624, 18_867),  # published as 30.5 billion
}


@pytest.mark.parametrize("name", MODELS)
def test_models_have_as_many_parameters_as_published(name: str) -> None:
    count, tensors = PUBLISHED[name]
    parameters = MODELS[name].parameters(torch.bfloat16)
    assert sum(p.numel() for p in parameters.values()) == MODELS[name].count == count
    assert len(parameters) == tensors
    assert all(p.is_meta and p.requires_grad and p.dtype == torch.bfloat16 for p in parameters.values())
    assert set(MODELS) == set(PUBLISHED)


def test_resnets_blocks_are_bottlenecks() -> None:
    """The first of each stage projects what it adds; batch norms have two vectors of the convolution's outputs."""
    shapes = MODELS["resnet50"].shapes()
    assert shapes["layer1.0.downsample.0.weight"] == (256, 64, 1, 1)
    assert shapes["layer4.2.conv2.weight"] == (512, 512, 3, 3) and shapes["layer4.2.bn3.bias"] == (2048,)
    assert sum("downsample.0" in name for name in shapes) == 4 and shapes["fc.weight"] == (1000, 2048)


def test_a_tied_head_stands_once() -> None:
    shapes = MODELS["llama3.2-1b"].shapes()
    assert shapes["model.embed_tokens.weight"] == (128256, 2048) and "lm_head.weight" not in shapes
    assert shapes["model.layers.15.self_attn.k_proj.weight"] == (512, 2048)


def test_experts_are_matrices_of_their_own() -> None:
    shapes = MODELS["mixtral-8x7b"].shapes()
    assert shapes["model.layers.31.block_sparse_moe.experts.7.w2.weight"] == (4096, 14336)
    assert MODELS["qwen3-30b-a3b"].shapes()["model.layers.47.mlp.experts.127.down_proj.weight"] == (2048, 768)


def sizes(*numbers: int) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(n, device="meta")) for n in numbers]


# Bytes per parameter as these packages document them or as their allocations add up, on a model whose every matrix
# fills whole blocks.
BYTES = {
    "torch fused, fp32": 16, "torch fused, bf16": 8, "apex FusedAdam, bf16, fp32 copy": 16,
    "Megatron-LM, bf16, fp32 copy": 18, "optimi, bf16, Kahan": 10, "bf16_fused_adam, bf16, 16 + 16": 10,
    "FlashAdamW, bf16, 32-bit": 8.125, "FlashAdamW, bf16, 24-bit": 7.125, "FlashAdamW, bf16, no master": 6.125,
    "FlashAdamW, fp32": 10.125, "bitsandbytes 8bit, fp32": 10 + 8 / 256, "bitsandbytes 8bit, bf16": 6 + 8 / 256,
    "torchao, 8-bit, bf16": 6 + 8 / 256, "torchao, FP8, bf16": 6 + 8 / 256, "torchao, 4-bit, bf16": 5 + 8 / 128,
}  # fmt: skip


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.name)
def test_bytes_per_parameter_are_the_published_ones(rival: Rival) -> None:
    memory = rival.memory(sizes(*[2**26] * 4))
    # Step counts and tables of values: 2 of 1 KiB at most for each tensor.
    beside = memory.counters + (2 * 1024 * 4 if memory.scales else 0)
    assert memory.total == pytest.approx(BYTES[rival.name] * memory.parameters, abs=beside)
    assert set(BY_NAME) == set(BYTES)


@pytest.mark.parametrize(
    ("name", "numel", "codes", "scales"),
    [
        ("bitsandbytes 8bit, bf16", 4095, 4 * 4095, 0),
        ("bitsandbytes 8bit, bf16", 4096, 4096, 4 * 16 + 1024),  # two tables for two moments, shared by all
        ("bitsandbytes 8bit, bf16", 4097, 4097, 4 * 17 + 1024),
        ("FlashAdamW, bf16, 24-bit", 1, 1, 2),
        ("FlashAdamW, bf16, 24-bit", 33, 33, 4),
        ("torchao, 8-bit, bf16", 4095, 2 * 4095, 0),
        ("torchao, 8-bit, bf16", 4097, 2 * 4097, 0),  # the last block is not full
        ("torchao, 8-bit, bf16", 4352, 4352, 4 * 17 + 1024),
        ("torchao, FP8, bf16", 4352, 4352, 4 * 17),
        ("torchao, 4-bit, bf16", 4224, 2112, 4 * 33 + 64),
        ("torchao, 4-bit, bf16", 4225, 2 * 4225, 0),
        ("torch fused, bf16", 7, 14, 0),
    ],
)
def test_small_and_odd_parameters_follow_each_packages_rule(name: str, numel: int, codes: int, scales: int) -> None:
    memory = BY_NAME[name].memory(sizes(numel))
    assert memory.state == {"exp_avg": codes, "exp_avg_sq": codes}
    assert memory.scales == 2 * scales


def test_tables_that_parameters_share_count_once() -> None:
    name = "bitsandbytes 8bit, fp32"
    assert BY_NAME[name].memory(sizes(4096, 4096)).scales == 2 * 2 * 4 * 16 + 2 * 1024
    assert BY_NAME["torchao, 8-bit, bf16"].memory(sizes(4096, 4096)).scales == 2 * 2 * (4 * 16 + 1024)


def test_frozen_parameters_have_weights_alone() -> None:
    trained, frozen = sizes(4096, 100)
    frozen.requires_grad_(False)
    for rival in RIVALS:
        one, both = rival.memory([trained]), rival.memory([trained, frozen])
        assert both.total - one.total == 100 * rival.weights
        assert rival.memory([frozen]).total == 100 * rival.weights


def real(optimizer: torch.optim.Optimizer, params: list[nn.Parameter]) -> int:
    """Bytes that a step of another package's optimizer leaves allocated, but for numbers that stay on the host."""
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    states = [
        value
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and key != "step"
    ]
    held: list[Any] = [*states, *params, *(p.grad for p in params)]
    return sum(t.untyped_storage().nbytes() for t in held)


@pytest.mark.parametrize(
    ("name", "dtype"), [("torch fused, fp32", torch.float32), ("torch fused, bf16", torch.bfloat16)]
)
def test_torch_holds_what_its_row_says(name: str, dtype: torch.dtype) -> None:
    params = [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in ((64, 70), (5,), ())]
    theirs = torch.optim.AdamW(copy.deepcopy(params), fused=True)
    memory = BY_NAME[name].memory(params)
    assert real(theirs, theirs.param_groups[0]["params"]) == memory.total - memory.counters
    steps = [state["step"].nbytes for state in theirs.state.values()]
    assert memory.counters == sum(steps)


@pytest.mark.needs("torch-optimi>=0.3.3")
def test_optimi_holds_what_its_row_says() -> None:
    params = [nn.Parameter(torch.ones(shape, dtype=torch.bfloat16)) for shape in ((64, 70), (5,))]
    optimizer = import_module("optimi").AdamW(params, lr=1e-3, foreach=False)
    assert real(optimizer, params) == BY_NAME["optimi, bf16, Kahan"].memory(params).total
