"""The process behind `backends.Worker`: runs cells on the Triton backend and hands the results over in .npz files.

Called with one JSON argument (device, cells, seeds, folder). Prints one JSON line per cell, as soon as it is done:
``{"file", "layout"}`` or ``{"error"}``. Whether the kernels are interpreted is up to the environment.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from .backends import Failure, attempt, pack
from .problem import build, configuration


def main(job: dict[str, Any], answers: TextIO) -> None:
    """Run all cells of a job and write the answers."""
    for number, (rule, name, dtype) in enumerate(job["cells"]):
        problems = [build(configuration(rule, name), dtype, seed) for seed in job["seeds"]]
        try:
            layout, arrays = pack(attempt("triton", job["device"], problems))
        except Failure as failure:
            answer: dict[str, Any] = {"error": str(failure)}
        else:
            path = Path(job["folder"]) / f"{number}.npz"
            with open(path, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            answer = {"file": str(path), "layout": layout}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    output, sys.stdout = sys.stdout, sys.stderr  # nothing else may get between the answers
    main(json.loads(sys.argv[1]), output)
