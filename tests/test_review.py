"""What only a GPU's separate memory, a capture or a later upgrade would show, tried on the CPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from table import private
from torch import Tensor

import fusedopt
from fusedopt import numbers, rows, upload
from fusedopt_kernels import launch, table
from fusedopt_kernels.grad import l2, maximize


class ApartTable(upload.DeviceTable):
    """A table whose device memory is not its host memory, as on a GPU: kernels see what was uploaded."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(shape, dtype, device)
        self.tensor = torch.zeros(shape, dtype=dtype)

    def upload(self) -> None:
        super().upload()
        self.tensor.copy_(torch.from_numpy(self.array))


def parameter(n: int = 8, offset: int = 0) -> Any:
    """A parameter with a gradient of ones, ``offset`` elements off a 16-byte boundary."""
    p = torch.nn.Parameter(torch.zeros(n + offset)[offset:])
    p.grad = torch.ones(n + offset)[offset:]
    return p


@pytest.mark.parametrize("cls", [fusedopt.SGD, fusedopt.Adam, fusedopt.AdamW])
@pytest.mark.parametrize("offset", [0, 1])
def test_every_table_reaches_the_device(cls: Any, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows whose flags are all zero (nothing aligned, no decay of its own) must be uploaded like any other."""
    monkeypatch.setattr(rows, "DeviceTable", ApartTable)
    monkeypatch.setattr(numbers, "DeviceTable", ApartTable)
    optimizer = private(cls([parameter(offset=offset)], backend="triton"), clip_grad_norm=1.0)
    optimizer._launcher = launch.Recorder()
    optimizer.step()
    device = optimizer._tables[0]
    of_numbers = [t for x in (device.hypers, device.conditions) for t in (x.values, x.addresses)]
    for t in (device.rows, device.grads, *of_numbers, *device._constants):
        assert torch.equal(t.tensor, torch.from_numpy(t.array))
    assert device.rows.tensor[0, table.NUMEL.value] == 8
    assert device.rows.tensor[0, table.FLAGS.value] >= 0


def test_gradients_are_not_kept_after_a_step() -> None:
    import weakref

    p = parameter()
    optimizer = fusedopt.AdamW([p])
    optimizer.step()
    grad = weakref.ref(p.grad)
    optimizer.zero_grad()
    assert grad() is None


def test_to_lets_go_of_the_old_state() -> None:
    import weakref

    p = parameter()
    optimizer = fusedopt.AdamW([p])
    optimizer.step()
    state = weakref.ref(optimizer.state[p]["exp_avg"])
    optimizer.to("meta")
    assert state() is None


@pytest.mark.compiled
def test_variant_key_holds_the_source_of_functions_in_tuples() -> None:
    """Triton's cache on disk knows a function inside a tuple by its name only."""
    source = launch.sources((l2.apply, maximize.apply))
    assert source != launch.sources((l2.apply,)) and source != launch.sources((maximize.apply, l2.apply))
    changed = SimpleNamespace(cache_key=l2.apply.cache_key + "edited")
    assert source != launch.sources((changed, maximize.apply))
    optimizer = fusedopt.Adam([parameter()], backend="triton")
    optimizer._launcher = launch.Recorder()
    optimizer.step()
    spec = optimizer._launcher.record[-1][0]
    assert spec.constants["SOURCES"] and tuple(spec.signature) == (*launch.POINTERS,)[:5] + tuple(spec.constants)


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``capture(step)`` runs a step as if it went into a CUDA graph."""

    def run(step: Any) -> None:
        with monkeypatch.context() as patch:
            for name in ("stepper", "state", "upload", "numbers", "average", "parts"):
                patch.setattr(f"fusedopt.{name}.capturing", lambda: True)
            step()

    return run


def recording(p: Any, **options: Any) -> Any:
    optimizer = fusedopt.AdamW([p], backend="triton", **options)
    optimizer._launcher = launch.Recorder()
    return optimizer


def test_a_capture_keeps_its_tables(capture: Any) -> None:
    """Later steps, with other gradients and another plan, must not change what a replay reads."""
    p = parameter()
    optimizer = recording(p)
    optimizer.step()
    captured_grad = p.grad = torch.ones(8)
    capture(optimizer.step)
    _, _, args = optimizer._launcher.record[-1]
    grads: Tensor = args[1]
    for _ in range(2):
        p.grad = torch.ones(8)
        optimizer.step()
        assert optimizer._launcher.record[-1][2][1].tolist() == [p.grad.data_ptr()]
        assert grads.tolist() == [captured_grad.data_ptr()]
        optimizer.load_state_dict(optimizer.state_dict())
    assert any(t.grads.tensor is grads for _, held in optimizer._captures for t in held.tables)


def test_a_capture_refuses_state_that_does_not_exist(capture: Any) -> None:
    optimizer = recording(parameter())
    with pytest.raises(RuntimeError, match="step once before the capture"):
        capture(optimizer.step)
    sgd = fusedopt.SGD([parameter()], momentum=0.9, backend="triton")
    sgd._launcher = launch.Recorder()
    with pytest.raises(RuntimeError, match="step once before the capture"):
        capture(sgd.step)


def test_a_capture_refuses_cpu_tensors_and_eager_twins(capture: Any) -> None:
    optimizer = recording(parameter(), lr=torch.tensor(0.1))
    optimizer.step()
    with pytest.raises(RuntimeError, match="CPU tensor"):
        capture(optimizer.step)
    eager = fusedopt.AdamW([parameter()])
    eager.step()
    with pytest.raises(RuntimeError, match="only Triton kernels"):
        capture(eager.step)


def test_pinned_reserve_is_handed_out_once() -> None:
    upload._reserve = torch.zeros(64, dtype=torch.uint8)
    first, second = upload._take(torch.zeros(3, dtype=torch.int64)), upload._take(torch.zeros(5, dtype=torch.int32))
    assert first.dtype == torch.int64 and second.dtype == torch.int32
    assert second.data_ptr() - first.data_ptr() == 24 and upload._reserve.numel() == 16
    upload._reserve = torch.empty(0, dtype=torch.uint8)


def test_gradient_that_does_not_fit_is_refused() -> None:
    p = parameter()
    p.data = torch.zeros(4)  # the gradient keeps 8 elements
    with pytest.raises(RuntimeError, match="does not fit"):
        fusedopt.SGD([p]).step()


@pytest.mark.filterwarnings("ignore:a parameter with gaps")
def test_parameters_that_overlap_are_refused() -> None:
    base = torch.zeros(12)
    params = [torch.nn.Parameter(base[:8]), torch.nn.Parameter(base[4:])]
    for p in params:
        p.grad = torch.ones(8)
    with pytest.raises(ValueError, match="share memory"):
        fusedopt.SGD(params).step()
    columns = torch.zeros(4, 2)
    apart = [torch.nn.Parameter(columns[:, 0]), torch.nn.Parameter(columns[:, 1]), torch.nn.Parameter(base[:4])]
    apart += [torch.nn.Parameter(base[4:8])]
    for p in apart:
        p.grad = torch.ones(4)
    fusedopt.SGD(apart, lr=1.0).step()
    assert torch.equal(columns, torch.full((4, 2), -1.0))


@pytest.mark.gpu
def test_steps_beside_a_graph_do_not_disturb_its_replays() -> None:
    """Uncaptured steps with other gradients, and a rebuilt plan, between replays of a captured step."""
    p, q = (torch.nn.Parameter(torch.zeros(1000, device="cuda")) for _ in range(2))
    captured, plain = fusedopt.AdamW([p]), fusedopt.AdamW([q])
    static = p.grad = torch.ones(1000, device="cuda")
    q.grad = torch.ones(1000, device="cuda")
    captured.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    plain.step()
    for k in range(4):
        p.grad = torch.full((1000,), float(k), device="cuda")
        captured.step()
        captured._forget_plan()
        static.fill_(0.5 * k)
        graph.replay()
        for g in (float(k), 0.5 * k):
            q.grad = torch.full((1000,), g, device="cuda")
            plain.step()
        assert torch.equal(p, q)
