"""Peak memory of a training step with and without gradient release: ``python -m perf.studies.release``.

Each case runs in a process of its own: a stack of square bf16 layers, two steps of AdamW (split8 weights, int8
state), one thread. Peak memory is the process's own (maximum resident set) beyond what it had before the first backward
pass; on a GPU, torch's count.
"""

import argparse
import json
import resource
import subprocess
import sys

import torch

import fusedopt


def peak(release: bool, layers: int, width: int) -> dict[str, float]:
    """MiB: of weights, of gradients if all were there, and the peak that a run adds to what the model takes."""
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
    model = model.to(device, torch.bfloat16)
    optimizer = fusedopt.AdamW(
        model.parameters(), master_weights="split8", state_dtype="int8", release_gradients=release
    )
    optimizer.materialize_state()
    x = torch.randn(8, width, device=device, dtype=torch.bfloat16)
    before = _used(device)
    for _ in range(2):
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = sum(p.nbytes for p in model.parameters()) / 2**20
    return {"weights": weights, "gradients": weights, "peak": _used(device) - before}


def _used(device: str) -> float:
    """MiB at most so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main() -> None:
    """Run both cases and print them."""
    parser = argparse.ArgumentParser(description="Peak memory with and without gradient release.")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--case", choices=("release", "plain"), help="run one case here and print it as JSON")
    chosen = parser.parse_args()
    if chosen.case:
        print(json.dumps(peak(chosen.case == "release", chosen.layers, chosen.width)))
        return
    for case in ("plain", "release"):
        size = ["--layers", str(chosen.layers), "--width", str(chosen.width)]
        command = [sys.executable, "-m", "perf.studies.release", "--case", case, *size]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        sizes = ", ".join(f"{name} {size:.0f} MiB" for name, size in row.items())
        print(f"{case:8} {sizes} more")


if __name__ == "__main__":
    main()
