"""One step of AdamW in several formats, of LAMB and of Muon over tensors of odd sizes and offsets, small enough for
NVIDIA's compute-sanitizer: ``python -m perf.stages.sanitize --tool memcheck``; without ``--tool`` the steps alone.
"""

import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch

import fusedopt
from perf.contenders.ours import OPTIONS
from perf.stages.programs import Program, Verdict, alone, module
from perf.work import FORMATS

TOOLS = ("memcheck", "racecheck")
PADDING = 2**16
"""Bytes between allocations: as many as a chunk has, so that what runs off one tensor does not reach another."""

STEPS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    **{f"AdamW {name}": ("AdamW", FORMATS[name].dtype, options) for name, options in OPTIONS.items()},
    "AdamW split8 int4": (
        "AdamW", torch.bfloat16, {"master_weights": "split8", "state_dtype": "int4", "state_rounding": "stochastic"},
    ),
    "AdamW kahan float8": ("AdamW", torch.bfloat16, {"master_weights": "kahan", "state_dtype": "float8"}),
    "AdamW stochastic uint8": (
        "AdamW", torch.bfloat16, {"master_weights": "stochastic", "state_dtype": {"exp_avg_sq": "uint8"}},
    ),
    "LAMB": ("LAMB", torch.float32, {}),
    "Muon": ("Muon", torch.float32, {"adamw": {}}),
}  # fmt: skip
"""By name: class, dtype of parameters, options."""

SHAPES = ((), (0,), (1,), (3,), (16384,), (16385,), (70001,), (64, 128), (63, 67), (1, 5003), (4099, 1), (5, 9, 101))
"""Empty, one element, a chunk and one more, several chunks; rows that are no whole groups of quantised state."""


def steps(device: str) -> None:
    """Make them all.

    Raises:
        ArithmeticError: a parameter is not finite afterwards.
    """
    for name, (cls, dtype, options) in STEPS.items():
        params = parameters(dtype, device)
        getattr(fusedopt, cls)(params, lr=1e-3, clip_grad_norm=1.0, **options).step()
        if device == "cuda":
            torch.cuda.synchronize()
        if not all(bool(torch.isfinite(p.detach().cpu()).all()) for p in params):
            raise ArithmeticError(f"{name}: a parameter is not finite")
        print(name, flush=True)


def parameters(dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    """With gradients. Every shape twice: at the start of its memory and one element further; both end where it does.

    Made on the CPU: under the tool each kernel costs time.
    """
    generator = torch.Generator().manual_seed(0)

    def made(shape: tuple[int, ...], skipped: int) -> torch.Tensor:
        size = torch.Size(shape).numel()
        drawn = torch.randn(skipped + size, generator=generator).mul_(0.1).to(dtype)
        return drawn.to(device)[skipped:].view(shape)

    params = []
    for shape in SHAPES:
        for skipped in (0, 1):
            p = torch.nn.Parameter(made(shape, skipped))
            p.grad = made(shape, skipped)
            params.append(p)
    return params


def program(tool: str, seconds: float) -> Program | None:
    """The steps under one of `TOOLS`; None where compute-sanitizer is not installed.

    Without torch's cache of memory, so that the tool knows each tensor's bounds.
    """
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if found is None:
        return None
    padding = ["--padding", str(PADDING)] if tool == "memcheck" else []
    under = [found, "--tool", tool, "--error-exitcode", "99", *padding]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Program(f"sanitizer: {tool}", [*under, *module("perf.stages.sanitize")], seconds, uncached, judge)


def judge(status: int, output: str) -> Verdict:
    """Of the tool's summary. None where it does not work, as on some virtual machines."""
    refused = re.search(r"Device not supported.*", output)
    if refused:
        return Verdict(None, f"the tool does not work here: {refused[0]}")
    summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) .*", output)
    lines = [line.lstrip("= ") for line in output.splitlines() if "SUMMARY:" in line]
    last = lines[-1] if lines else (output.strip().splitlines() or [f"exit status {status}"])[-1]
    return Verdict(status == 0 and bool(summaries) and set(summaries) == {"0"}, last)


@click.command("perf.stages.sanitize", help=__doc__)
@click.option("--tool", type=click.Choice(TOOLS), help="Run under this tool.")
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), default=600.0, show_default=True)
def main(tool: str | None, device: str, seconds: float) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise click.UsageError("torch sees no GPU here; --device cpu runs the steps without the tool")
    if tool is None:
        return steps(device)
    chosen = program(tool, seconds)
    if chosen is None:
        raise click.UsageError("compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin")
    with tempfile.TemporaryDirectory() as folder:
        ended = alone(chosen, Path(folder))
    print(ended.output, end="")
    print(ended.verdict.line)
    sys.exit(0 if ended.verdict.ok else 1)


if __name__ == "__main__":
    main()
