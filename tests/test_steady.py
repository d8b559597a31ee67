"""What a step does on the host once nothing changes: counted, never timed. Launches are replaced by one that starts
nothing, so that everything seen here is the step's own work."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fusedopt
from fusedopt.metrics import NAMES
from fusedopt.upload import DeviceTable
from fusedopt_kernels import launch

AdamW: Any = fusedopt.AdamW
Step = Callable[[], Any]

WAITING = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_to_copy"}
"""torch operators that bring numbers to the host, or may."""


class Operators(TorchDispatchMode):
    """Counts torch's operators and the bytes of what they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.names[func.overloadpacket.__name__] += 1
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.allocated += sum(t.nbytes for t in new if t.untyped_storage().data_ptr() not in known)
        return result


class Model:
    """Parameters with gradients at two sets of addresses, and an optimizer that launches nothing."""

    def __init__(self, device: str, count: int, size: int, **options: Any) -> None:
        self.params = [torch.nn.Parameter(torch.ones(size, device=device)) for _ in range(count)]
        self.sets = [[torch.ones(size, device=device) for _ in range(count)] for _ in range(2)]
        self.optimizer = AdamW(self.params, **options, backend="triton")
        self.optimizer._launcher = self.recorder = launch.Recorder()

    def backward(self, which: int) -> None:
        for p, g in zip(self.params, self.sets[which], strict=True):
            p.grad = g

    def seen(self, step: Step, moves: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
        """(operators, bytes allocated, launches, bytes uploaded) of a fourth step; moves: its gradients lie elsewhere
        than those of the third."""
        uploaded: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(DeviceTable, "upload", lambda table: uploaded.append(table.array.nbytes))
            with Operators() as operators:  # a plan is of the mode it was made in: its guard compares that too
                for which in (0, 1, 0):
                    self.backward(which)
                    step()
                self.backward(1 if moves else 0)
                for list_ in (self.recorder.record, uploaded, operators.names):
                    list_.clear()
                operators.allocated = 0
                step()
        assert self.optimizer._plan is not None
        launches = [spec for spec, _, _ in self.recorder.record]
        return operators.names, operators.allocated, launches, sum(uploaded)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": dict(clip_grad_norm=1.0),
    "clipped alone": dict(clip_grad_norm=1.0, clip_scope="tensor", clip_grad_value=0.1, skip_nonfinite=True),
    "averaged": dict(clip_grad_norm=1.0, ema_decay=0.9, ema_warmup=True),
    "measured": dict(clip_grad_norm=1.0, metrics=NAMES),
    "everything": dict(clip_grad_norm=1.0, ema_decay=0.9, skip_norm_above=10.0, metrics=NAMES, cautious=True),
}
LAUNCHES = {"plain": 2, "everything": 4}


def stepping(model: Model, scaled: bool) -> Step:
    """The optimizer's step, or one with all that a training loop does under a scaler."""
    if not scaled:
        return model.optimizer.step
    scaler = fusedopt.GradScaler(str(model.params[0].device.type), init_scale=1024.0)
    scaler.scale(torch.ones((), device=model.params[0].device))

    def step() -> None:
        scaler.step(model.optimizer)
        scaler.update()

    return step


@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
@pytest.mark.parametrize("case", CASES)
def test_a_steady_step_does_nothing_that_grows(
    case: str, scaled: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same few operators, bytes and launches for 10 and 300 tensors, of 100 and 100,000 elements; no host sync."""
    found = {}
    for count, size in ((10, 100), (300, 100), (10, 100_000)):
        model = Model(device, count, size, **CASES[case])
        found[count, size] = model.seen(stepping(model, scaled), False, monkeypatch)
    names, allocated, launches, uploaded = found[10, 100]
    assert found[300, 100] == found[10, 100_000] == found[10, 100]
    assert len(launches) == (LAUNCHES.get(case, 3) + (scaled and case == "plain"))
    assert uploaded == 0 and not WAITING & set(names), names
    if scaled:
        assert names.total() < 20 and allocated < 100, "the scaler's own numbers"
    else:
        assert allocated == 0 and set(names) == {"_record_function_enter_new", "_record_function_exit"}, "torch's label"


@pytest.mark.parametrize("case", CASES)
def test_gradients_that_moved_cost_their_addresses(case: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (10, 300):
        model = Model(device, count, 100, **CASES[case])
        _, _, launches, uploaded = model.seen(model.optimizer.step, True, monkeypatch)
        assert uploaded == 8 * count and len(launches) == LAUNCHES.get(case, 3)


def test_changed_numbers_cost_their_table_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new lr or threshold: one small table, whatever the number of tensors; no other kernels and no plan."""
    for count in (10, 300):
        model = Model(device, count, 100, clip_grad_norm=1.0)
        model.backward(0)
        for _ in range(2):
            model.optimizer.step()
        plan, compiles = model.optimizer._plan, model.recorder.compiles
        group = model.optimizer.param_groups[0]
        for changed, name, value in ((group, "lr", 0.5), (group["fusedopt"], "clip_grad_norm", 2.0)):
            changed[name] = value
            uploaded: list[int] = []
            with monkeypatch.context() as patch:
                patch.setattr(DeviceTable, "upload", lambda table, seen=uploaded: seen.append(table.array.nbytes))
                for _ in range(2):
                    model.optimizer.step()
            hypers = model.optimizer._tables[0].hypers.values
            assert uploaded == [hypers.array.nbytes]
        assert model.optimizer._plan is plan and model.recorder.compiles == compiles


@pytest.mark.parametrize("per", ["model", "group", "tensor"])
def test_metrics_take_few_operators(per: str, device: str) -> None:
    """On request: results of single tensors are rows of a few vectors, not sums of their own."""
    found = []
    for count in (10, 300):
        model = Model(device, count, 100, clip_grad_norm=1.0, metrics=NAMES)
        model.backward(0)
        model.optimizer.step()
        with Operators() as operators:
            model.optimizer.metrics(per)
        assert not WAITING & set(operators.names)
        del operators.names["select"]  # views
        found.append(operators.names)
    assert found[0] == found[1] and found[0].total() < 60


def test_a_scale_on_the_device_is_read_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a new value of the scale nor of the threshold makes the host look at it."""
    limit = torch.tensor(1.0, device=device)
    model = Model(device, 10, 100, clip_grad_norm=limit)
    model.optimizer.grad_scale = torch.tensor(1024.0, device=device)
    names, _, _, uploaded = model.seen(model.optimizer.step, False, monkeypatch)
    if device != "cpu":  # a number in host memory may be looked at, and is
        assert not WAITING & set(names)
    assert uploaded == 0
