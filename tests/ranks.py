"""Several processes over gloo, for tests whose file is also the program that each of them runs."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

from torch import distributed

from fusedopt_kernels.interpreter import patch_language_once

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_language_once()


def agree(file: str, tmp_path: Path, world: int = 2, *more: str) -> None:
    """Run ``file STORE RANK WORLD …`` for every rank; each must end well and say that all ranks agree."""
    command = [sys.executable, file, str(tmp_path / "store")]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(world), *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0] * world, "\n".join(said)
    assert all("all ranks agree" in text for text in said)


def finish() -> NoReturn:
    """What each rank ends with: all are here, and nothing is torn down.

    Threads of collectives may outlive the process group in caches of torch, and then end the process with an abort.
    """
    distributed.barrier()
    print("all ranks agree", flush=True)
    time.sleep(0.2)  # the others may still be in the barrier
    os._exit(0)
