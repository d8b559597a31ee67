"""Rows of results that nobody measured: for tests of what is made of rows."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
HOST = {"cpu": "Invented CPU", "cores": 2, "threads": 2, "torch": "2.13.0"}
GPU = {**HOST, "gpu": "Invented H200", "driver": "1.2.3"}
SIZES = {"llama3.2-1b": (146, 10**9), "gpt2": (148, 10**8), "tiny-1000": (1000, 10**6), "tiny-10000": (10000, 10**6)}


def made(kind: str, machine: Row = HOST, **fields: Any) -> Row:
    return {"kind": kind, **fields, "machine": machine, "commit": "abc1234", "dirty": False}


def around(x: float, noise: float = 0.01) -> Row:
    return {"p20": x * (1 - noise), "median": x, "p80": x * (1 + noise)}


def job(case: str, form: str, work: str, contender: str) -> Row:
    tensors, elements = SIZES[case]
    about: Row = {"device": "cuda", "case": case, "part": "whole", "tensors": tensors, "elements": elements}
    return {**about, "format": form, "work": work, "graph": False, "contender": contender}


def timed(case: str, form: str, work: str, contender: str, ms: float, **more: Any) -> Row:
    """A measured row of the GPU that does not exist."""
    host = around(300.0 if contender == "fusedopt" else 1200.0)
    times = {"device_ms": around(ms), "host_us": host, "wall_ms": around(2 * ms), "rounds": 30}
    counted = {"launches": 3, "bytes": 32.0, "bytes_from": "counted", "gb_s": 4000.0, "ceiling_gb_s": 4300.0}
    held = {"share": 0.93, "held_bytes": 2**34, "peak_bytes": 2**35}
    return made("measured", GPU, **job(case, form, work, contender), **times, **counted, **held, **more)


def measured() -> list[Row]:
    found = []
    for case in SIZES:
        found += [
            timed(case, "fp32", "clip", "fusedopt", 8.0),
            timed(case, "fp32", "clip", "torch fused", 12.0, ratio=around(0.64), ratio_wall=around(0.2)),
            timed(case, "fp32", "clip", "torch foreach", 30.0, ratio=around(0.25), ratio_wall=around(0.1)),
        ]
    return found


def without_gpu() -> list[Row]:
    found = [
        made("host", case="gpt2", device="cpu", tensors=n, work=work, contender=who, host_us=around(n * each),
             format="fp32", **({} if who == "fusedopt" else {"ratio": around(1.5 / each)}))
        for n in (148, 1000) for work in ("step", "clip") for who, each in (("fusedopt", 1.5), ("torch fused", 4.5))
    ]  # fmt: skip
    for arch in ("sm_80", "sm_90"):
        for kernel, moved, chunk in (("update", 28.0, "full"), ("update", 28.0, "tail"), ("norm", 4.0, "full")):
            found.append(made(
                "code", format="fp32", work="clip", arch=arch, kernel=kernel, chunk=chunk, launches=3, registers=55,
                spills=0, bytes=moved, instructions=21.5, widths=[128],
            ))  # fmt: skip
    for who, each in (("fusedopt", 7.777), ("torch fused", 9.876)):
        found += [made("predicted", **job(case, "fp32", "clip", who), device_ms=each, wall_ms=each, bytes=32.0)
                  for case in SIZES]  # fmt: skip
    cpu = {
        **job("gpt2", "fp32", "step", "fusedopt"),
        "device": "cpu",
        "device_ms": around(70.0),
        "wall_ms": around(70.0),
    }
    found += [
        made("measured", **cpu),
        made("measured", **{**cpu, "contender": "torch fused", "device_ms": around(35.0)}, ratio=around(2.0)),
        made("compile", format="fp32", work="clip", arch="sm_90", cold_s=1.25, warm_s=0.02),
        made("missing", contender="apex FusedAdam", install="build apex"),
        made("red", contender="torch foreach", case="gpt2", format="fp32", work="step", why="wrong result: off by 1"),
    ]
    return found


REST = [
    made("copy", GPU, device="cuda", gb_s=4300.0),
    made("train", GPU, contender="fusedopt", format="fp32", tokens_per_s=around(123456.0), peak_bytes=2**33),
    made("first", GPU, contender="fusedopt", format="fp32", work="clip", cold_s=3.5, warm_s=0.4),
    made("stage", GPU, name="GPU tests", ok=False, seconds=60.0, line="1 failed"),
    made("tune", GPU, format="fp32", row="fp32", name="warps 8", chunk=16384, case="gpt2", device_ms=around(1.0)),
    made("tune", format="fp32", row="fp32", name="warps 16", arch="sm_90", registers=40),
]


def written(path: Path, found: Iterable[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in found))
    return path


def everything() -> list[Row]:
    return [*without_gpu(), *measured(), *REST]
