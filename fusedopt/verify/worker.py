"""The process behind `backends.Worker`: runs cells on the Triton backend and hands the results over in .npz files.

Called with one JSON argument (device, cells, source, seeds, folder). Prints one JSON line per cell, as soon as it is
done: ``{"file", "layout"}`` or ``{"error"}``. Whether the kernels are interpreted is up to the environment.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fusedopt_kernels import numerics
from fusedopt_kernels.interpreter import patch_language_once

from . import backends, kept, own
from .backends import Failure, attempt, guarded, pack
from .problem import build, configuration
from .subjects import Outcome


def main(job: dict[str, Any], answers: TextIO) -> None:
    """Run all cells of a job and write the answers."""
    if numerics.INTERPRETED:
        patch_language_once()
    for number, run in enumerate(_runs(job)):
        try:
            layout, arrays = pack(run())
        except Failure as failure:
            answer: dict[str, Any] = {"error": str(failure)}
        else:
            path = Path(job["folder"]) / f"{number}.npz"
            with open(path, "wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
            answer = {"file": str(path), "layout": layout}
        print(json.dumps(answer), file=answers, flush=True)


def _runs(job: dict[str, Any]) -> Iterator[Callable[[], list[Outcome]]]:
    """What computes each cell."""
    seeds, device = job["seeds"], job["device"]
    if job["source"] == backends.DTYPES:
        for rule, name, dtype in job["cells"]:
            problems = [build(configuration(rule, name), dtype, seed) for seed in seeds]
            yield lambda problems=problems: attempt("triton", device, problems)
    elif job["source"] == backends.FORMATS:
        for names in job["cells"]:
            kept_cell = kept.cell(*names)
            yield lambda cell=kept_cell: guarded(lambda: [kept.run(cell, seed, "triton", device) for seed in seeds])
    else:
        rule = own.load(job["source"])
        for label, dtype in job["cells"]:
            cell = own.Cell(rule, label, dtype)
            yield lambda cell=cell: guarded(lambda: [cell.run(seed, "triton", device) for seed in seeds])


if __name__ == "__main__":
    output, sys.stdout = sys.stdout, sys.stderr  # nothing else may get between the answers
    main(json.loads(sys.argv[1]), output)
