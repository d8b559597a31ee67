"""The folder of a study: `study.db`, Optuna's SQLite storage, and `trials/0007`, a run each; and who works on what.

Locks are of the system (`flock`): it drops them when a process ends, however it ends. `.lock` is held while a trial is
chosen, `trials/0007/.claim` while it runs. So a trial that is running and not claimed was interrupted.
"""

from __future__ import annotations

import fcntl
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TextIO

import optuna
from optuna.trial import FrozenTrial
from sqlalchemy.exc import SQLAlchemyError

from ..train.errors import BadInput
from .plan import Plan

FILE_NAME = "study.db"
STUDY_NAME = "fusedopt tune"
TRIALS = "trials"
CLAIM = ".claim"
RESULTS = ("best.json", "history.png", "importance.png", "slices.png")

optuna.logging.set_verbosity(optuna.logging.WARNING)


def check_folder(folder: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to bury an earlier study, and to resume what is not there."""
    if resume and overwrite:
        raise BadInput("--resume continues a study, --overwrite starts it anew: choose one")
    path = folder / FILE_NAME
    if resume and not path.exists():
        raise BadInput(f"--resume: {folder} holds no study")
    if path.exists() and not (resume or overwrite):
        raise BadInput(f"{folder} already holds a study: add --resume or --overwrite, or choose another --out")


def create(folder: Path, plan: Plan, overwrite: bool) -> None:
    """A new study in `folder`. The file appears when all of it is there."""
    try:
        (folder / TRIALS).mkdir(parents=True, exist_ok=True)
        with choosing(folder):
            check_folder(folder, False, overwrite)  # another process may have been first
            _clear(folder)
            temporary = folder / f".{FILE_NAME}.tmp"
            temporary.unlink(missing_ok=True)
            storage = _storage(temporary)
            study = optuna.create_study(storage=storage, study_name=STUDY_NAME, direction=plan.direction)
            study.set_user_attr("plan", plan.as_dict())
            storage.engine.dispose()
            temporary.replace(folder / FILE_NAME)
    except OSError as error:
        raise BadInput(f"cannot write to output folder {folder}: {error.strerror}") from None


def _clear(folder: Path) -> None:
    trials = [path.parent for path in sorted((folder / TRIALS).glob(f"*/{CLAIM}"))]
    for trial in trials:
        if (claimed := claim(trial)) is None:
            raise BadInput(f"{trial} is being trained by another process: end that first")
        claimed.close()
    for name in (FILE_NAME, *RESULTS):
        (folder / name).unlink(missing_ok=True)
    for trial in trials:
        shutil.rmtree(trial)


def load(folder: Path) -> tuple[optuna.Study, Plan]:
    """The study of `folder`. BadInput when the file is damaged or something else."""
    path = folder / FILE_NAME
    remedy = "delete it, or choose another --out"
    try:
        # Looked at from outside first: Optuna would add its tables to anything.
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as probe:
            sound = probe.execute("PRAGMA quick_check").fetchall() == [("ok",)]
            names = [name for (name,) in probe.execute("SELECT study_name FROM studies")]
        if not sound:
            raise BadInput(f"study {path} is damaged: {remedy}")
        if names != [STUDY_NAME]:
            raise BadInput(f"{path} is not a study of fusedopt tune: {remedy}")
        study = optuna.load_study(storage=_storage(path), study_name=STUDY_NAME)
        return study, Plan(**study.user_attrs["plan"])
    except sqlite3.OperationalError as error:
        what = "is not a study of fusedopt tune" if "no such table" in str(error) else f"cannot be read ({error})"
        raise BadInput(f"{path} {what}: {remedy}") from None
    except (sqlite3.DatabaseError, SQLAlchemyError, optuna.exceptions.StorageInternalError):
        raise BadInput(f"study {path} is damaged: {remedy}") from None
    except (KeyError, TypeError, ValueError, RuntimeError) as error:  # RuntimeError: Optuna's, for other versions
        reason = " ".join(str(error).split())
        raise BadInput(f"study {path} does not fit this version ({reason}): {remedy}") from None


def update(folder: Path, plan: Plan) -> None:
    """Record another number of trials."""
    study, _ = load(folder)
    with usable(folder):
        study.set_user_attr("plan", plan.as_dict())


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Around reading and writing a study: BadInput when that fails, because the disk is full, say."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise BadInput(f"cannot use {folder / FILE_NAME}: {reason}") from None


@contextmanager
def choosing(folder: Path) -> Iterator[None]:
    """One process at a time."""
    try:
        file = (folder / ".lock").open("a")
    except OSError as error:
        raise BadInput(f"cannot write to output folder {folder}: {error.strerror}") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def claim(folder: Path) -> TextIO | None:
    """Take a trial's folder until the file is closed or the process ends; None when another process has it."""
    folder.mkdir(exist_ok=True)
    file = (folder / CLAIM).open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def outcome(trial: FrozenTrial) -> tuple[str, str]:
    """How a finished trial ended, "complete", "repeated", "pruned", "diverged" or "failed", and why."""
    ended = trial.user_attrs.get("ended", {"outcome": "failed", "reason": "ended by another program"})
    return ended["outcome"], ended["reason"]


def results(study: optuna.Study) -> list[FrozenTrial]:
    """The finished trials."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def trial_folder(folder: Path, number: int) -> Path:
    """Where a trial's run is."""
    return folder / TRIALS / f"{number:04d}"


def _storage(path: Path) -> optuna.storages.RDBStorage:
    """SQLite waits up to a minute for another process's write."""
    return optuna.storages.RDBStorage(f"sqlite:///{path.absolute()}", engine_kwargs={"connect_args": {"timeout": 60}})
