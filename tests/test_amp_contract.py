"""What trainers and schedulers rely on around a step with a scaler, and what an iteration launches and waits for."""

import copy
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from compare import assert_equal, parameters
from scaled import OURS, SCALERS, STOCK, adamw, iterate, scale_gradients
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt_kernels import launch


def test_amp_scaling(device: str) -> None:
    """False unless asked for: trainers that clip by themselves or watch for skipped steps rely on it."""
    assert fusedopt.FusedOptimizer._step_supports_amp_scaling is False
    assert adamw(device)._step_supports_amp_scaling is False
    by_hand = adamw(device)
    by_hand._step_supports_amp_scaling = True
    for optimizer in (adamw(device, amp_scaling=True), by_hand):
        for copied in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            assert copied._step_supports_amp_scaling is True
            copied.load_state_dict(copied.state_dict())
            assert copied._step_supports_amp_scaling is True
    assert copy.deepcopy(adamw(device))._step_supports_amp_scaling is False
    assert "amp_scaling" not in str(adamw(device, amp_scaling=True).state_dict())
    with pytest.raises(ValueError, match="amp_scaling"):
        adamw(device, amp_scaling="yes")
    with pytest.raises(ValueError, match="amp_scaling"):
        adamw(device).add_param_group({"params": parameters(device, (2,)), "amp_scaling": True})


@pytest.mark.parametrize("amp_scaling", [False, True])
@pytest.mark.parametrize("scaler_class", SCALERS, ids=["stock", "fusedopt"])
def test_who_is_told_of_a_skip(scaler_class: Any, amp_scaling: bool, device: str) -> None:
    """Trainers replace ``step`` and learn from the missing call that it was skipped; so do schedulers that warn.

    That works with the stock scaler and the default; with the others step is called and skips on the device.
    """
    optimizer, scaler, calls = adamw(device, amp_scaling=amp_scaling), scaler_class(device, 8.0), []
    inner = optimizer.step

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        inner(*args, **kwargs)
        return "result"

    optimizer.step = patched
    hooked: list[int] = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(1))
    results = []
    for step in range(3):
        scale_gradients(step, scaler, optimizer, bad=math.inf if step == 1 else None)
        results.append(scaler.step(optimizer, None))
        scaler.update()
    told = scaler_class is STOCK and not amp_scaling
    assert results == (["result", None, "result"] if told else ["result"] * 3)
    assert len(calls) == len(hooked) == (2 if told else 3)
    assert {float(s["step"]) for s in optimizer.state.values()} == {2.0}


class NoSync(TorchDispatchMode):
    """Refuses to read a number from a tensor, which on a GPU waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise AssertionError("host sync")
        return func(*args, **(kwargs or {}))


@pytest.fixture
def quiet(device: str) -> Iterator[Any]:
    """A context in which a host sync raises: by torch's own check on a GPU, by `NoSync` elsewhere."""

    @contextmanager
    def on_gpu() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        yield
        torch.cuda.set_sync_debug_mode("default")

    yield on_gpu if device == "cuda" else NoSync
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("default")


MODES = [
    (OURS, False, {}), (OURS, False, dict(clip_grad_norm=1.0)),
    (OURS, True, {}), (OURS, True, dict(clip_grad_norm=1.0)),
    (STOCK, False, dict(amp_scaling=True)), (STOCK, True, dict(amp_scaling=True, clip_grad_norm=1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("scaler_class", "unscales", "options"), MODES)
def test_no_host_sync(scaler_class: Any, unscales: bool, options: dict[str, Any], quiet: Any, device: str) -> None:
    optimizer, scaler = adamw(device, **options, backend="triton"), scaler_class(device)
    if device == "cpu":
        optimizer._launcher = launch.Recorder()
    for step in range(4):
        scale_gradients(step, scaler, optimizer)
        with quiet() if step > 1 else nullcontext():
            iterate(scaler, optimizer, unscales=unscales)


def test_the_stock_scaler_syncs_by_default(quiet: Any, device: str) -> None:
    """So the test above can fail."""
    optimizer, scaler = adamw(device), STOCK(device)
    scale_gradients(0, scaler, optimizer)
    with pytest.raises((AssertionError, RuntimeError), match="sync"), quiet():
        iterate(scaler, optimizer)


@pytest.mark.parametrize("n", [1, 40])
@pytest.mark.parametrize(("scaler_class", "unscales", "options"), MODES)
def test_launches(scaler_class: Any, unscales: bool, options: dict[str, Any], n: int, device: str) -> None:
    """Three with our scaler, for any number of tensors; no norm pass where torch's has been made and nothing clips."""
    optimizer = adamw(device, *[(3, 2)] * n, **options, backend="triton")
    scaler = scaler_class(device)
    expected = ["adamw_scalars", "adamw"]
    if (scaler_class is OURS and not unscales) or "clip_grad_norm" in options:
        expected.insert(0, "norm")
    for step in range(3):
        optimizer._launcher = recorder = launch.Recorder()
        optimizer._forget_plan()  # a plan keeps its launcher
        scale_gradients(step, scaler, optimizer)
        iterate(scaler, optimizer, unscales=unscales)
        assert [spec.name for spec, _, _ in recorder.record] == expected


def test_steady_iterations_keep_their_plan_and_upload_no_scale(device: str) -> None:
    """At whatever scale, and after overflows: the device reads the scaler's own tensor."""
    optimizer, scaler, plans, uploads = adamw(device, backend="triton"), OURS(device, growth_interval=1), [], []
    for step in range(4):
        scale_gradients(step, scaler, optimizer, bad=math.inf if step == 2 else None)
        iterate(scaler, optimizer)
        plans.append(optimizer._plan)
        uploads.append([(x.values.uploads, x.addresses.uploads) for x in (t.conditions for t in optimizer._tables)])
    assert all(plan is plans[0] for plan in plans)
    assert all(count == uploads[0] for count in uploads)


@pytest.mark.filterwarnings("ignore:.*Profiler record function")  # torch's own hook around step
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler uses its own old API
@pytest.mark.filterwarnings("ignore:the compiler gave")  # aot_eager always hands over copies
@pytest.mark.parametrize("scaler_class", SCALERS, ids=["stock", "fusedopt"])
def test_a_compiled_step_reads_the_scale_at_run_time(scaler_class: Any, device: str) -> None:
    torch._dynamo.reset()
    counters.clear()
    optimizer, plain = adamw(device, amp_scaling=True), adamw(device, amp_scaling=True)
    optimizer.step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    scalers, graphs = (scaler_class(device, 8.0), scaler_class(device, 8.0)), []
    for step in range(5):
        for scaler, each in zip(scalers, (optimizer, plain), strict=True):
            scale_gradients(step, scaler, each, bad=math.inf if step == 2 else None)
            iterate(scaler, each)
        graphs.append(counters["stats"]["unique_graphs"])
    assert_equal(optimizer, plain)
    assert scalers[0].get_scale() == scalers[1].get_scale() == 4.0
    assert graphs[1] <= 2 and len(set(graphs[1:])) == 1
