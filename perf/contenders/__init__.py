"""Who takes part. ``base.py``: what each must tell. ``ours.py``, ``torch_optim.py``, ``packages.py``: the entries."""

from perf.contenders.base import Contender, Setup, Step
from perf.contenders.ours import FUSEDOPT
from perf.contenders.packages import PACKAGES
from perf.contenders.torch_optim import TORCH

CONTENDERS: dict[str, Contender] = {c.name: c for c in (FUSEDOPT, *TORCH, *PACKAGES)}
"""By name, ours first."""

__all__ = ["CONTENDERS", "FUSEDOPT", "Contender", "Setup", "Step"]
