"""A model of the user's own, made on the meta device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fusedopt.inspect.errors import BadInput
from fusedopt.verify.own import _from_file, _from_module


def load(target: str) -> torch.nn.Module:
    """The model that ``package.module:NAME`` or ``FILE.py:NAME`` makes when called without arguments.

    Raises:
        BadInput: there is no such thing, it raises, or it makes something else.
    """
    home, colon, name = target.rpartition(":")
    if not (home and colon and name):
        raise BadInput(f"--module takes package.module:NAME or FILE.py:NAME, not {target!r}")
    try:
        made: Any = getattr(_from_file(Path(home)) if home.endswith(".py") else _from_module(home), name)
        if not isinstance(made, torch.nn.Module):
            with torch.device("meta"):
                made = made()
    except Exception as error:  # whatever the user's code raises
        text = " ".join(f"{type(error).__name__}: {error}".split())
        raise BadInput(f"cannot make the model {target!r}: {text}") from error
    if not isinstance(made, torch.nn.Module):
        raise BadInput(f"{target!r} makes a {type(made).__name__}, not a torch.nn.Module")
    return made
