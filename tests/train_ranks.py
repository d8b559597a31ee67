"""Running `fusedopt train` many times in processes that torchrun could have started."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import distributed
from train_command import SMALL, Result, assert_refused

from fusedopt import cli
from fusedopt.train import checkpoint, parallel, text
from fusedopt.train.job import Job
from fusedopt.train.parallel import Ranks
from fusedopt.train.stopping import Stopping
from fusedopt.train.trainer import Trainer


class Rank:
    """One of several processes that share a folder; runs the command in it."""

    def __init__(self, store: str, number: int, world: int) -> None:
        self.folder, self.number, self.world = Path(store).parent, number, world
        values = (str(number), str(number), str(world), "localhost", "0")
        os.environ.update(zip(parallel.VARIABLES, values, strict=True))
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=number, world_size=world)
        parallel.dist.init_process_group = lambda *_: None  # one group for all commands
        parallel.dist.destroy_process_group = lambda: None
        parallel.time.sleep = lambda _: None

    def __call__(self, *args: object, out: str, text: str | None = "text.py", silent: bool = True) -> Result:
        source = ["--text", self.folder / text] if text else []
        words = ["train", *SMALL, *source, "--out", self.folder / out, *args]
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()) as error:
            try:
                cli.main(list(map(str, words)))
            except SystemExit as exit:
                assert isinstance(exit.code, int)
                result = Result(exit.code, said.getvalue(), error.getvalue())
        if self.number and silent:
            assert not (result.out or result.err), "only rank 0 prints"
        return result

    def done(self, *args: object, out: str, text: str | None = "text.py") -> Result:
        """A run that must end well."""
        result = self(*args, out=out, text=text)
        assert result.status == 0, result.err
        return result

    def refused(self, message: str, *args: object, out: str = "refused", text: str = "text.py") -> None:
        """A run that every rank must refuse, rank 0 with a message."""
        result = self(*args, out=out, text=text)
        assert result.status == 2
        if self.number == 0:
            assert_refused(result, message)

    def move(self, source: str, target: str, mode: str) -> None:
        """Read a checkpoint as ranks of this mode do, and write one as they do."""
        folder, ranks = self.folder / target, Ranks(mode, self.number, self.world, self.number)
        trainer = restored(self.folder / source, ranks)
        folder.mkdir(exist_ok=True)
        job = Job(trainer.config, trainer.task, folder, {}, None, [], ranks)
        checkpoint.save(job, trainer.steps_done, {"fusedopt": trainer}, Stopping(0).state_dict())


def restored(folder: Path, ranks: Ranks) -> Trainer:
    """A trainer that has read the checkpoint of a folder."""
    saved = checkpoint.load(folder)
    assert saved is not None
    trainer = Trainer(saved["config"], "fusedopt", text.load(saved["config"].text), ranks)
    checkpoint.restore(trainer, saved, folder)
    return trainer


@contextlib.contextmanager
def during_step(number: int, action: Callable[[], object]) -> Iterator[None]:
    """Do something at the beginning of a training step."""
    step = Trainer.step

    def wrapped(self: Trainer, measure: bool = False) -> Any:
        if self.steps_done + 1 == number:
            action()
        return step(self, measure)

    Trainer.step = wrapped
    try:
        yield
    finally:
        Trainer.step = step


def interrupt() -> None:
    """What a second Ctrl-C does."""
    raise KeyboardInterrupt
