"""Oracles, one file per rule. A new rule adds its file, a line here, and its entries in `bounds.py`."""

from __future__ import annotations

from ..oracle import Configuration, Oracle
from . import adam, adamw, sgd

ORACLES: dict[str, Oracle] = {oracle.rule: oracle for oracle in (adam.ORACLE, adamw.ORACLE, sgd.ORACLE)}
"""Rule name → oracle."""

CONFIGURATIONS: tuple[Configuration, ...] = tuple(c for oracle in ORACLES.values() for c in oracle.configurations)
"""Every row that `fusedopt verify` runs by default."""
