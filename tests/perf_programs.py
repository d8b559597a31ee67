"""Programs as `python -m perf --all` runs them, for its tests; none of them depends on how busy the machine is."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perf import results
from perf.stages import programs
from perf.stages.programs import Program

ROW = '{"kind": "copy", "gb_s": 1}'


def shell(script: str, name: str = "a program", seconds: float = 20.0, **more: Any) -> Program:
    return Program(name, ["sh", "-c", script], seconds, **more)


def stages(out: Path) -> dict[str, tuple[bool | None, str]]:
    return {row["name"]: (row["ok"], row["line"]) for row in results.read(out) if row["kind"] == "stage"}


def gone(pid: int) -> bool:
    """Dead, or a zombie that its new parent has not yet collected."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def says(path: Path, text: str) -> bool:
    return path.exists() and text in path.read_text()


def soon(condition: Callable[[], bool]) -> bool:
    """Wait for what a busy machine may do late."""
    end = time.monotonic() + 30  # before a `sleep 60` ends by itself
    while not (true := condition()) and time.monotonic() < end:
        time.sleep(0.01)
    return true


def clock(monkeypatch: pytest.MonkeyPatch, *signs: Callable[[], bool]) -> None:
    """For programs a second passes with each sign of life, and no time between them, however busy the machine is."""
    told = SimpleNamespace(monotonic=lambda: float(sum(sign() for sign in signs)), sleep=time.sleep)
    monkeypatch.setattr(programs, "time", told)
