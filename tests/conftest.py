"""How the tests run: in which mode, on which device, from which seed, and what could not run here.

Triton reads TRITON_INTERPRET when a kernel is decorated, and under it off-line compilation fails. So a test process
has one mode, FUSEDOPT_TEST_MODE, chosen before anything imports Triton:

- ``interpreted``: kernels run in Triton's interpreter on the CPU. The default without a GPU. Leaves out tests marked
  ``compiled``.
- ``compiled``: kernels are compiled. The default with a GPU, and then every test runs on it. Without a GPU only tests
  marked ``compiled`` run, those that compile off-line and launch nothing.

What cannot run in the process at hand is deselected and listed at the end under ``NOT RUN HERE (n)``.
"""

import os
import random
import sys
import zlib
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
HAS_GPU = torch.cuda.is_available()
MODE = os.environ.setdefault("FUSEDOPT_TEST_MODE", "compiled" if HAS_GPU else "interpreted")
if MODE not in ("compiled", "interpreted"):
    raise pytest.UsageError(f"FUSEDOPT_TEST_MODE must be 'compiled' or 'interpreted', not {MODE!r}")
if "triton" in sys.modules:
    raise pytest.UsageError("Triton was imported before tests/conftest.py could choose its mode")
os.environ.pop("TRITON_INTERPRET", None)
if MODE == "interpreted":
    os.environ["TRITON_INTERPRET"] = "1"
    from fusedopt_kernels.interpreter import patch_language_once

    patch_language_once()

# For the programs that tests start: the checkout, after whatever the caller put first (an older Triton, say).
_PATH = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
_SOURCES = [str(ROOT), str(ROOT / "kernels")]
os.environ["PYTHONPATH"] = os.pathsep.join(_PATH + [p for p in _SOURCES if p not in _PATH])

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; a thread pool each would only slow them down
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# The same examples in every run; a slow machine is not a failure.
hypothesis.settings.register_profile("fusedopt", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fusedopt")

MARKERS = (
    "gpu(count=1): needs so many GPUs, and compiled kernels",
    "compiled: compiles off-line; runs without a GPU, but not in the interpreter's process",
    "long: exceeds its share of the 20 minutes; runs with --long (make test-long)",
    "needs(requirement, ...): needs these distributions, such as 'setuptools>=77'",
)
NOT_HERE = "NOT RUN HERE"
LONG = "LEFT TO --long"
COMPILED = "LEFT TO FUSEDOPT_TEST_MODE=compiled"

_left: dict[str, dict[str, None]] = {NOT_HERE: {}, LONG: {}, COMPILED: {}}
"""Heading → ids of deselected tests, as an ordered set: each worker of pytest-xdist reports all of them."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked 'long', and only those")


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _missing(requirement: str) -> bool:
    want = Requirement(requirement)
    have = _version(want.name)
    return have is None or have not in want.specifier


def _why_not(item: pytest.Item, run_long: bool) -> str | None:
    """Heading under which a test is left out: "" when another run of the same command has it, None when it runs."""
    marks = {mark.name for mark in item.iter_markers()}
    if MODE == "compiled" and not HAS_GPU and "compiled" not in marks:
        return ""
    if ("long" in marks) != run_long:
        return "" if run_long else LONG
    if any(torch.cuda.device_count() < (mark.args or (1,))[0] for mark in item.iter_markers("gpu")):
        return NOT_HERE
    if any(_missing(r) for mark in item.iter_markers("needs") for r in mark.args):
        return NOT_HERE
    return COMPILED if MODE == "interpreted" and marks & {"compiled", "gpu"} else None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Where compiled tests alone run, spare other files their import, most of what a start takes."""
    if MODE == "compiled" and not HAS_GPU and collection_path.match("test_*.py"):
        return "mark.compiled" not in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    why = {item: _why_not(item, bool(config.getoption("--long"))) for item in items}
    for item, heading in why.items():
        if heading:
            _left[heading][item.nodeid] = None
    left = [item for item in items if why[item] is not None]
    if left:
        config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if why[item] is None]


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)  # exists in a worker of pytest-xdist
    if output is not None:
        output["left"] = {heading: list(ids) for heading, ids in _left.items()}


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's hook, in the process that gathers the workers' results
def pytest_testnodedown(node: Any) -> None:
    for heading, ids in getattr(node, "workeroutput", {}).get("left", {}).items():
        _left[heading].update(dict.fromkeys(ids))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name what was left out, so that nothing passes by being skipped silently."""
    for heading in (COMPILED, LONG, NOT_HERE):
        if _left[heading]:
            terminalreporter.section(f"{heading} ({len(_left[heading])})")
            for nodeid in sorted(_left[heading]) if heading != COMPILED else ():
                terminalreporter.line(nodeid)


def pytest_report_header() -> str:
    return f"kernels {MODE}, device {DEVICE}, triton {_version('triton')}, torch {torch.__version__}"


DEVICE = "cuda" if HAS_GPU and MODE == "compiled" else "cpu"


@pytest.fixture(scope="session")
def device() -> str:
    """Where the tensors of a test live: the GPU when kernels are compiled and there is one, else the CPU."""
    return DEVICE


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed every generator from the test's own id: the same numbers alone, in any order and on any worker."""
    value = zlib.crc32(request.node.nodeid.encode())
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture(autouse=True)
def announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is announced once in a process is announced in every test, whatever ran before it."""
    from fusedopt import layout

    monkeypatch.setattr(layout, "_announced", set())


GUARD = 128
"""Elements before and after a poisoned tensor: keeps it 128-byte aligned and shows stores outside it."""


@pytest.fixture
def poison(device: str) -> Iterator[Callable[..., torch.Tensor]]:
    """``poison(numel, dtype=torch.float32, offset=0)``: a 1-D tensor of NaN (integers: the largest value) in a larger
    such buffer, `offset` elements past a 128-byte boundary. The test fails if anything around it was written.
    """
    guards: list[tuple[torch.Tensor, torch.Tensor]] = []

    def make(numel: int, dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
        inexact = dtype.is_floating_point or dtype.is_complex
        value = torch.nan if inexact else dtype == torch.bool or torch.iinfo(dtype).max
        spare = torch.full((2 * GUARD + 128 + offset + numel,), value, dtype=dtype, device=device)
        skew = -spare.data_ptr() % 128 // spare.element_size()
        start = GUARD + skew + offset
        for part in (spare[:start], spare[start + numel :]):
            guards.append((part.view(torch.uint8), part.view(torch.uint8).clone()))
        return spare[start : start + numel]

    yield make
    for now, before in guards:
        assert torch.equal(now, before), "something was written outside a tensor"
