"""What a study needs of `fusedopt train`: settings checked, and a run with them. Tests put others in their place."""

from ..train.job import validated
from ..train.session import run

__all__ = ["run", "validated"]
