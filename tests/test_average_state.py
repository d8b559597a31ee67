"""Options of the running average of the weights, its launches, and its way through checkpoints and copies."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from compare import (
    BACKENDS,
    EACH,
    assert_equal,
    contents,
    give_gradients,
    make_sparse,
    parameters,
    parameters_of,
    params_of,
    train,
)
from table import DTYPES, RuleRow

import fusedopt
from fusedopt import average, compiled
from fusedopt_kernels import launch

SHAPES = ((33, 7), (5,), (), (0,))


def weight(decay: float, n: int) -> float:
    """Share of the new value in the average, after n averaged steps."""
    return 1.0 if n == 0 else 1.0 - decay


# --------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_and_tensors(backend: str, device: str) -> None:
    """A decay for each group, one of them a tensor that changes where it is; none in the third group."""
    decay = torch.tensor(0.5, dtype=torch.float64, device=device)
    params = parameters(device, (33, 7), (5,), (4,))
    options = ({"ema_decay": decay}, {"ema_decay": 0.25}, {"ema_decay": None})
    groups = [{"params": [p], **few} for p, few in zip(params, options, strict=True)]
    optimizer = fusedopt.SGD(groups, lr=0.1, ema_decay=0.75, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    plan, expected = None, [torch.zeros(()), torch.zeros(())]
    for n, changed in enumerate((0.5, 0.125, 0.0, 0.25)):
        decay.fill_(changed)
        train([n], optimizer)
        assert plan is None or plan is optimizer._plan
        plan = optimizer._plan
        for i, q in enumerate((weight(changed, n), weight(0.25, n))):
            new, old = params[i].detach().double().cpu(), expected[i]
            expected[i] = old + q * (new - old)
            # four steps of 2·ε·scale each; values are below 2
            torch.testing.assert_close(
                optimizer.state[params[i]]["ema"].double().cpu(), expected[i], rtol=0, atol=4 * 2 * 2 * 2**-23
            )
    assert "ema" not in optimizer.state[params[2]] and len(optimizer.ema_parameters()) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (dict(ema_decay=1.0), ValueError, "ema_decay"),
        (dict(ema_decay=-0.1), ValueError, "ema_decay"),
        (dict(ema_decay=float("nan")), ValueError, "ema_decay"),
        (dict(ema_decay="0.9"), TypeError, "ema_decay"),
        (dict(ema_decay=torch.ones(2)), ValueError, "ema_decay"),
        (dict(ema_decay=torch.ones((), dtype=torch.int64)), TypeError, "ema_decay"),
        (dict(ema_warmup=True), ValueError, "ema_warmup"),
        (dict(ema_decay=0.9, ema_warmup=1), ValueError, "ema_warmup"),
    ],
    ids=str,
)
def test_bad_values_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fusedopt.AdamW(parameters("cpu"), **options)


# -------------------------------------------------------------------------------------------------------- launches
def launches(cls: Any, params: list[torch.Tensor], idle: list[torch.Tensor], **options: Any) -> list[str]:
    optimizer = cls([*params, *idle], **options, ema_decay=0.9, backend="triton")
    optimizer._launcher = recorder = launch.Recorder()
    give_gradients(0, params)
    optimizer.step()
    return [spec.name for spec, _, _ in recorder.record]


@pytest.mark.parametrize("copies", [1, 30])
def test_launches(copies: int, device: str) -> None:
    """None more where every parameter has a gradient under an element-wise rule, else two, and one for each dtype."""

    def some(dtype: torch.dtype = torch.float32) -> list[Any]:
        return parameters(device, *(SHAPES[:2] * copies), dtype=dtype)

    pass_of_its_own = ["average_scalars", "average"]
    assert launches(fusedopt.AdamW, some(), []) == ["adamw_scalars", "adamw"]
    assert launches(fusedopt.AdamW, some(), [], clip_grad_norm=1.0) == ["norm", "adamw_scalars", "adamw"]
    assert launches(fusedopt.AdamW, some(), some()) == ["adamw_scalars", "adamw", *pass_of_its_own]
    low = some(torch.bfloat16)
    assert launches(fusedopt.AdamW, some(), [*some(), *low]) == ["adamw_scalars", "adamw", *pass_of_its_own, "average"]
    assert launches(fusedopt.AdamW, [], some()) == pass_of_its_own
    for cls in (fusedopt.Muon, fusedopt.Adafactor):
        names = launches(cls, parameters(device, *[(4, 4)] * copies), parameters(device, *[(5, 3)] * copies))
        assert names[-2:] == pass_of_its_own and len([name for name in names if "average" in name]) == 2


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose
def test_sm_90_code() -> None:
    """Neither spills nor barriers, in a pass of its own and in the update."""
    from triton.backends.compiler import GPUTarget

    from fusedopt.inspect import sass

    done: dict[launch.KernelSpec, None] = {}
    for dtype in DTYPES:
        optimizer = fusedopt.AdamW(parameters("cpu", (5,), (7,), dtype=dtype), ema_decay=0.9, backend="triton")
        optimizer._launcher = recorder = launch.Recorder()
        give_gradients(0, params_of(optimizer)[:1])
        optimizer.step()
        done.update(dict.fromkeys(spec for spec, _, _ in recorder.record))
    for spec in done:
        code = sass.disassemble(launch.compile_for(spec, GPUTarget("cuda", 90, 32)).asm["cubin"])
        if not spec.name.endswith("scalars"):
            assert code.stack == 0 and code.count("BAR") == 0, (spec.name, code.stack)
            assert code.registers <= (32 if spec.name == "average" else 112), (spec.name, code.registers)
    assert len([spec for spec in done if spec.name == "average"]) == 4


# ----------------------------------------------------------------------------------------------- checkpoints, copies
def trained(backend: str, device: str, dtype: torch.dtype = torch.float32) -> Any:
    """Three steps on; the last parameter never gets a gradient."""
    params = parameters(device, *SHAPES, (4,), dtype=dtype)
    optimizer = fusedopt.AdamW(params, lr=0.1, ema_decay=0.9, ema_warmup=True, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    for t in range(3):
        give_gradients(t, params[:-1])
        optimizer.step()
    return optimizer


def go_on(*optimizers: Any) -> None:
    """Two more steps, all with the same gradients; they end equal."""
    for t in (3, 4):
        give_gradients(t, *(params_of(optimizer)[:-1] for optimizer in optimizers))
        for optimizer in optimizers:
            optimizer.step()
    for other in optimizers[1:]:
        assert_equal(optimizers[0], other)
    assert all(state["ema_step"] == 5 for _, state in contents(optimizers[0]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose
def test_saved_and_loaded(dtype: torch.dtype, backend: str, device: str) -> None:
    """Bit for bit; an average keeps its dtype, whatever its parameter's."""
    ours = trained(backend, device, dtype)
    file = io.BytesIO()
    torch.save(ours.state_dict(), file)
    file.seek(0)
    other = fusedopt.AdamW([p.detach().clone().requires_grad_() for p in params_of(ours)], backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    other.load_state_dict(torch.load(file))
    assert other.param_groups[0]["fusedopt"]["ema_decay"] == 0.9
    go_on(ours, other)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_copies(make: Any, backend: str, device: str) -> None:
    ours = trained(backend, device)
    go_on(ours, make(ours))


@pytest.mark.parametrize("row", EACH, ids=str)
def test_torch_loads_what_we_save(row: RuleRow, device: str) -> None:
    """Also where some parameters never had a gradient: torch looks for numbers wherever there is any state."""
    params = [*parameters_of(row.cls, device), *parameters_of(row.cls, device, seed=1)]
    optimizer = row.cls(params, **row.options, ema_decay=0.9)
    theirs = row.torch_cls([p.detach().clone().requires_grad_() for p in params], **row.options)
    for t in range(2):
        for few in (params, params_of(theirs)):
            half = few[: len(few) // 2]
            give_gradients(t, half)
            if row.name == "sparse_adam":
                make_sparse(t, half)
        (optimizer if t == 0 else theirs).step()
        if t == 0:
            theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def test_torch_leaves_averages_alone(device: str) -> None:
    """What it saves continues here, with averages that stood still."""
    ours = trained("eager", device)
    params = [p.detach().clone().requires_grad_() for p in params_of(ours)]
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    before = [theirs.state[p]["ema"].clone() for p in params]
    give_gradients(3, params[:-1])
    theirs.step()
    for p, ema in zip(params, before, strict=True):
        assert torch.equal(theirs.state[p]["ema"], ema)
    again = fusedopt.AdamW(params, ema_decay=0.9)
    again.load_state_dict(theirs.state_dict())
    again.step()
    assert all(again.state[p]["ema_step"] == 4 for p in params)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_average_begun_in_mid_run_starts_from_the_weights(backend: str, device: str) -> None:
    theirs = torch.optim.AdamW(parameters(device, *SHAPES))
    train(range(2), theirs)
    ours = fusedopt.AdamW(params_of(theirs), ema_decay=0.9, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    ours.load_state_dict(theirs.state_dict())
    for step in (1, 2):
        train([step], ours)
        same = [torch.equal(state["ema"], p) for p, state in contents(ours) if p.numel()]
        assert all(same) if step == 1 else not any(same)


@pytest.mark.parametrize("backend", BACKENDS)
def test_state_moved_away_comes_back(backend: str, device: str) -> None:
    ours, other = trained(backend, device), trained(backend, device)
    other.to("cpu")
    for p, state in contents(other):  # what a checkpoint in another layout brings
        state["ema"] = state["ema"].t().contiguous().t() if p.dim() == 2 else state["ema"]
    go_on(ours, other)
    assert all(state["ema"].device == p.device and state["ema"].stride() == p.stride() for p, state in contents(other))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wrong", [torch.zeros(2), torch.zeros(33, 7, dtype=torch.bfloat16)], ids=["shape", "dtype"])
def test_an_average_that_does_not_fit_is_refused(wrong: torch.Tensor, backend: str, device: str) -> None:
    ours = trained(backend, device)
    p = params_of(ours)[0]
    ours.state[p]["ema"] = wrong.to(device)
    before = p.detach().clone()
    with pytest.raises(RuntimeError, match="'ema' of shape"):
        go_on(ours)
    assert torch.equal(p, before)


def test_a_capture_makes_no_average(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = fusedopt.AdamW(parameters("cpu", (3,)), ema_decay=0.9)
    monkeypatch.setattr(average, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match="step once before the capture"):
        optimizer.ema_parameters()


@pytest.mark.filterwarnings("ignore:the compiler gave")  # aot_eager always hands over copies
@pytest.mark.filterwarnings("ignore:.*Profiler record function")  # torch's own hook around step
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's compiler uses its own old API
def test_a_compiled_step_averages(device: str) -> None:
    """Averages of parameters without a gradient are among what the graph knows to be written."""
    torch._dynamo.reset()
    ours, plain = trained("eager", device), trained("eager", device)
    step = torch.compile(ours.step, fullgraph=True, backend="aot_eager")
    for t in range(3, 6):
        give_gradients(t, params_of(ours)[:-1], params_of(plain)[:-1])
        step()
        plain.step()
        assert_equal(ours, plain)
    written = {id(x) for x in compiled._tensors(ours)[2]}
    assert written == {id(x) for _, state in contents(ours) for x in state.values()}
