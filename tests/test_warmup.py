"""`optimizer.warmup()` under torch.distributed: the lowest local rank compiles first; others wait, but not for ever."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this build of torch has no distributed")

RANK = """
import os, sys, time
import torch, fusedopt
from fusedopt_kernels import launch

rank, folder, fails = int(os.environ["LOCAL_RANK"]), sys.argv[1], sys.argv[2] == "fails"
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)


class Logs(launch.Recorder):
    def prepare(self, spec, args):
        if rank == 0:
            time.sleep(0.3)  # time enough for another rank that does not wait
            if fails:
                raise OSError("the compiler is gone")
        with open(f"{folder}/order", "a") as file:
            file.write(str(rank))
        return 1


p = torch.nn.Parameter(torch.ones(3))
optimizer = fusedopt.AdamW([p], backend="triton")
optimizer._launcher = Logs()
try:
    print(optimizer.warmup()[0])
except OSError as error:
    print(error)
assert not optimizer.state
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize(("how", "order"), [("works", "0011"), ("fails", "11")])
def test_the_lowest_local_rank_compiles_first(how: str, order: str, tmp_path: Path) -> None:
    paths = os.pathsep.join(filter(None, sys.path))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), how],
            env={**os.environ, "PYTHONPATH": paths, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (1, 0)
    ]
    try:
        done = [process.communicate(timeout=120) for process in ranks]
    finally:
        for process in ranks:  # a rank that waits for ever, when something is wrong
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], done
    assert (tmp_path / "order").read_text() == order
    assert [out for out, _ in done] == ["2\n", "2\n" if how == "works" else "the compiler is gone\n"]
