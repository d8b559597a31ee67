"""Workers on one study: this process, or several at a time. A signal ends them after their runs' checkpoints."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

from ..train.errors import BadInput, Stopped
from ..train.loop import StopRequest
from .study import usable
from .worker import TRAINING, WAIT, Abandoned, Worker


class Ended(NamedTuple):
    """How work ended: by which signal, 0 if none; and why before all trials were done, "" if they are."""

    signal: int
    reason: str


def run(folder: Path, jobs: int, changed: Callable[[], None], training: str = TRAINING) -> Ended:
    """Work on the study of `folder` until its trials are taken. changed: called whenever there may be news."""
    if jobs > 1:
        return _together(folder, jobs, changed, training)
    with StopRequest() as stop:
        number = 0
        try:
            Worker(folder, training, changed, lambda: not stop.signal_number).work()
        except Abandoned:
            pass
        except Stopped as error:
            number = error.signal
    number = number or stop.signal_number
    return Ended(number, "stopped" if number else "")


def _together(folder: Path, jobs: int, changed: Callable[[], None], training: str) -> Ended:
    context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and the storage's connections
    threads = max(1, torch.get_num_threads() // jobs)
    workers = [context.Process(target=_member, args=(folder, training, threads, i)) for i in range(jobs)]
    asked = False
    with StopRequest() as stop:
        try:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: while a worker imports, Ctrl-C is ours
            for worker in workers:
                worker.start()
            signal.signal(signal.SIGINT, before)
            while alive := [worker for worker in workers if worker.is_alive()]:
                wait([worker.sentinel for worker in alive], timeout=WAIT)
                changed()
                if stop.signal_number and not asked:
                    asked = True
                    for worker in alive:
                        worker.terminate()
        finally:
            _end(workers)
    if asked:
        return Ended(stop.signal_number, "stopped")
    lost = [str(worker.exitcode) for worker in workers if worker.exitcode]
    return Ended(0, f"{len(lost)} of {jobs} workers died (exit status {', '.join(lost)})" if lost else "")


def _end(workers: Sequence[BaseProcess]) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()
        if worker.pid is not None:
            worker.join()


def _member(folder: Path, training: str, threads: int, index: int) -> None:
    """One of several workers; ends with its parent, also when that was killed."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(index % torch.cuda.device_count())
    parent = multiprocessing.parent_process()
    assert parent is not None
    with StopRequest() as stop:
        try:
            with usable(folder):
                Worker(folder, training, wanted=lambda: not stop.signal_number and parent.is_alive()).work()
        except (Abandoned, Stopped):
            pass
        except BadInput as error:
            print(f"fusedopt: {error}", file=sys.stderr)
            sys.exit(2)
