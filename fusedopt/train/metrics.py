"""metrics.jsonl: one JSON object per step and run, appended while training, cut back when a run resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO

from .errors import BadInput
from .files import write_atomically

FILE_NAME = "metrics.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """The complete rows; a last line that a kill cut short is left out."""
    try:
        lines = (folder / FILE_NAME).read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


class MetricsLog:
    """Appends rows to `folder`. Opening it cuts the file back to `step`: later rows will be written again."""

    def __init__(self, folder: Path, step: int) -> None:
        kept = [row for row in read(folder) if row["step"] <= step] if step >= 0 else []
        write_atomically(folder / FILE_NAME, b"".join(_line(row) for row in kept))
        self._path = folder / FILE_NAME
        self._file: TextIO = self._path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Write one row."""
        self._guard(self._file.write, _line(row).decode())

    def flush(self, sync: bool = False) -> None:
        """Hand the rows to the system; with `sync`, on to the disk, as a checkpoint needs before it."""
        self._guard(self._file.flush)
        if sync:
            self._guard(os.fsync, self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self._guard(self._file.close)

    def _guard(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            raise BadInput(f"cannot write {self._path}: {error.strerror}") from None


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"
