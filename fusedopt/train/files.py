"""Files that are whole or not there."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import BadInput


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`: at any moment, also after a power cut, it holds the old or the new bytes."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None
