"""What `opt.metrics()` costs and outlasts, what is refused. Its numbers are checked in test_metrics.py."""

import copy
import pickle
from typing import Any

import pytest
import torch
from compare import BACKENDS, give_gradients, parameters, params_of, train
from torch.utils._python_dispatch import TorchDispatchMode

import fusedopt
from fusedopt.metrics import NAMES
from fusedopt_kernels import launch

AdamW: Any = fusedopt.AdamW
SHAPES = ((33, 7), (5,), (), (0,), (40000,))
CHANGES = ("param_norm", "update_norm", "update_ratio")


@pytest.mark.parametrize("backend", BACKENDS)
def test_counts_outlast_plans(backend: str, device: str) -> None:
    """Copies and pickles keep what is asked for; their counts begin anew."""
    limit = dict(clip_grad_norm=1e-3, metrics=("update_ratio", "clipped_share"))
    optimizer = AdamW(parameters(device), **limit, backend=backend)
    train(range(2), optimizer)
    give_gradients(2, params_of(optimizer))
    params_of(optimizer)[0].grad = None  # another plan
    optimizer.step()
    optimizer.add_param_group({"params": parameters(device, (2, 3)), "clip_grad_norm": 1e9})
    train([3], optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[0]["fusedopt"]["clip_grad_norm"] = 1e9  # clips no more
    train([4], optimizer)
    assert float(optimizer.metrics()["clipped_share"]) == 4 / 5
    for again in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        with pytest.raises(RuntimeError, match="call step"):
            again.metrics()
        train([5], again)
        assert set(again.metrics()) == set(optimizer.metrics()) and float(again.metrics()["clipped_share"]) == 0.0


def test_results_stay_when_the_next_step_comes(device: str) -> None:
    optimizer = AdamW(parameters(device), clip_grad_norm=1.0, metrics=NAMES, backend="triton")
    train([0], optimizer)
    found = [optimizer.metrics(per) for per in ("model", "group", "tensor")]
    before = copy.deepcopy(found)
    train([1], optimizer)
    torch.testing.assert_close(found, before, rtol=0, atol=0, equal_nan=True)
    assert float(optimizer.metrics()["grad_norm"]) != float(found[0]["grad_norm"])


class NoSync(TorchDispatchMode):
    """Refuses what would wait for a device."""

    WAITING = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "_to_copy", "copy_")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITING, name
        if name == "segment_reduce":
            assert (kwargs or {}).get("unsafe"), "it would look at the lengths"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("per", ["model", "group", "tensor"])
def test_nothing_waits_for_the_device(per: str, device: str) -> None:
    optimizer = AdamW(
        [{"params": parameters(device, *SHAPES)}, {"params": parameters(device, (3,))}], clip_grad_norm=1.0,
        ema_decay=0.9, skip_nonfinite=True, metrics=NAMES, backend="triton",
    )  # fmt: skip
    optimizer._launcher = launch.Recorder()
    train(range(2), optimizer)
    give_gradients(2, params_of(optimizer))
    with NoSync():
        optimizer.step()
        optimizer.metrics(per)


def test_what_is_not_asked_for_costs_nothing(device: str) -> None:
    """The same kernels over the same tables, whatever a step has anyway."""

    def launches(**options: Any) -> list[Any]:
        optimizer = AdamW(parameters(device, *SHAPES), **options, backend="triton")
        optimizer._launcher = recorder = launch.Recorder()
        train([0], optimizer)
        optimizer.metrics()
        return [(spec, grid) for spec, grid, _ in recorder.record]

    plain, clipped = launches(), launches(clip_grad_norm=1.0)
    free = ("clip_coefficient", "clipped_share", "skipped_steps")
    assert launches(metrics=free) == plain and len(plain) == 2
    assert launches(metrics=(*free, "nonfinite_steps"), clip_grad_norm=1.0) == clipped and len(clipped) == 3
    measured = launches(metrics=CHANGES)
    assert measured[0] == plain[0] and measured[1] != plain[1] and len(measured) == 2
    assert [spec.name for spec, _ in launches(metrics=("grad_norm",))] == ["norm", "adamw_scalars", "adamw"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_gradients_measures_nothing(backend: str, device: str) -> None:
    optimizer = AdamW(parameters(device), metrics=NAMES, ema_decay=0.9, backend=backend)
    optimizer.step()
    assert [optimizer.metrics(per) for per in ("model", "group", "tensor")] == [{}, {}, {}]
    train([0], optimizer)
    assert set(optimizer.metrics()) == set(NAMES)
    optimizer.zero_grad()
    optimizer.step()
    assert set(optimizer.metrics()) == {"skipped_steps", "clipped_share"}


def test_bad_input_is_refused(device: str) -> None:
    for metrics, error, message in (
        (("grad_norm", "loss"), ValueError, "'loss' is not known; choose from grad_norm"),
        ("grad_norm", TypeError, r"sequence of names, such as \('grad_norm',\)"),
    ):
        with pytest.raises(error, match=message):
            AdamW(parameters(device), metrics=metrics)
    with pytest.raises(ValueError, match="metrics belongs to the whole optimizer"):
        AdamW([{"params": parameters(device), "metrics": ("grad_norm",)}])
    with pytest.raises(ValueError, match=r"metrics update_norm: .* not measured under adafactor; leave them out"):
        fusedopt.Adafactor(parameters(device, (3, 4)), metrics=("grad_norm", "update_norm"))
    optimizer = AdamW(parameters(device))
    with pytest.raises(RuntimeError, match=r"there was none yet: call step\(\)"):
        optimizer.metrics()
    train([0], optimizer)
    with pytest.raises(ValueError, match="per must be 'model', 'group', 'tensor', got 'layer'"):
        optimizer.metrics(per="layer")
