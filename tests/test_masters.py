"""`master_state_dict`, `load_master_state_dict`, and fp32 masters of parameters that something else writes to."""

import copy
from typing import Any

import pytest
import torch
from compare import BACKENDS, assert_equal, contents, give_gradients, params_of, train
from test_checkpoint import by_torch_save, copies, saved
from test_checkpoint_formats import ADAMW, MASTERS, ROWS, bit_equal, made, net, weights

import fusedopt
from fusedopt.formats import WEIGHTS
from fusedopt.masters import held

pytestmark = pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose

BF16 = [*MASTERS]
FP16 = [m for m in MASTERS if m not in ("split16", "split8")]
EACH = [(m, torch.bfloat16) for m in BF16] + [(m, torch.float16) for m in FP16] + [(None, torch.float32)]


def uneven(p: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Numbers that use all of fp32's mantissa."""
    return torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p.device)


# --------------------------------------------------------------------------------------------- reading and writing
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("master", "dtype"), EACH, ids=str)
def test_a_round_trip_is_exact(master: str | None, dtype: torch.dtype, backend: str, device: str) -> None:
    """Into another optimizer, before its first step: it holds the same bits, and steps on like the first."""
    source = made(ADAMW, weights(device, dtype), backend, master_weights=master)
    train((0, 1), source)
    masters = source.master_state_dict()
    assert list(masters) == [0, 1]
    for x, (p, state) in zip(masters.values(), contents(source), strict=True):
        assert bit_equal(x, held(p, state)) and x.dtype == torch.float32 and x.data_ptr() != p.data_ptr()
    target = made(ADAMW, weights(device, dtype), backend, master_weights=master)
    versions = [p._version for p in params_of(target)]
    target.load_master_state_dict(masters)
    assert all(p._version > v for p, v in zip(params_of(target), versions, strict=True))
    assert all(bit_equal(x, y) for x, y in zip(masters.values(), target.master_state_dict().values(), strict=True))
    if master == "kahan":  # a value half between two weights has two forms, of which a step may leave either
        return
    for (p, old), (q, new) in zip(contents(source), contents(target), strict=True):
        assert bit_equal(p, q)
        assert all(bit_equal(old[key], new[key]) for key in ("param_residual", "master_param") if key in old)
    target.load_state_dict(saved(source))
    train((2,), source, target)
    assert_equal(source, target)


@pytest.mark.parametrize(("master", "dtype"), EACH, ids=str)
def test_any_values_are_held_as_exactly_as_the_format_can(master: str | None, dtype: torch.dtype, device: str) -> None:
    ours = made(ADAMW, weights(device, dtype), master_weights=master)
    train((0,), ours)
    state = [v for _, s in contents(ours) for v in s.values()]
    given = {i: uneven(p, i) for i, p in enumerate(params_of(ours))}
    kept = copy.deepcopy(given)
    ours.load_master_state_dict(given)
    assert all(bit_equal(given[i], kept[i]) for i in given)  # the user's tensors are not used up
    assert all(a is b for a, b in zip(state, (v for _, s in contents(ours) for v in s.values()), strict=True))
    eps = torch.finfo(dtype).eps
    # p and c keep half an ulp of c, which is at most half an ulp of p; c may be subnormal, 2⁻²⁴ apart, in fp16
    bound = {"split8": 2.0**-16, "kahan": eps * eps / 4, "stochastic": eps / 2, None: eps / 2}.get(master, 0.0)
    for i, x in ours.master_state_dict().items():
        error = (x.double() - given[i].double()).abs()
        least = 2.0**-25 if master == "kahan" and dtype == torch.float16 else 0.0
        wide = 0.0 if dtype == torch.float32 else bound
        assert (error <= wide * given[i].double().abs() + least).all()
        p = params_of(ours)[i]
        # the weight is the nearest of its dtype: half a step of the power of two below; of 24 bits under split8
        half = torch.frexp(given[i].double())[1].double().sub(2).exp2() * eps
        assert ((p.double() - given[i].double()).abs() <= half * (1 + 2.0**-7) + 2.0**-25).all()
    train((1,), ours)


