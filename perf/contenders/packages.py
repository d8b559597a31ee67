"""AdamW of other packages, each with the options and the surroundings that its documentation names for the work.

Nothing is imported before a contender is built. All decay by lr · weight_decay, decoupled, as torch's AdamW does. What
has no clipping of its own is clipped by torch's foreach `clip_grad_norm_`. pytorch_optimizer's ``AdamW`` is torch's;
the package's own is ``FlashAdamW``. Traffic of compiled code is derived as if the compiler made one kernel of it.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch

from perf.contenders.around import Clip, Steps, traffic
from perf.contenders.base import Contender, Setup, Step
from perf.contenders.torch_optim import COPIED, MOST_COMPILED, PLAIN
from perf.work import ADAMW

EVERYWHERE = ("cuda", "cpu")
Options = Mapping[str, Mapping[str, Any]]
"""By format: arguments beside `ADAMW`."""


def of(module: str, name: str, options: Options | None = None, copied: bool = False) -> Callable[[Setup], Step]:
    """Makes a step of ``module.name``. copied: bf16 parameters are stepped as fp32 copies."""

    def make(setup: Setup) -> Step:
        cls, own = getattr(import_module(module), name), (options or {}).get(setup.form.name, {})
        return Steps(setup, lambda p: cls(p, **ADAMW, **own), copied=copied and setup.form.name == "bf16").step

    return make


# CUDA kernels over lists of tensors --------------------------------------------------------------------------------


def apex(setup: Setup) -> Step:
    """Captured, it is the kernel that reads lr, step and loss scale on the device, with torch's clipping: apex's waits
    for the norm. Its master weights are of fp16 only.
    """
    cls = import_module("apex.optimizers").FusedAdam
    own: dict[str, Any] = {}
    if not setup.graph:
        own["clip"] = import_module("apex.contrib.clip_grad").clip_grad_norm_

    def build(params: Sequence[torch.Tensor]) -> Any:
        return cls(params, **ADAMW, adam_w_mode=True, capturable=setup.graph)

    return Steps(setup, build, copied=setup.form.name == "bf16", unscales=_in_kernel(setup), **own).step


def transformer_engine(remainders: bool) -> Callable[[Setup], Step]:
    """fp32 masters of bf16 weights, or the 16 bits that those lack; only the former can be captured."""

    def make(setup: Setup) -> Step:
        package = import_module("transformer_engine.pytorch.optimizers")
        masters = setup.form.name == "bf16"
        own = {"master_weights": masters, "store_param_remainders": masters and remainders, "capturable": setup.graph}

        def build(params: Sequence[torch.Tensor]) -> Any:
            return package.FusedAdam(params, **ADAMW, adam_w_mode=True, **own)

        return Steps(setup, build, clip=_engine_clip(package), unscales=_in_kernel(setup)).step

    return make


def _engine_clip(package: Any) -> Clip:
    """Norm and scaling by the package's kernels, without a wait, as Megatron-LM calls them."""

    def clip(params: Sequence[torch.Tensor], max_norm: float) -> None:
        grads = [p.grad for p in params if p.grad is not None]
        flag = torch.zeros(1, dtype=torch.int, device=grads[0].device)
        norm, _ = package.multi_tensor_applier(package.multi_tensor_l2norm, flag, [grads], False)
        factor = (max_norm / (norm + 1e-6)).clamp_max_(1.0)
        package.multi_tensor_applier(package.multi_tensor_scale_tensor, flag, [grads, grads], factor)

    return clip


def _in_kernel(setup: Setup) -> bool:
    """Whether the step unscales: apex and Transformer Engine do so in what can be captured. torch warns of how it hands
    them its scaler.
    """
    if setup.graph and setup.work.scaled:
        warnings.filterwarnings("ignore", message="GradScaler is going to stop passing itself", category=FutureWarning)
    return setup.graph


# Triton, compiled and eager ----------------------------------------------------------------------------------------


def optimi(setup: Setup) -> Step:
    """Triton kernels on a GPU, else torch operations for each tensor."""
    cls, triton = import_module("optimi").AdamW, setup.device.type != "cpu"
    kahan = setup.form.name == "half"
    return Steps(setup, lambda p: cls(p, **ADAMW, kahan_sum=kahan, triton=triton, foreach=False)).step


FLASH: Options = {
    "fp32": {"quantize": False, "master_weight_bits": None},
    "half": {"quantize": False, "master_weight_bits": 32},
    "int8": {"quantize": True, "master_weight_bits": 24},
}
HEAVYBALL: Options = {
    "fp32": {"consume_grad": False},
    "bf16": {"consume_grad": False, "param_ecc": "bf16+16"},
}

NEAREST = "bf16 weights rounded to nearest, "
BF16_MOMENTS = {"half": 1e-2}
APEX = (
    "git clone https://github.com/NVIDIA/apex && cd apex && "
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation ."
)
ENGINE = "pip install --no-build-isolation 'transformer_engine[pytorch]>=2.14'"


