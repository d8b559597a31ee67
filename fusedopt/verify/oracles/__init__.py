"""Oracles, one file per rule: every file here defines ``ORACLE``, and a new one is found by itself."""

from __future__ import annotations

import importlib
import pkgutil

from ..oracle import Configuration, Oracle

ORACLES: dict[str, Oracle] = {
    oracle.rule: oracle
    for oracle in (importlib.import_module(f"{__name__}.{file.name}").ORACLE for file in pkgutil.iter_modules(__path__))
}
"""Rule name → oracle."""

CONFIGURATIONS: tuple[Configuration, ...] = tuple(c for oracle in ORACLES.values() for c in oracle.configurations)
"""Every row that `fusedopt verify` runs by default."""
