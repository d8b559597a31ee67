"""Running `fusedopt train` in a test: small, on the CPU, into folders of its own."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from fusedopt import cli
from fusedopt.train import metrics

SMALL = "--device cpu --hidden-size 16 --num-layers 1 --num-heads 2 --max-seq-len 16 --batch-size 4".split()
TEXT = json.__file__.replace("__init__", "decoder")
"""A real text of twelve kilobytes that every Python has."""


class Result(NamedTuple):
    status: int
    out: str
    err: str


class Train:
    """Runs the command in this process, into folders of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys

    def __call__(self, *args: object, out: str = "run", text: str | None = TEXT) -> Result:
        source = ["--text", text] if text else []
        with pytest.raises(SystemExit) as exit:
            cli.main(["train", *SMALL, "--out", str(self.folder / out), *source, *map(str, args)])
        captured = self._capsys.readouterr()
        assert isinstance(exit.value.code, int)
        return Result(exit.value.code, captured.out, captured.err)

    def rows(self, out: str = "run") -> list[dict[str, Any]]:
        return metrics.read(self.folder / out)

    def state(self, out: str = "run") -> dict[str, Any]:
        return torch.load(self.folder / out / "checkpoint.pt")


def equal(a: Any, b: Any) -> bool:
    """Bit equality of nested state."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def reproducible(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what a clock measured."""
    return [{k: v for k, v in row.items() if not k.endswith(("_ms", "_per_s"))} for row in rows]


def assert_refused(result: Result, message: str) -> None:
    assert result.status == 2
    assert message in result.err and result.err.count("\n") == 1 and result.err.startswith("fusedopt: ")
