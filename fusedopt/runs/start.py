"""A new run from an old one's settings: as `fusedopt train --config OLD/config.json` with some options."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from fusedopt.train import job, settings
from fusedopt.train.config import TrainConfig
from fusedopt.train.errors import BadInput

from . import diff
from .folders import CONFIG, ROOT, Run, flat, read_run
from .table import shown

CHANGES = re.compile(r"-(\w+=[^,]+(?:,\w+=[^,]+)*)$")
"""The end of a folder's name that says what was changed."""
LONGEST = 80  # characters of each half of a folder's name


def start(old: Run, options: dict[str, Any], train: Callable[..., int]) -> int:
    """Say what changes, train into a new folder, and show both runs. train: the command; its exit status."""
    options = {name: value for name, value in options.items() if value is not None and value != ()}
    source = old.folder / CONFIG
    out = Path(options.pop("out")) if "out" in options else None
    if out and (out / CONFIG).exists():
        raise BadInput(f"--out {out} already holds a run: choose another folder")
    given = settings.from_options({**options, "config": str(source)})
    config = job.validated(given)  # may replace this process, for the interpreter: nothing has been written yet
    folder = out or claim(old.folder, options)
    console = Console()
    lines = [f"from {old.folder} to {folder}", *changes(old, config, given)]
    console.print("\n  ".join(lines), highlight=False, markup=False, soft_wrap=True)
    try:
        status = train(**options, config=str(source), out=str(folder))
    finally:
        if not out:
            with contextlib.suppress(OSError):  # anything in it stays
                folder.rmdir()
    if status == 0:
        diff.show(console, [old, read_run(folder)])
    return status


def changes(old: Run, config: TrainConfig, given: dict[str, Any]) -> list[str]:
    """What is not as in `old`; what nobody asked for follows from the rest. Settings that `old` lacks are left out."""
    new = dict(flat(json.loads(json.dumps(config.as_dict()))))
    lines = []
    for name in dict.fromkeys((*old.settings, *new)):
        before, now = old.settings.get(name), new.get(name)
        if before != now and name != "out" and (name in old.settings or name in given or "." in name):
            follows = "" if name.partition(".")[0] in given else " (follows)"
            words = ("unset" if value is None else shown(value) for value in (before, now))
            lines.append(f"{name}: {' -> '.join(words)}{follows}")
    return lines or ["with the same settings"]


def claim(old: Path, options: dict[str, Any]) -> Path:
    """A new folder in `runs`, named after `old` and the options: `mine-lr=0.003`, or `mine-2-lr=0.003`."""
    root = ROOT.absolute()
    inside = old.absolute().relative_to(root) if old.absolute().is_relative_to(root) else Path(old.absolute().name)
    name = "-".join(inside.parts)
    earlier = CHANGES.search(name)
    stem = name[: earlier.start()] if earlier else name
    words = dict(change.split("=", 1) for change in earlier[1].split(",")) if earlier else {}
    words |= {name: re.sub(r"[^\w.+-]+", "_", text) for name, text in _pairs(options)}
    end = "-" + ",".join(f"{name}={text}" for name, text in words.items()) if words else ""
    for number in itertools.count(1):
        folder = ROOT / (stem[:LONGEST] + (f"-{number}" if number > 1 else "") + end[:LONGEST])
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise BadInput(f"cannot create {folder}: {error.strerror}: name another folder with --out") from None
    raise AssertionError("count ends never")


def _pairs(options: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and values; of `optimizer_arg` and its like, each is such a pair itself."""
    for name, value in options.items():
        if name.endswith("_arg"):
            yield from ((pair.partition("=")[0], pair.partition("=")[2]) for pair in value)
        else:
            yield name, shown(list(value) if isinstance(value, tuple) else value)