def test_names_where_the_optimizer_has_them(device: str) -> None:
    module = net(device)
    ours = made(ADAMW, module.named_parameters(), master_weights="split16")
    train((0,), ours)
    masters = ours.master_state_dict()
    assert list(masters) == [name for name, _ in module.named_parameters()]
    wide = net(device).float()
    wide.load_state_dict(masters)  # a model in fp32 takes them as they are
    module.load_state_dict(net(device).state_dict())
    ours.load_master_state_dict(wide.state_dict())
    assert all(bit_equal(x, masters[name]) for name, x in ours.master_state_dict().items())
    groups = [{"params": [("a", torch.nn.Parameter(torch.zeros(2)))]} for _ in range(2)]
    with pytest.raises(ValueError, match="two parameters have the name 'a'"):
        fusedopt.AdamW(groups).master_state_dict()


def test_every_parameter_is_there_whatever_its_group_says(device: str) -> None:
    """Numbers go through all groups; frozen parameters keep their bits too; fp64 stays fp64."""
    low, frozen, half, double = (
        torch.nn.Parameter(torch.ones(3, dtype=dtype, device=device))
        for dtype in (torch.bfloat16, torch.bfloat16, torch.float16, torch.float64)
    )
    frozen.requires_grad_(False)
    groups = [{"params": [low, frozen], "master_weights": "split16"}, {"params": [half, double]}]
    ours = fusedopt.AdamW(groups)
    given = {i: uneven(p, i).to(torch.float64 if i == 3 else torch.float32) / 3 for i, p in enumerate(params_of(ours))}
    ours.load_master_state_dict(given)
    found = ours.master_state_dict()
    assert all(bit_equal(found[i], given[i]) for i in (0, 1, 3))
    assert bit_equal(found[2], given[2].half().float())
    give_gradients(0, [low, half, double])
    ours.step()
    assert bit_equal(ours.master_state_dict()[1], given[1])


def test_an_average_begun_by_loading_begins_at_what_was_loaded(device: str) -> None:
    ours = made(ADAMW, weights(device), master_weights="split16", ema_decay=0.5)
    given = {i: uneven(p, i) for i, p in enumerate(params_of(ours))}
    ours.load_master_state_dict(given)
    assert all(bit_equal(ema, given[i]) for i, ema in enumerate(ours.ema_parameters()))


