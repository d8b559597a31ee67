"""What `fusedopt inspect` tells the user instead of a traceback."""

from __future__ import annotations


class BadInput(Exception):
    """The request cannot be answered. The message is one line: what is wrong, and what to do instead."""


class CannotFollow(Exception):
    """The emulator met something that it cannot decide. A count would be a guess, so there is none."""


class BadAccess(Exception):
    """A kernel reads or writes outside every tensor, or at an address that its width does not divide."""
