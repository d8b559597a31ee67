"""Launch shapes measured on a GPU: all candidates step the same parameters and state, in turns.

Before that they are compiled into Triton's cache, by processes of their own:
``python -m perf.tune.timing ROWS ONLY PART PARTS``.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from typing import Any

import torch

from perf.cases import CASES, Case, Fitted
from perf.clock import Clock, turns
from perf.instances import parameters
from perf.results import Row, Writer
from perf.tune.trials import PRESENT, TRIALS, Candidate, applied, candidates

ROUNDS, SECONDS = 20, 5.0
"""Of one job, at most."""
COMPILING = 120.0
"""Seconds that the processes that compile may take."""
SHAPES = {"three chunks": (200, 256), "a part": (65, 64), "odd": (1027,)}
"""What candidates must agree on, bit for bit, before they are timed."""

Order = Sequence[tuple[str, str]]
"""(row of the table, case)."""


def order(kinds: Sequence[str]) -> Order:
    """Formats that are compared with others' first, on the largest model; then smaller ones, then other formats."""
    cases = list(dict.fromkeys(case for trial in TRIALS.values() for case in trial.cases))
    return [(kind, case) for case, kind in product(cases, kinds) if case in TRIALS[kind].cases]


def rows(
    writer: Writer, jobs: Order, deadline: float, clock: Clock, tried: Callable[[str], Mapping[str, Candidate]],
    device: str = "cuda", tell: Callable[[str], object] = print,
) -> list[Row]:  # fmt: skip
    """Measure one job after the other, none begun after the deadline; each fails by itself. tried: of a row."""
    found: list[Row] = []
    agreed: dict[tuple[str, Candidate], str | None] = {}
    for kind, case in jobs:
        if time.monotonic() > deadline:
            tell("out of time")
            break
        fitted = _fitted(CASES[case], kind, device)
        tell(f"{kind}, {case}" + ("" if fitted else ": does not fit"))
        if fitted is None:
            continue
        job = _Job(writer, kind, fitted, device, agreed)
        try:
            found += job.measure(tried(kind), clock, deadline)
        except Exception as failure:  # of this job only
            job.red(PRESENT, candidates(kind)[PRESENT], failure)
        finally:
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    return found


def _fitted(case: Case, kind: str, device: str) -> Fitted | None:
    """Parameters, gradients and state twice: the second is the state in one buffer."""
    memory = 0.8 * torch.cuda.mem_get_info()[0] if device == "cuda" else 1e9
    return case.fitted(memory / (2 * TRIALS[kind].form.held))


class _Job:
    """One row of the table over one case. agreed: what is known of candidates' bits."""

    def __init__(
        self, writer: Writer, kind: str, fitted: Fitted, device: str, agreed: dict[tuple[str, Candidate], str | None]
    ) -> None:
        self.writer, self.kind, self.fitted, self.device, self.agreed = writer, kind, fitted, device, agreed

    def measure(self, tried: Mapping[str, Candidate], clock: Clock, deadline: float) -> list[Row]:
        """A row for each candidate whose bits are right; ratio: of its time to that of the present row."""
        optimizers: dict[str, Any] = {}
        params = parameters(self.fitted.shapes, TRIALS[self.kind].form, self.device)
        state: dict[Any, Any] = {}
        for name, candidate in tried.items():
            if optimizers and time.monotonic() > deadline:
                break
            try:
                if why := self._wrong(candidate):
                    raise ArithmeticError(why)
                optimizers[name] = planned(self.kind, candidate, params, state)
                state = state or optimizers[name].state
            except Exception as failure:  # of this candidate only
                self.red(name, candidate, failure)
        if PRESENT not in optimizers:
            return []
        times = turns({name: o.step for name, o in optimizers.items()}, clock, ROUNDS, SECONDS)
        return [
            self.writer.add(
                "tune", **self._about(name, tried[name]),
                device_ms={k: round(1e3 * v, 6) for k, v in times.spread(name, "device").items()},
                ratio={k: round(v, 5) for k, v in times.ratio(name, PRESENT, "device").items()},
                rounds=len(times.samples[name]),
            )
            for name in optimizers
        ]  # fmt: skip

    def _wrong(self, candidate: Candidate) -> str | None:
        """Why a candidate is not timed."""
        key = self.kind, candidate
        if key not in self.agreed:
            self.agreed[key] = difference(self.kind, candidate, self.device)
        return self.agreed[key]

    def red(self, name: str, candidate: Candidate, failure: Exception) -> None:
        """Nothing was measured, and this is why."""
        why = " ".join(f"{type(failure).__name__}: {failure}".split())[:300]
        self.writer.add("red", **self._about(name, candidate), contender="fusedopt", why=why)

    def _about(self, name: str, candidate: Candidate) -> Row:
        fitted = self.fitted
        about = {"device": self.device, "case": fitted.case.name, "part": fitted.part, "tensors": fitted.tensors}
        about |= {"elements": fitted.elements, "format": TRIALS[self.kind].form.name, "work": "clip"}
        return {**about, "row": self.kind, "name": name, **candidate.fields()}


