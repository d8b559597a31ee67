"""Running `fusedopt compare` in a test: with stubbed runs unless `real`, on a tiny text job."""

from pathlib import Path
from typing import Any

import pytest
from stub_runs import StubRuns
from train_command import TEXT, Result, assert_refused

from fusedopt import cli
from fusedopt.compare import results
from fusedopt.train import session

TINY = "--task text --device cpu --hidden-size 16 --num-layers 1 --num-heads 2 --max-seq-len 16 --batch-size 4".split()
__all__ = ["TINY", "Compare", "Result", "assert_refused"]


class Compare:
    """Runs the command in this process, into a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.folder, self._capsys, self._patch = folder, capsys, patch
        self.stub(StubRuns())

    def stub(self, runs: StubRuns) -> StubRuns:
        """Let `runs` stand in for training."""
        self.session = runs
        self._patch.setattr(session, "run", runs)
        return runs

    def __call__(self, *args: object, out: str = "out") -> Result:
        with pytest.raises(SystemExit) as exit:
            cli.main(["compare", *TINY, "--text", TEXT, "--out", str(self.folder / out), *map(str, args)])
        captured = self._capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, captured.out, captured.err)

    def rows(self, out: str = "out") -> list[dict[str, Any]]:
        return results.read(self.folder / out / results.FILE_NAME)
