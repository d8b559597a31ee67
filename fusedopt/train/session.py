"""A run without a terminal, in this process: what `fusedopt compare` and `fusedopt tune` are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import loop, summary
from .config import TrainConfig
from .errors import Stopped
from .job import settle
from .parallel import ALONE

Watch = Callable[[list[dict[str, Any]]], None]


@dataclass(frozen=True)
class Finished:
    """Settings and summary.json of a run."""

    config: TrainConfig
    summary: dict[str, Any]


class _View:
    def __init__(self, watch: Watch | None) -> None:
        self._watch = watch

    def update(self, rows: list[dict[str, Any]]) -> None:
        """Hand on new rows of metrics.jsonl."""
        if self._watch is not None:
            self._watch(rows)


def run(settings: dict[str, Any], folder: Path, *, resume: bool = True, watch: Watch | None = None) -> Finished:
    """Train with some settings (missing: by default) into `folder`, silently.

    Continues the checkpoint that is there, and returns at once when that is of the end, unless `resume` is False.
    `watch` gets every new row of metrics.jsonl; what it raises abandons the run.

    Raises:
        BadInput: settings that cannot work, or that are not those of the checkpoint.
        Diverged: the loss is no longer finite.
        Stopped: SIGINT or SIGTERM came; the checkpoint is written.
    """
    job = settle({**settings, "out": str(folder)}, resume, not resume, False, ALONE)
    done = loop.run(job, _View(watch))
    written = summary.write(done)
    if done.signal:
        raise Stopped(done.signal)
    return Finished(job.config, written)