def planned(kind: str, candidate: Candidate, params: Sequence[torch.nn.Parameter], state: Mapping[Any, Any]) -> Any:
    """An optimizer after a step in a candidate's shape, which later steps keep. state: of another one, to be shared."""
    optimizer = TRIALS[kind].build(params)
    for p, own in (in_one_buffer(state) if candidate.arena else state).items():
        optimizer.state[p] = own
    with applied(kind, candidate):
        optimizer.step()
    return optimizer


def in_one_buffer(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy whose tensors are views of one buffer, each at a multiple of 256 bytes; step counts stay."""
    places = [(p, key, t) for p, own in state.items() for key, t in own.items() if t.dim()]
    sizes = [-(-t.nbytes // 256) * 256 for _, _, t in places]
    copied = {p: dict(own) for p, own in state.items()}
    if places:
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device=places[0][2].device)
        for (p, key, t), part in zip(places, buffer.split(sizes), strict=True):
            copied[p][key] = part[: t.nbytes].view(t.dtype).as_strided(t.size(), t.stride()).copy_(t)
    return copied


def difference(kind: str, candidate: Candidate, device: str) -> str | None:
    """What two steps of a candidate and of the present row do differently; None: every bit is the same."""
    found = []
    for tried in (candidates(kind)[PRESENT], candidate):
        params = parameters(SHAPES, TRIALS[kind].form, device)
        first = planned(kind, candidates(kind)[PRESENT], params, {})
        second = planned(kind, tried, params, first.state)
        found.append([p.detach() for p in params] + [t for p in params for t in second.state[p].values()])
    return None if all(map(torch.equal, *found)) else "a step does not give the bits of the present row"


def compile_ahead(kinds: Sequence[str], only: str, deadline: float) -> None:
    """Fill Triton's cache, on half of the cores. What fails here is compiled, and fails, where it is measured."""
    parts = max(1, (os.cpu_count() or 2) // 2)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-P", "-m", "perf.tune.timing", ",".join(kinds), only]
    begin = time.monotonic()
    end = begin + min(COMPILING, (deadline - begin) / 2)
    quiet: dict[str, Any] = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen([*command, str(i), str(parts)], **quiet) for i in range(parts)]
    for process in started:
        with suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()


def compiled_in_turn(kinds: Sequence[str], only: str, part: int, parts: int, device: str = "cuda") -> Iterator[str]:
    """Make every so manieth candidate ready; names of those that are."""
    wanted = [(kind, *item) for kind in kinds for item in candidates(kind, only).items()]
    for kind, name, candidate in wanted[part::parts]:
        with suppress(Exception):
            optimizer = TRIALS[kind].build(parameters(SHAPES, TRIALS[kind].form, device))
            with applied(kind, candidate):
                optimizer.warmup()
            yield f"{kind}: {name}"


if __name__ == "__main__":
    for line in compiled_in_turn(sys.argv[1].split(","), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])):
        print(line, flush=True)
