"""Running `fusedopt tune` in a test: with a stand-in for training, or small runs on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import tune_stub
from optuna.trial import FrozenTrial
from train_command import Result

from fusedopt import cli
from fusedopt.tune import plot, study, training


class Tune:
    """Runs the command in this process, into a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder / "study", capsys

    def __call__(self, *args: object, out: Path | None = None) -> Result:
        with pytest.raises(SystemExit) as exit:
            cli.main(["tune", "--out", str(out or self.folder), *map(str, args)])
        captured = self._capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, captured.out, captured.err)

    def trials(self) -> list[FrozenTrial]:
        return study.load(self.folder)[0].get_trials(deepcopy=False)

    def outcomes(self) -> list[str]:
        return [study.outcome(trial)[0] for trial in self.trials()]

    def starts(self, number: int) -> list[int]:
        """Where a trial's run was started, each time: at a validation, or -1."""
        return [int(line) for line in (study.trial_folder(self.folder, number) / "starts").read_text().splitlines()]


def use_stub(monkeypatch: pytest.MonkeyPatch, plots: bool = False) -> None:
    """Let trials be runs of `tune_stub`, and draw nothing unless asked to: that takes longer than all the rest."""
    monkeypatch.setattr(training, "run", tune_stub.run)
    monkeypatch.setattr(training, "validated", tune_stub.validated)
    if not plots:
        monkeypatch.setattr(plot, "plot_study", lambda *_: {})


def same(a: list[FrozenTrial], b: list[FrozenTrial]) -> bool:
    """Whether two studies made the same trials, with the same results."""

    def seen(trial: FrozenTrial) -> Any:
        return trial.params, trial.state, trial.value, trial.intermediate_values

    return [seen(trial) for trial in a] == [seen(trial) for trial in b]