def _torchao(name: str, moments: str, step: float, **others: Any) -> Contender:
    whole = "; bf16 moments where blocks are not whole"
    return Contender(
        f"torchao {name}", "torchao", "pip install torchao", of("torchao.optim", name),
        {"int8": NEAREST + moments + whole}, devices=EVERYWHERE, traffic=traffic(int8=step), **others,
    )  # fmt: skip


PACKAGES: tuple[Contender, ...] = (
    # Its CUDA extension: without it, and in PyPI's unrelated "apex", there is no FusedAdam.
    Contender("apex FusedAdam", "amp_C", APEX, apex, COPIED, graph=True, traffic=traffic(copied=True, fp32=28)),
    Contender("Transformer Engine FusedAdam", "transformer_engine", ENGINE, transformer_engine(remainders=False),
              {**PLAIN, "bf16": "fp32 masters beside bf16 weights, fp32 moments"}, graph=True,
              traffic=traffic(fp32=28, bf16=28)),
    Contender("Transformer Engine FusedAdam, remainders", "transformer_engine", ENGINE,
              transformer_engine(remainders=True),
              {"bf16": "bf16 weights and the 16 bits that they lack of fp32, fp32 moments"}, traffic=traffic(bf16=26)),
    Contender("DeepSpeed FusedAdam", "deepspeed", "pip install deepspeed (its kernel is built by nvcc on first use)",
              of("deepspeed.ops.adam", "FusedAdam", {form: {"adam_w_mode": True} for form in COPIED}, copied=True),
              COPIED, traffic=traffic(copied=True, fp32=28)),
    Contender("FlashOptim FlashAdamW", "flashoptim", "pip install flashoptim",
              of("flashoptim", "FlashAdamW", FLASH),
              {**PLAIN, "half": "bf16 weights with 16 bits of correction, bf16 moments",
               "int8": "bf16 weights with 8 bits of correction, int8 moments with a scale per 32"},
              traffic=traffic(fp32=28, half=18, int8=12.25), tolerances=BF16_MOMENTS),
    Contender("bitsandbytes AdamW", "bitsandbytes", "pip install bitsandbytes",
              of("bitsandbytes.optim", "AdamW", copied=True), COPIED, devices=EVERYWHERE,
              traffic=traffic(copied=True, fp32=28)),
    Contender("bitsandbytes AdamW8bit", "bitsandbytes", "pip install bitsandbytes",
              of("bitsandbytes.optim", "AdamW8bit"),
              {"int8": NEAREST + "8-bit moments with a scale per 256; fp32 moments below 4,096 elements"},
              devices=EVERYWHERE, traffic=traffic(int8=10.06)),
    Contender("torchao _AdamW, stochastic rounding", "torchao", "pip install torchao",
              of("torchao.optim", "_AdamW", {"half": {"bf16_stochastic_round": True}}),
              {"half": "bf16 weights rounded at random, bf16 moments"}, devices=EVERYWHERE, traffic=traffic(half=14),
              tolerances=BF16_MOMENTS),
    _torchao("AdamW8bit", "8-bit moments with a scale per 256", 10.06),
    _torchao("AdamW4bit", "4-bit moments with a scale per 128", 8.13, tolerances={"int8": 0.25}),
    _torchao("AdamWFp8", "e4m3 moments with a scale per 256", 10.06),
    Contender("optimi AdamW", "optimi", "pip install torch-optimi", optimi,
              {**PLAIN, "half": "bf16 weights with a bf16 Kahan sum, bf16 moments"}, devices=EVERYWHERE,
              traffic=traffic(fp32=28, half=18), tolerances=BF16_MOMENTS),
    Contender("HeavyBall AdamW", "heavyball", "pip install 'heavyball>=3'", of("heavyball", "AdamW", HEAVYBALL),
              {**PLAIN, "bf16": "bf16 weights with 16 bits of correction, fp32 moments"}, devices=EVERYWHERE,
              traffic=traffic(fp32=28, bf16=26), most_tensors=MOST_COMPILED, tolerances={"fp32": 5e-4}),
    Contender("pytorch_optimizer FlashAdamW", "pytorch_optimizer", "pip install 'pytorch_optimizer>=4.1'",
              of("pytorch_optimizer", "FlashAdamW",
                 {"fp32": {"quantize": False, "foreach": True}, "half": FLASH["half"], "int8": FLASH["int8"]}),
              {**PLAIN, "half": "bf16 weights with 16 bits of correction, bf16 moments; eager",
               "int8": "bf16 weights with 8 bits of correction, int8 moments with a scale per 32; eager"},
              devices=EVERYWHERE, traffic=traffic(fp32=88), tolerances=BF16_MOMENTS),
)  # fmt: skip
"""Tolerances of their own. bf16 moments: 2⁻⁹ of each, beside the 2.4e-3 of weights rounded once; rounding at random in
three steps is √6 of that. 4-bit: neighbours on the first moment's map are a quarter of the largest apart. HeavyBall:
max(√v, ε) for √v + ε, which clipped gradients near zero show.
"""
