"""The running average of the weights: against AveragedModel and an oracle, under every rule, format and layout."""

from typing import Any

import numpy as np
import pytest
import torch
from compare import BACKENDS, contents, give_gradients, make_sparse, parameters, parameters_of, params_of, train
from table import DTYPES, MATRIX_RULES, RULES, SPARSE_RULES, RuleRow, private
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedopt
from fusedopt_kernels import table
from fusedopt_kernels.numerics import compute_type
from fusedopt_kernels.param import split16

SHAPES = ((33, 7), (5,), (), (0,), (2 * table.CHUNK + 3,))
PLAIN = [row for row in (*RULES, *MATRIX_RULES, *SPARSE_RULES) if row.label == "plain"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype"),  # low precision on purpose
    pytest.mark.filterwarnings("ignore:a (parameter with gaps|gradient with strides)"),  # likewise
]


def held(optimizer: Any, p: torch.Tensor) -> torch.Tensor:
    """What a parameter's format holds, in the dtype of its average."""
    p, residual = p.detach(), optimizer.state.get(p, {}).get("param_residual")
    if residual is not None:
        return split16.load_eager(p, residual)
    return p.to(p.dtype if p.is_complex() else compute_type(p.dtype), copy=True)


def weight(decay: float, warmup: bool, n: int) -> float:
    """Share of the new value in the average, after n averaged steps."""
    return 1.0 if n == 0 else 1.0 - (min(decay, (1 + n) / (10 + n)) if warmup else decay)


class Follower:
    """Renews averages of its own beside an optimizer's, in the arithmetic of the compute type."""

    def __init__(self, optimizer: Any, decay: float = 0.9, warmup: bool = False) -> None:
        self.optimizer, self.decay, self.warmup, self.n = optimizer, decay, warmup, 0
        self.averages = [held(optimizer, p) for p in params_of(optimizer)]

    def check(self) -> None:
        """After another step: the optimizer's averages are these, bit for bit."""
        q = weight(self.decay, self.warmup, self.n)
        self.n += 1
        for i, (p, state) in enumerate(contents(self.optimizer)):
            old, new = self.averages[i], held(self.optimizer, p)
            if q == 1.0:
                self.averages[i] = new
            else:  # a Python number is rounded to the tensors' type
                self.averages[i] = (old if q < 0.5 else new) + (q if q < 0.5 else q - 1.0) * (new - old)
            assert state["ema_step"] == self.n and state["ema_step"].shape == ()
            assert torch.equal(state["ema"], self.averages[i]) and state["ema"].dtype == new.dtype


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.detach().contiguous().view(torch.uint8)


