"""What `fusedopt train` tells the user instead of a traceback."""

from __future__ import annotations


class BadInput(Exception):
    """The user's input cannot be used. The message is one line: what is wrong, and what to do instead."""


class Diverged(Exception):
    """The loss is no longer finite. The message names the step."""
