"""What `fusedopt train` tells the user instead of a traceback."""

from __future__ import annotations


class BadInput(Exception):
    """The user's input cannot be used. The message is one line: what is wrong, and what to do instead."""


class Diverged(Exception):
    """The loss is no longer finite. The message names the step, which `step` is."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class Stopped(Exception):
    """A signal, whose number is `signal`, has ended a run after a checkpoint."""

    def __init__(self, signal: int) -> None:
        super().__init__("stopped")
        self.signal = signal


class Lost(Exception):
    """Another rank has ended in mid-training. The message names this one."""


class Reported(Exception):
    """What rank 0 tells the user about; status: with which all ranks exit."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status