REFUSED: dict[str, tuple[type[Exception], str, Any]] = {
    "missing": (ValueError, "lacks 1; it must have the keys", lambda d: d.pop(1)),
    "unknown": (ValueError, "has unknown 7, 'a'", lambda d: d.update({"a": d[0], 7: d[0]})),
    "shape": (ValueError, r"1 has shape \(4,\) and dtype torch.float32, its parameter \(5,\)",
              lambda d: d.update({1: d[1][1:]})),
    "kind": (ValueError, "dtype torch.complex64", lambda d: d.update({1: d[1].to(torch.complex64)})),
    "type": (TypeError, "1 must be a tensor, got list", lambda d: d.update({1: [0.0] * 5})),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(what: str, device: str) -> None:
    ours = made(ADAMW, weights(device), master_weights="split8")
    train((0,), ours)
    before, given = copy.deepcopy(ours), {i: uneven(p) for i, p in enumerate(params_of(ours))}
    error, message, change = REFUSED[what]
    change(given)
    with pytest.raises(error, match=message):
        ours.load_master_state_dict(given)
    assert_equal(ours, before)


def test_averages_are_not_taken_for_weights(device: str) -> None:
    ours = made(ADAMW, weights(device), master_weights="split8", ema_decay=0.9)
    train((0,), ours)
    masters = ours.master_state_dict()
    with ours.swap_ema():
        for call in (ours.master_state_dict, lambda: ours.load_master_state_dict(masters)):
            with pytest.raises(RuntimeError, match=r"inside `with optimizer.swap_ema"):
                call()
    with pytest.raises(TypeError, match="takes a dict by name or number, got list"):
        ours.load_master_state_dict(list(masters.values()))


# --------------------------------------------------------------------------------- fp32 masters and other writers
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", ROWS[:2], ids=str)
def test_a_master_follows_what_something_else_writes(row: Any, backend: str, device: str) -> None:
    """Where it no longer rounds to the parameter; elsewhere it keeps every bit. The next step starts from there."""
    ours = made(row, weights(device), backend, master_weights="float32")
    train((0, 1), ours)
    plan, before = ours._plan, ours.master_state_dict()
    p = params_of(ours)[0]
    new = p.detach().clone()
    new[3:7] = 0.4375
    torch.nn.ParameterList([p]).load_state_dict({"0": new})
    expected = before[0].clone()
    expected[3:7] = 0.4375
    assert bit_equal(ours.master_state_dict()[0], expected)
    twin = made(row, copies(params_of(ours)), backend, master_weights="float32")
    twin.load_state_dict(saved(ours))
    for q, x in zip(params_of(twin), (expected, before[1]), strict=True):
        twin.state[q]["master_param"] = x
    train((2,), ours, twin)
    assert ours._plan is plan
    assert_equal(ours, twin)
    assert not torch.equal(p[3:7].float(), before[0][3:7])


def test_a_master_follows_before_the_first_step_and_without_a_plan(device: str) -> None:
    ours = made(ADAMW, weights(device), master_weights="float32")
    ours.materialize_state()
    for way in ("made before", "plan gone"):
        with torch.no_grad():
            params_of(ours)[1].fill_(0.25 if way == "made before" else 0.75)
        twin = made(ADAMW, copies(params_of(ours)), master_weights="float32")
        if way == "plan gone":
            twin.load_state_dict(saved(ours))
            twin.load_master_state_dict(ours.master_state_dict())
            ours.to(device)
        train((0,), ours, twin)
        assert_equal(ours, twin)


def test_swaps_and_writes_of_the_same_lose_nothing(device: str) -> None:
    ours, twin = (made(ADAMW, weights(device), master_weights="float32", ema_decay=0.9) for _ in range(2))
    train((0, 1), ours, twin)
    with ours.swap_ema():
        ours.refresh()
    module = torch.nn.ParameterList(params_of(ours))
    module.load_state_dict(copy.deepcopy(module.state_dict()))
    train((2,), ours, twin)
    assert_equal(ours, twin)
    ours.to(device)
    with ours.swap_ema():
        ours.refresh()  # builds a plan while the parameters hold their averages
    train((3,), ours, twin)
    assert_equal(ours, twin)


@pytest.mark.parametrize("master", ["float32", "split16"])
def test_schedule_free_weights_switch_whole(master: str, device: str) -> None:
    """Between training and evaluation and back: to within the roundings of two fp32 interpolations."""
    ours = fusedopt.AdamWScheduleFree(weights(device), lr=0.01, master_weights=master)  # pyright: ignore[reportArgumentType] # one of WEIGHTS
    train((0, 1, 2), ours)
    y = ours.master_state_dict()
    ours.eval()
    for i, (p, state) in enumerate(contents(ours)):
        x = (y[i].double() - 0.1 * state["z"].double()) / 0.9
        torch.testing.assert_close(ours.master_state_dict()[i].double(), x, rtol=0, atol=1e-6)
        assert torch.equal(p, x.bfloat16()) or (p - x.bfloat16()).abs().max() <= torch.finfo(p.dtype).eps
    ours.train()
    for i, x in ours.master_state_dict().items():
        torch.testing.assert_close(x, y[i], rtol=0, atol=1e-6)
    train((3,), ours)


def test_only_what_something_else_wrote_to_is_compared(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a steady run nothing is; nor is a plan asked that has no fp32 master."""
    from fusedopt import masters

    ours, other = (made(ADAMW, weights(device), master_weights=m) for m in ("float32", "split16"))
    train((0, 1), ours, other)
    compared: list[torch.Tensor] = []
    current = masters.current
    monkeypatch.setattr(masters, "current", lambda p, master: compared.append(p) or current(p, master))
    train((2, 3), ours, other)
    assert not compared
    with torch.no_grad():
        for optimizer in (ours, other):
            params_of(optimizer)[1].mul_(1.0)
    train((4,), ours, other)
    assert len(compared) == 1 and compared[0] is params_of(ours)[1]
    monkeypatch.setattr(masters, "_version", lambda p: pytest.fail("asked for a version"))
    train((5,), other)


def test_a_step_that_is_captured_does_not_compare(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would do so at every replay."""
    from fusedopt import masters

    ours = made(ADAMW, weights(device), master_weights="float32")
    train((0,), ours)
    monkeypatch.setattr(masters, "capturing", lambda: True)
    monkeypatch.setattr(masters, "current", lambda p, master: pytest.fail("compared inside a capture"))
    ours._forget_plan()
    with torch.no_grad():
        params_of(ours)[1].fill_(0.5)
        ours._build()


@pytest.mark.parametrize("master", [m for m in WEIGHTS if WEIGHTS[m].key is not None])
def test_masters_come_through_copies(master: str, device: str) -> None:
    ours = made(ADAMW, weights(device), master_weights=master)
    train((0,), ours)
    twin = by_torch_save(ours)
    masters = ours.master_state_dict()
    assert all(bit_equal(x, masters[key]) for key, x in twin.master_state_dict().items())
