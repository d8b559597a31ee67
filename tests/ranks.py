"""Several processes over gloo, for tests whose file is also the program that each of them runs."""

import subprocess
import sys
from pathlib import Path


def agree(file: str, tmp_path: Path, world: int = 2, *more: str) -> None:
    """Run ``file STORE RANK WORLD …`` for every rank; each must end well and say that all ranks agree."""
    command = [sys.executable, file, str(tmp_path / "store")]
    running = [
        subprocess.Popen(
            [*command, str(rank), str(world), *more], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for rank in range(world)
    ]
    said = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0] * world, "\n".join(said)
    assert all("all ranks agree" in text for text in said)