# ------------------------------------------------------------------------------------------------------ references
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("cls", [fusedopt.AdamW, fusedopt.SGD])
def test_is_torchs_averaged_model(cls: Any, dtype: torch.dtype, backend: str, device: str) -> None:
    """Each side rounds (|ema| + 3·0.1·|p − ema|)·ε/2 ≤ 0.8·ε·scale away in a step, and keeps 0.9 of what it had."""
    net = torch.nn.ParameterList(parameters(device, *SHAPES, dtype=dtype))
    theirs = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    ours = cls(net, lr=0.1, ema_decay=0.9, backend=backend)
    for t in range(12):
        train([t], ours)
        theirs.update_parameters(net)
    for p, x, y in zip(net, ours.ema_parameters(), theirs.parameters(), strict=True):
        scale = max(1.0, float(p.detach().abs().max())) if p.numel() else 1.0
        torch.testing.assert_close(x, y.detach(), rtol=0, atol=12 * 2 * torch.finfo(dtype).eps * scale)
        assert not p.numel() or not torch.equal(x, p)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("warmup", [False, True], ids=["constant", "warm-up"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_the_oracle(dtype: torch.dtype, warmup: bool, backend: str, device: str) -> None:
    """Rounding takes (|ema| + 3·½·|p − ema|)·ε/2 ≤ 2·ε·scale a step, with ε of the average's type, not the weight's."""
    optimizer = fusedopt.SGD(
        parameters(device, (33, 7), (), dtype=dtype), lr=0.1, ema_decay=0.5, ema_warmup=warmup, backend=backend  # pyright: ignore[reportArgumentType] # one of BACKENDS
    )  # fmt: skip
    oracle = [np.zeros(())] * 2
    for n in range(14):
        train([n], optimizer)
        q = np.longdouble(weight(0.5, warmup, n))
        for i, p in enumerate(params_of(optimizer)):
            x = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
            oracle[i] = oracle[i] + q * (x.double().cpu().numpy().astype(np.longdouble) - oracle[i])
    real = compute_type(dtype)
    for (p, state), expected in zip(contents(optimizer), oracle, strict=True):
        ema = state["ema"]
        assert ema.dtype == (dtype if dtype.is_complex else real) and state["ema_step"] == 14
        ema = (torch.view_as_real(ema) if ema.is_complex() else ema).double().cpu().numpy()
        scale = max(1.0, float(p.detach().abs().max()))
        assert np.abs(ema - expected).max() <= 14 * 2 * torch.finfo(real).eps * scale


# ------------------------------------------------------------------------------------------------- rules, formats
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", PLAIN, ids=str)
def test_every_rule_is_averaged(row: RuleRow, backend: str, device: str) -> None:
    optimizer = row.cls(
        parameters_of(row.cls, device), **row.options, ema_decay=0.9, ema_warmup=True, backend=backend
    )  # fmt: skip
    follower = Follower(optimizer, warmup=True)
    for t in range(4):
        train([t], optimizer)
        follower.check()


@pytest.mark.parametrize("row", [row for row in PLAIN if row not in MATRIX_RULES], ids=str)
def test_kernels_equal_twins(row: RuleRow, device: str) -> None:
    shapes = SHAPES if row.name in ("adamw", "sgd") else ()
    make: Any = (lambda: parameters(device, *shapes)) if shapes else (lambda: parameters_of(row.cls, device))
    both = [row.cls(make(), **row.options, ema_decay=0.9, backend=b) for b in BACKENDS]
    train(range(3), *both)
    for (_, state), (_, other) in zip(*map(contents, both), strict=True):
        assert torch.equal(state["ema"], other["ema"]) and state["ema_step"] == other["ema_step"] == 3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_chunks(dtype: torch.dtype, backend: str, device: str) -> None:
    """Full chunks and tails, addresses off 16 bytes, other strides, gaps; with and without a gradient."""

    def make(seed: int) -> list[torch.Tensor]:
        shapes = ((2 * table.CHUNK + 3,), (table.CHUNK + 2,), (2, 3, 4, 4), (6, 8), ())
        whole, odd, image, gaps, one = (p.detach() for p in parameters(device, *shapes, dtype=dtype, seed=seed))
        return [whole, odd[1:], image.to(memory_format=torch.channels_last), gaps[:, :5], gaps.t()[6:].t(), one]

    params = [p.requires_grad_() for p in make(0)]
    idle = [p.requires_grad_(i % 2 == 0) for i, p in enumerate(make(1))]
    optimizer: Any = fusedopt.AdamW([*params, *idle], lr=0.1, ema_decay=0.9, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    follower = Follower(optimizer)
    for t in range(3):
        give_gradients(t, params)
        with torch.no_grad():
            idle[0].add_(1.0)
        optimizer.step()
        follower.check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_split_weights_are_averaged_whole(backend: str, device: str) -> None:
    """Also on a step that leaves them without a gradient."""
    optimizer = fusedopt.AdamW(parameters(device, *SHAPES, dtype=torch.bfloat16), backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    private(optimizer, master_weights="split16", ema_decay=0.9)
    follower = Follower(optimizer)
    for t in range(4):
        give_gradients(t, params_of(optimizer))
        if t == 2:
            params_of(optimizer)[0].grad = params_of(optimizer)[4].grad = None
        optimizer.step()
        follower.check()
    p, state = contents(optimizer)[0]
    assert not torch.equal(held(optimizer, p), p.float()) and not torch.equal(state["ema"], state["ema"].bfloat16())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_count(backend: str, device: str) -> None:
    """A parameter made under a float64 default dtype counts its steps in it."""
    optimizer = fusedopt.SGD(parameters(device, (5,), (7,)), lr=0.1, ema_decay=0.9, ema_warmup=True, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    wide = optimizer.state[params_of(optimizer)[0]]["ema_step"] = torch.zeros((), dtype=torch.float64, device=device)
    follower = Follower(optimizer, warmup=True)
    for t in range(3):
        train([t], optimizer)
        follower.check()
    assert wide == 3 and wide is optimizer.state[params_of(optimizer)[0]]["ema_step"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_average_is_the_parameter_bit_for_bit(backend: str, device: str) -> None:
    """Zeros of both signs, infinities, and whatever the average held before."""
    p = torch.nn.Parameter(torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 3e38, 1e-45, 1 / 3], device=device))
    before = bits(p).clone()
    optimizer = fusedopt.AdamW([p], lr=0.0, ema_decay=0.9, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    optimizer.state[p]["ema"] = torch.full_like(p, torch.nan).detach()
    for step in (1, 2):
        p.grad = torch.zeros_like(p)
        optimizer.step()
        assert torch.equal(bits(p), before)
        if step == 1:
            assert torch.equal(bits(optimizer.state[p]["ema"]), before)


# ------------------------------------------------------------------------------------- what a step leaves as it is
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [RULES[7], MATRIX_RULES[0], MATRIX_RULES[2], SPARSE_RULES[0]], ids=str)
def test_parameters_without_a_gradient_are_averaged(row: RuleRow, backend: str, device: str) -> None:
    """Always, on some steps, on all steps; changed by others meanwhile."""
    params, others = parameters_of(row.cls, device), parameters_of(row.cls, device, seed=1)
    others[0].requires_grad_(False)
    optimizer = row.cls([*params, *others], **row.options, ema_decay=0.9, backend=backend)
    follower = Follower(optimizer)
    for t in range(6):
        few = params if t % 2 else params[1:]
        for p in params:
            p.grad = None
        if t != 3:  # a step with no gradient at all
            give_gradients(t, few)
            if row in SPARSE_RULES:
                make_sparse(t, few)
        others[0].mul_(0.5)
        optimizer.step()
        follower.check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("moved", ["ema", "param"])
def test_new_memory_is_seen(moved: str, backend: str, device: str) -> None:
    """Nothing else changes between the steps, and the rule has no state of its own."""
    params = parameters(device, (5,), (7,))
    optimizer = fusedopt.SGD(params, lr=0.1, ema_decay=0.9, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    follower, old = Follower(optimizer), []
    for t in range(4):
        give_gradients(t, params[:1])
        if t == 2:
            for p in params[1:] if moved == "param" else [optimizer.state[p]["ema"] for p in params]:
                old.append(p.data)
                p.data = p.detach() * (2.0 if moved == "param" else 1.0)
        optimizer.step()
        follower.check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["skip_nonfinite", "found_inf"])
@pytest.mark.parametrize("row", [RULES[7], MATRIX_RULES[0], MATRIX_RULES[2], SPARSE_RULES[0]], ids=str)
def test_a_skipped_step_averages_nothing(row: RuleRow, how: str, backend: str, device: str) -> None:
    """With gradients and without any."""
    on_device = how == "found_inf" or row in SPARSE_RULES  # the norm of sparse gradients is not taken
    params, frozen = parameters_of(row.cls, device), parameters_of(row.cls, device, seed=1)[0].requires_grad_(False)
    options = {} if on_device else {"skip_nonfinite": True}
    optimizer = row.cls([*params, frozen], **row.options, **options, ema_decay=0.9, backend=backend)
    follower = Follower(optimizer)
    for t, bad in enumerate((True, False, True, False, True)):
        few = params if t != 4 or not on_device else []
        for p in params:
            p.grad = None
        give_gradients(t, few)
        if row in SPARSE_RULES:
            make_sparse(t, few)
        frozen.add_(1.0)
        if on_device:
            optimizer.found_inf = torch.tensor(float(bad), device=device)
        elif bad:
            params[0].grad = torch.full_like(params[0], torch.inf)
        before = [{key: x.clone() for key, x in state.items()} for _, state in contents(optimizer)]
        optimizer.step()
        if bad and t:
            for was, (_, state) in zip(before, contents(optimizer), strict=True):
                assert all(torch.equal(state[key], x) for key, x in was.items())
        elif not bad:
            follower.check()
    assert follower.n == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_elements_are_averaged_as_they_are(backend: str, device: str) -> None:
    optimizer = fusedopt.AdamW(parameters(device), lr=0.1, ema_decay=0.9, backend=backend)  # pyright: ignore[reportArgumentType] # one of BACKENDS
    p = params_of(optimizer)[0]
    optimizer.set_update_mask(p, p.detach() > 0)
    start, follower = p.detach().clone(), Follower(optimizer)
    for t in range(3):
        train([t], optimizer)
        follower.check()
    kept = start <= 0
    torch.testing.assert_close(optimizer.state[p]["ema"][kept], start[kept], rtol=0, atol=0)
