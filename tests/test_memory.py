"""`fusedopt.memory.estimate` against what optimizers over real tensors hold."""

import copy
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from compare import give_gradients, make_sparse
from own_rules import GOOD
from table import RULES, RuleRow
from torch import Tensor, nn

import fusedopt
from fusedopt.memory import Memory, estimate

SHAPES = ((70, 65), (4096,), (64, 3, 5, 7), (33, 129), (70, 65), (5,), (), (0, 4))
MATRICES = tuple(shape for shape in SHAPES if len(shape) == 2 and 0 not in shape)


def storage(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind tensors, each piece once."""
    pieces = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(pieces.values())


def held(optimizer: fusedopt.FusedOptimizer) -> dict[str, int]:
    """What an optimizer has allocated, by state key, hidden step counts under ``"step"``."""
    found: dict[str, list[Tensor]] = {}
    for state in optimizer.state.values():
        for key, value in state.items():
            found.setdefault(key, []).append(value)
    found.setdefault("step", []).extend(optimizer._counters.values())
    return {key: storage(tensors) for key, tensors in found.items()}


def parameters(shapes: Iterable[tuple[int, ...]], dtype: torch.dtype) -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(shape, dtype=dtype)) for shape in shapes]


def step(optimizer: fusedopt.FusedOptimizer, params: list[nn.Parameter]) -> fusedopt.FusedOptimizer:
    give_gradients(0, params)
    if isinstance(optimizer, fusedopt.SparseAdam):
        make_sparse(0, params)
    optimizer.step()
    return optimizer


def agree(memory: Memory, params: list[nn.Parameter], optimizer: fusedopt.FusedOptimizer) -> None:
    real = held(optimizer)
    assert memory.optimizer == sum(real.values())
    assert memory.weights == storage(params)
    assert memory.gradients == sum(storage([p.grad.to_dense()]) for p in params if p.grad is not None)
    assert memory.total == memory.weights + memory.gradients + sum(real.values())
    assert memory.ema == real.get("ema", 0)
    assert memory.masters == real.get("param_residual", 0) + real.get("master_param", 0)
    assert memory.scales == sum(bytes_ for key, bytes_ in real.items() if key.endswith("_scale"))
    assert memory.parameters == sum(p.numel() for p in params)
    assert memory.tensors == len(params)
    for slot, bytes_ in memory.state.items():
        assert bytes_ == real.get(slot, 0) + real.get(f"{slot}_q", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("row", RULES, ids=str)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # what it is about is what is counted
def test_rules_hold_what_was_estimated(row: RuleRow, dtype: torch.dtype) -> None:
    shapes = MATRICES if row.name in ("muon", "sparse_adam") else SHAPES
    params = parameters(shapes, dtype)
    memory = estimate(copy.deepcopy(params), row.name, **row.options)
    agree(memory, params, step(row.cls(params, **row.options), params))


OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "ema": ("adamw", dict(ema_decay=0.9, ema_warmup=True)),
    "ema of a rule without state": ("sgd", dict(ema_decay=0.9)),
    "clipped": ("adamw", dict(clip_grad_norm=1.0, skip_nonfinite=True)),
    "tensor lr": ("adam", dict(lr=torch.tensor(1e-3), amsgrad=True)),
    "muon for all": ("muon", dict(adamw={}, ema_decay=0.9)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # what it is about is what is counted
def test_options_hold_what_was_estimated(name: str, dtype: torch.dtype) -> None:
    if dtype.is_complex and name.startswith("muon"):
        dtype = torch.float16
    rule, options = OPTIONS[name]
    params = parameters(SHAPES, dtype)
    memory = estimate(params, rule, **options)
    agree(memory, params, step(RuleRow(rule).cls(params, **options), params))


FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("adamw", dict(state_dtype=name)) for name in ("bfloat16", "float16", "int8", "float8_e5m2", "int4")},
    "by slot": ("adamw", dict(amsgrad=True, state_dtype={"exp_avg": "int8", "exp_avg_sq": "uint8"})),
    "momentum": ("sgd", dict(momentum=0.9, state_dtype="int8")),
    "first values": ("adagrad", dict(initial_accumulator_value=0.3, state_dtype="int8")),
    "weight slot": ("schedule_free_adamw", dict(state_dtype="int8")),
    **{f"master {name}": ("adamw", dict(master_weights=name)) for name in ("float32", "split16", "split8", "kahan")},
    "no master": ("sgd", dict(master_weights="stochastic")),  # which counts steps, for its random numbers
    "low": ("adamw", dict(master_weights="split8", state_dtype="int8", ema_decay=0.9)),
    "lowest": ("lion", dict(master_weights="split8", state_dtype="int4", state_rounding="stochastic")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # what it is about is what is counted
def test_formats_hold_what_was_estimated(name: str, dtype: torch.dtype) -> None:
    rule, options = FORMATS[name]
    params = parameters(SHAPES, dtype)
    memory = estimate(params, rule, **options)
    agree(memory, params, step(RuleRow(rule).cls(params, **options), params))


def test_low_bit_training_takes_seven_bytes() -> None:
    params = parameters([(1024, 1024)], torch.bfloat16)
    memory = estimate(params, "adamw", master_weights="split8", state_dtype="int8")
    assert memory.per_parameter() == 2 + 2 + 1 + (1 + 4 / 64) + (1 + 2 / 64) + 4 / 2**20
    assert memory.masters == 2**20 and memory.scales == (4 + 2) * 2**14


def test_a_class_and_a_rule_of_ones_own_are_taken_as_well() -> None:
    params = parameters(SHAPES, torch.float32)
    assert estimate(params, fusedopt.AdamW, amsgrad=True) == estimate(params, "adamw", amsgrad=True)
    agree(estimate(params, GOOD), params, step(fusedopt.Optimizer(params, GOOD), params))


def test_groups_keep_their_own_options() -> None:
    first, second = parameters(SHAPES, torch.float32), parameters(SHAPES[:3], torch.float32)
    groups = [{"params": first, "ema_decay": 0.9}, {"params": second, "amsgrad": True}]
    memory = estimate(copy.deepcopy(groups), "adamw")
    agree(memory, first + second, step(fusedopt.AdamW(groups), first + second))
    assert memory.ema == sum(p.nbytes for p in first)
    assert memory.state["max_exp_avg_sq"] == sum(p.nbytes for p in second)


def test_parameters_of_one_size_may_differ() -> None:
    """In dimensions, in how rows fill groups, in whether they are trained, in dtype and that of the gradient."""
    params = parameters([(64, 64), (4096,), (33, 129), (129, 33)] * 2, torch.bfloat16)
    for p in params[4:6]:
        p.requires_grad_(False)
    params[6].grad_dtype = torch.float32
    params[7].data = params[7].data.float()
    options = dict(state_dtype="int4", master_weights="split8")
    memory = estimate(params, "adamw", **options)
    apart = [estimate([p], "adamw", **options) for p in params]
    assert memory.total == sum(each.total for each in apart)
    assert memory.trainable == sum(each.trainable for each in apart) < memory.parameters
    assert (
        len({(each.total, each.weights, each.gradients) for each in apart}) == 8 - 1
    )  # both frozen ones hold the same


class Net(nn.Module):
    """Tied embedding and head, a frozen layer, a layer that is channels-last, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(100, 16)
        self.head = nn.Linear(16, 100, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.conv = nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] # torch's stub lacks it
        self.register_buffer("table", torch.zeros(1000))


def test_of_a_module_tied_parameters_count_once_and_frozen_ones_have_no_state() -> None:
    net = Net()
    params = list(net.parameters())
    trained = [p for p in params if p.requires_grad]
    memory = estimate(net, "adamw", ema_decay=0.9)
    assert (memory.parameters, memory.trainable) == (1600 + 272 + 224, 1600 + 224)
    assert memory.tensors == len(params) == 5
    assert memory.weights == 4 * memory.parameters
    assert memory.gradients == memory.state["exp_avg"] == memory.state["exp_avg_sq"] == 4 * memory.trainable
    assert memory.ema == 4 * memory.parameters
    optimizer = fusedopt.AdamW(params, ema_decay=0.9)
    for p in trained:
        p.grad = torch.zeros_like(p)  # in the parameter's layout
    optimizer.step()
    assert memory.optimizer == sum(held(optimizer).values())
    with torch.device("meta"):
        assert estimate(Net(), "adamw", ema_decay=0.9) == memory
    tied = [net.embed.weight, net.head.weight]
    assert estimate(tied, "adamw").parameters == 1600
    assert estimate(list(net.named_parameters(remove_duplicate=False)), "adamw", ema_decay=0.9) == memory


def test_gradients_take_their_own_dtype() -> None:
    params = parameters(SHAPES, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        usual, wide = estimate(params, "adamw"), estimate(params, "adamw", grad_dtype=torch.float32)
        for p in params:
            p.grad_dtype = torch.float32
        assert estimate(params, "adamw") == wide
    assert wide.gradients == 2 * usual.gradients and wide.optimizer == usual.optimizer


def test_nothing_of_the_callers_changes() -> None:
    params = parameters(SHAPES, torch.float32)
    groups = [{"params": params, "ema_decay": 0.5}]
    before = copy.deepcopy(groups)
    estimate(groups, "adamw")
    assert all(p.grad is None and p._version == 0 for p in params)
    assert [group.keys() for group in groups] == [group.keys() for group in before]
    assert all(a is b for a, b in zip(groups[0]["params"], params, strict=True))


def test_a_low_precision_average_is_still_advised_against() -> None:
    with pytest.warns(UserWarning, match="takes its parameter's dtype"):
        estimate(parameters(SHAPES, torch.bfloat16), "adamw")


@pytest.mark.parametrize(
    ("params", "optimizer", "error", "message"),
    [
        ([], "adamw", ValueError, "params holds no parameter"),
        (nn.ReLU(), "adamw", ValueError, "params holds no parameter"),
        ([3.0], "adamw", TypeError, "params holds a float"),
        (nn.LazyLinear(3), "adamw", ValueError, "not initialised yet"),
        ([2 * torch.ones(3, requires_grad=True)], "adamw", ValueError, "computed from others"),
        ([torch.ones(3)], "adamx", ValueError, "unknown rule 'adamx'"),
        ([torch.ones(3)], torch.optim.AdamW, TypeError, "must be a class of fusedopt"),
        ([torch.ones(3)], "muon", ValueError, "only supports 2D parameters"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")  # torch's own
def test_what_cannot_be_estimated_is_named(params: Any, optimizer: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        estimate(params, optimizer)


def test_what_the_class_refuses_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate"):
        estimate(parameters(SHAPES, torch.float32), "adamw", lr=-1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'amsgrd'"):
        estimate(parameters(SHAPES, torch.float32), "adamw", amsgrd=True)
