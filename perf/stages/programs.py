"""Programs that run beside each other, each in its own group of processes and with a limit; a row about each."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from perf.contenders import FUSEDOPT
from perf.results import Row, Writer, read

ROOT = Path(__file__).parents[2]
GRACE = 5.0
"""Seconds between the interrupt at the limit, after which pytest still sums up, and the kill."""
TAIL = 3000
"""Characters of a failed program's output in its row."""
ROW = b'{"kind": '
"""What every row begins with."""


class Verdict(NamedTuple):
    """ok: None if nothing can be said. line: the one that says most."""

    ok: bool | None
    line: str


def by_status(status: int, output: str) -> Verdict:
    """Exit status 0 is good; the last line says most."""
    lines = output.strip().splitlines()
    return Verdict(status == 0, " ".join(lines[-1].split()) if lines else f"exit status {status}")


@dataclass(frozen=True)
class Program:
    """name: of its row. seconds: its limit. environment: beside what every program gets.

    judge: of its exit status, negative for a signal, and what it wrote. partial: its rows count even if it is stopped.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], Verdict] = by_status
    partial: bool = False


class Ended(NamedTuple):
    """status: None for a program that was stopped at its limit."""

    program: Program
    status: int | None
    seconds: float
    output: str

    @property
    def verdict(self) -> Verdict:
        """What came of it."""
        if self.status is not None:
            return self.program.judge(self.status, self.output)
        line = self.program.judge(1, self.output).line
        return Verdict(False, f"stopped after {self.program.seconds:.0f} s: {line}")


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a module of the checkout with this interpreter."""
    return [sys.executable, "-m", name, *map(str, arguments)]


def together(programs: Sequence[Program], folder: Path) -> Generator[Ended]:
    """Run programs beside each other and yield each when it ends. None of them outlives the iteration."""
    running: list[_Running] = []
    try:
        for number, program in enumerate(programs):
            running.append(_Running(program, folder / f"{number}.log"))
        while running:
            for one in [one for one in running if one.over()]:
                running.remove(one)
                yield one.ended()
            time.sleep(0.02)
    finally:
        for one in running:
            one.ended()


def alone(program: Program, folder: Path) -> Ended:
    """Run one program."""
    return next(together([program], folder))


class _Running:
    def __init__(self, program: Program, log: Path) -> None:
        self.program, self.log, self.begin, self.stopped = program, log, time.monotonic(), False
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                program.command, cwd=ROOT, env=_environment(program), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, process_group=0, preexec_fn=_hear_interrupts,
            )  # fmt: skip

    def over(self) -> bool:
        """Whether it has ended; interrupts it at its limit and kills it after the grace."""
        spent = time.monotonic() - self.begin
        if self.process.poll() is not None:
            return True
        if spent > self.program.seconds and not self.stopped:
            self.stopped = True
            self._signal(signal.SIGINT)
        return spent > self.program.seconds + GRACE

    def ended(self) -> Ended:
        """End whatever still runs of its group."""
        seconds = time.monotonic() - self.begin
        self._signal(signal.SIGKILL)
        status = self.process.wait()
        output = self.log.read_text(errors="replace")
        return Ended(self.program, None if self.stopped else status, seconds, output)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):  # all gone, or only what cannot be signalled any more
            os.killpg(self.process.pid, number)


def _hear_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _environment(program: Program) -> dict[str, str]:
    """Ours, the checkout on the path after whatever the caller put first (an older Triton, say), kernels compiled."""
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    path += [entry for entry in (str(ROOT), str(ROOT / "kernels")) if entry not in path]
    ours = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**ours, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1", **program.environment}


@dataclass
class Run:
    """A run in progress. known: rows seen so far. lost: jobs in which the measuring process died without a row."""

    writer: Writer
    device: str
    seconds: float
    begin: float = field(default_factory=time.monotonic)
    stages: list[Row] = field(default_factory=list)
    known: int = 0
    first: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        self.known = self.first = len(self.rows())

    @property
    def log(self) -> Path:
        """Where programs' output goes."""
        return self.writer.path.with_suffix(".log")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.begin + self.seconds - time.monotonic()

    def rows(self) -> list[Row]:
        """All in the file."""
        return read(self.writer.path) if self.writer.path.exists() else []

    def carry_out(self, programs: Sequence[Program]) -> list[Ended]:
        """Beside each other, with a row for each as soon as it has ended."""
        all_ended = []
        with tempfile.TemporaryDirectory(prefix="fusedopt-perf-") as folder:
            with closing(together(programs, Path(folder))) as running:
                for ended in running:
                    all_ended.append(ended)
                    self.record(ended)
        return all_ended

    def record(self, ended: Ended) -> None:
        """Keep what a program wrote. Ours being red in its rows is a failure, too."""
        mend(self.writer.path)
        with self.log.open("a") as file:
            file.write(f"\n=== {ended.program.name}: {' '.join(ended.program.command)}\n{ended.output}")
        rows = self.rows()[self.known :]
        reds = [r for r in rows if r["kind"] == "red" and "row" not in r]  # with one: a launch shape that was tried
        ours = [r for r in reds if r.get("contender") == FUSEDOPT.name]
        found = sum(r["kind"] != "red" for r in rows)
        verdict = ended.verdict
        if ended.status is None and ended.program.partial and found:
            verdict = Verdict(True, f"stopped after {ended.program.seconds:.0f} s, with {found} rows")
        if ours:
            verdict = Verdict(False, f"ours is red in {len(ours)} jobs, first: {ours[0]['why']}")
        tail = {} if verdict.ok else {"tail": ended.output[-TAIL:]}
        self.note(ended.program.name, verdict, ended.seconds, **tail)

    def note(self, name: str, verdict: Verdict, seconds: float = 0.0, **more: Any) -> None:
        """A row about a stage, and a line on the terminal."""
        row = self.writer.add("stage", name=name, ok=verdict.ok, seconds=round(seconds, 1), line=verdict.line, **more)
        self.stages.append(row)
        self.known = len(self.rows())
        word = {True: "ok", False: "FAILED", None: "not run"}[verdict.ok]
        print(f"{name}: {word}, {seconds:.0f} s: {verdict.line}", flush=True)


def mend(path: Path) -> None:
    """Take off a last row that a kill has torn.

    Raises:
        ValueError: what the file ends with was never a row.
    """
    data = path.read_bytes() if path.exists() else b""
    torn = data[data.rfind(b"\n") + 1 :]
    if not ROW.startswith(torn[: len(ROW)]):
        raise ValueError(f"{path} is no file of results")
    if torn:
        with path.open("r+b") as file:
            file.truncate(len(data) - len(torn))
