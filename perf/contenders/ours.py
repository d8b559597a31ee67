"""fusedopt.AdamW: norm, clipping, unscaling and the decision to skip are options of the step."""

from typing import Any

import fusedopt
from perf.contenders.base import Contender, Setup, Step, table
from perf.work import ADAMW, MAX_NORM

OPTIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"master_weights": "split16"},
    "half": {"master_weights": "split16", "state_dtype": "bfloat16", "state_rounding": "stochastic"},
    "int8": {"master_weights": "split8", "state_dtype": "int8"},
}


def make(setup: Setup) -> Step:
    """The step, with `fusedopt.GradScaler` for scaled work."""
    optimizer = build(setup)
    if not setup.work.scaled:
        return optimizer.step
    scaler = fusedopt.GradScaler(setup.device.type, init_scale=setup.scale)
    scaler.scale(setup.params[0].new_ones(()))  # it makes its tensors then

    def step() -> None:
        scaler.step(optimizer)
        scaler.update()

    return step


def build(setup: Setup, **options: Any) -> Any:
    """The optimizer of a setup."""
    clip = {"clip_grad_norm": MAX_NORM} if setup.work.clip else {}
    return fusedopt.AdamW(setup.params, **ADAMW, **OPTIONS[setup.form.name], **clip, **options)


FUSEDOPT = Contender(
    "fusedopt",
    "fusedopt",
    "this package",
    make,
    {
        "fp32": "fp32 moments",
        "bf16": "split16 weights (fp32 to the bit), fp32 moments",
        "half": "split16 weights (fp32 to the bit), bf16 moments rounded at random",
        "int8": "split8 weights, int8 moments with a scale per 64",
    },
    devices=("cuda", "cpu"),
    graph=True,
    tolerances={"half": 1e-2},
    traffic=table(
        {
            ("fp32", "step"): 28.0, ("fp32", "clip"): 32.0, ("fp32", "amp"): 32.0,
            ("bf16", "step"): 26.0, ("bf16", "clip"): 28.0, ("bf16", "amp"): 28.0,
            ("half", "step"): 18.0, ("half", "clip"): 20.0, ("half", "amp"): 20.0,
            ("int8", "step"): 12.19, ("int8", "clip"): 14.19, ("int8", "amp"): 14.19,
        },
        "counted",
    ),
)  # fmt: skip
