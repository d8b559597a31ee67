"""Triton's interpreter with its language patched once a launch, as the tests and `fusedopt verify` run it."""

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from test_inspect import needs_interpreter
from triton.language import core

pytestmark = needs_interpreter


@triton.jit
def _twice(x):
    return x + x


@triton.jit
def _flat_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i) + tl.load(x + i))


@triton.jit
def _nested_kernel(x, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out + i, _twice(tl.load(x + i)))


def test_device_functions_patch_nothing_and_the_kernel_restores_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    patch, patched = interpreter._patch_builtin, []
    monkeypatch.setattr(interpreter, "_patch_builtin", lambda *args: patched.append(args[0]) or patch(*args))
    counts = []
    for kernel in (_flat_kernel, _nested_kernel):
        x, out = torch.arange(8.0), torch.zeros(8)
        kernel[(1,)](x, out, 8)
        assert torch.equal(out, 2 * x) and core.is_builtin(tl.load)
        counts.append(len(patched))
    assert counts[1] == 2 * counts[0] > 0


ANEW = """
from types import FunctionType
import triton.language as tl
from triton.language import core
from triton.runtime import interpreter
from fusedopt_kernels.interpreter import patch_language_once

def seeing(**names):
    return interpreter._patch_lang(FunctionType((lambda: None).__code__, names))

patch_language_once()
outer, inner = seeing(tl=tl), seeing(tl=tl, core=core)
assert outer._changes and inner._changes and not seeing(tl=tl)._changes and not core.is_builtin(core.load)
inner.restore()
outer.restore()
assert core.is_builtin(core.load) and core.is_builtin(tl.load)
try:
    seeing()
except AssertionError as error:
    print(error)
"""
"""In a process of its own: Triton leaves patched what only a device function of some earlier test has seen."""


def test_a_language_that_the_kernel_does_not_see_is_patched_by_whoever_sees_it() -> None:
    done = subprocess.run([sys.executable, "-c", ANEW], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "must be visible" in done.stdout, done.stderr
