"""The engine: eager and kernels give the same bits on every axis, launches and compiles are counted."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from table import DTYPES, FORMATS, RULES, RuleRow, private
from tolerances import TOLERANCES

from fusedopt_kernels import launch, table

CHUNK = table.CHUNK
SHAPES: tuple[tuple[int, ...], ...] = (
    (3, 5), (), (0,), (1,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3, CHUNK), (7,), (2, 3, 4),
)  # fmt: skip
FEWER = ((3, 5), (), (CHUNK + 1,), (0,), (CHUNK - 1,), (2, 3, 4))
"""For every rule in every dtype, neither of which has a say in how tensors are cut."""


def parameters(dtype: torch.dtype, device: str, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Any]:
    """Fresh parameters, the same in every call."""
    generator = torch.Generator().manual_seed(5)
    return [
        torch.nn.Parameter(torch.randn(s, generator=generator, dtype=_wide(dtype)).to(device, dtype)) for s in shapes
    ]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def set_gradients(sets: Sequence[list[Any]], seed: int, dtype: torch.dtype | None = None) -> None:
    """The same new gradients for every set of parameters; every third parameter has none in odd steps."""
    generator = torch.Generator().manual_seed(seed)
    for index, members in enumerate(zip(*sets, strict=True)):
        p = members[0]
        wide = _wide(p.dtype)
        g = torch.randn(p.shape, generator=generator, dtype=wide).to(p.device, dtype or p.dtype)
        for p in members:
            p.grad = None if seed % 2 and index % 3 == 2 else g.clone()


def assert_same(a: Any, b: Any, pa: list[Any], pb: list[Any]) -> None:
    """Parameters and all state of two optimizers agree bit for bit; under fp64 norms within some ulps of these."""
    normed = a.rule.n_norms or a.rule.grad_norm
    for i, (x, y) in enumerate(zip(pa, pb, strict=True)):
        ulps = TOLERANCES["fp64 norm"].value if normed and x.dtype in (torch.float64, torch.complex128) else 0.0
        close = dict(rtol=ulps * 2.0**-52, atol=ulps * 2.0**-52)
        torch.testing.assert_close(x, y, **close, msg=lambda m, i=i: f"parameter {i}: {m}")
        assert a.state[x].keys() == b.state[y].keys()
        for key in a.state[x]:
            torch.testing.assert_close(a.state[x][key], b.state[y][key], **close, check_device=False)


def run_both(
    make: Any,
    dtype: torch.dtype,
    device: str,
    steps: int = 3,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    **switches: Any,
) -> tuple[Any, Any]:
    """Run the eager backend and the kernels side by side, comparing after every step."""
    pe, pk = parameters(dtype, device, shapes), parameters(dtype, device, shapes)
    eager, kernels = make(pe, backend="eager"), make(pk, backend="triton")
    for optimizer in (eager, kernels):
        if switches:
            private(optimizer, **switches)
    for step in range(steps):
        set_gradients([pe, pk], step)
        eager.step()
        kernels.step()
        assert_same(eager, kernels, pe, pk)
    return eager, kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", RULES, ids=str)
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose
def test_eager_and_kernels_agree_bit_for_bit(row: RuleRow, dtype: torch.dtype, device: str) -> None:
    run_both(lambda p, backend: row.cls(p, **row.options, backend=backend), dtype, device, steps=2, shapes=FEWER)


@pytest.mark.parametrize("row", [RULES[1], RULES[7]], ids=str)
@pytest.mark.parametrize("name", ["bf16 state", "split16 weights"])
def test_storage_formats_agree_bit_for_bit(name: str, row: RuleRow, device: str) -> None:
    dtype = torch.bfloat16 if "split16" in name else torch.float32
    run_both(lambda p, backend: row.cls(p, **row.options, backend=backend), dtype, device, **FORMATS[name])


def test_bf16_state_is_bf16_and_split16_is_exact(device: str) -> None:
    row = RULES[7]
    _, kernels = run_both(
        lambda p, backend: row.cls(p, **row.options, backend=backend), torch.float32, device, **FORMATS["bf16 state"]
    )
    state = next(iter(kernels.state.values()))
    assert state["exp_avg"].dtype == torch.bfloat16 and state["exp_avg_sq"].dtype == torch.bfloat16

    low, full = parameters(torch.bfloat16, device), parameters(torch.bfloat16, device)
    full = [torch.nn.Parameter(p.detach().float()) for p in full]
    a, b = (
        private(row.cls(low, **row.options, backend="triton"), master_weights="split16"),
        row.cls(full, **row.options),
    )
    from fusedopt_kernels.param.split16 import load_eager

    for step in range(5):
        set_gradients([low], step)
        for p, q in zip(low, full, strict=True):
            q.grad = None if p.grad is None else p.grad.float()
        a.step()
        b.step()
    for p, q in zip(low, full, strict=True):
        assert torch.equal(load_eager(p.detach(), a.state[p]["param_residual"]), q.detach())


@pytest.mark.parametrize(
    "options", [dict(clip_grad_norm=0.5), dict(clip_grad_norm=1e9), dict(skip_nonfinite=True)], ids=str
)
def test_norm_and_coefficient(options: dict[str, Any], device: str) -> None:
    """Given the same norm the rest agrees bit for bit; the norm itself within one fp32 ulp (here: equal)."""
    row = RULES[7]
    _, kernels = run_both(
        lambda p, backend: row.cls(p, **row.options, backend=backend), torch.float32, device, **options
    )
    header = kernels._tables[0].header.tolist()
    grads = [p.grad.double().flatten() for g in kernels.param_groups for p in g["params"] if p.grad is not None]
    exact = torch.cat(grads).norm().float()
    ulp = torch.finfo(torch.float32).eps * float(exact)
    assert abs(header[table.NORM.value] - float(exact)) <= ulp
    assert header[table.NONFINITE.value] == 0.0


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_a_skipped_step_changes_nothing(bad: float, backend: str, device: str) -> None:
    row = RULES[7]
    params = parameters(torch.float32, device)
    optimizer = private(row.cls(params, **row.options, backend=backend), skip_nonfinite=True, clip_grad_norm=1.0)
    set_gradients([params], 0)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
    params[7].grad[1, 5] = bad
    optimizer.step()
    for p, q, s in zip(params, before, state, strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(optimizer.state[p][k], v) for k, v in s.items())


@pytest.mark.parametrize(("dtype", "large"), [(torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float64, 1e300)])
@pytest.mark.filterwarnings("ignore:state .* takes its parameter's dtype")  # low precision on purpose
def test_squares_that_overflow_are_not_nonfinite(dtype: torch.dtype, large: float, device: str) -> None:
    params = parameters(dtype, device, [(10,), (CHUNK + 3,)])
    optimizer = private(RULES[7].cls(params, backend="triton"), skip_nonfinite=True)
    for p in params:
        p.grad = torch.full_like(p, large)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
    header = optimizer._tables[0].header
    assert header[table.NONFINITE.value] == 0.0
    params[1].grad[-1] = float("inf")
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
    assert header[table.NONFINITE.value] == 1.0


def test_norm_bits_do_not_depend_on_grouping(device: str) -> None:
    params = parameters(torch.float32, device)
    set_gradients([params], 0)
    found = set()
    for cut in (0, 3, 8):
        groups = [{"params": params[:cut]}, {"params": params[cut:]}] if cut else params
        optimizer = private(RULES[7].cls(groups, lr=0.0, backend="triton"), clip_grad_norm=1.0)
        optimizer.step()
        found.add(optimizer._tables[0].header[table.NORM.value].item())
    assert len(found) == 1


def test_two_pass_rule(device: str) -> None:
    from lamb_like import LambLike

    run_both(LambLike, torch.float32, device)


def recorded(optimizer: Any) -> list[tuple[launch.KernelSpec, int, tuple[torch.Tensor, ...]]]:
    """Launches of one step, none of which runs."""
    optimizer._launcher = launch.Recorder()
    optimizer.step()
    return optimizer._launcher.record


@pytest.mark.parametrize("count", [1, 10, 300])
def test_launches_do_not_depend_on_the_number_of_tensors(count: int) -> None:
    from lamb_like import LambLike

    def params() -> list[Any]:
        made = [torch.nn.Parameter(torch.zeros(4)) for _ in range(count)]
        for p in made:
            p.grad = torch.ones(4)
        return made

    def names(optimizer: Any) -> list[str]:
        return [spec.name for spec, _, _ in recorded(optimizer)]

    adamw = RULES[7].cls
    assert names(adamw(params(), backend="triton")) == ["adamw_scalars", "adamw"]
    assert names(private(adamw(params(), backend="triton"), clip_grad_norm=1.0)) == ["norm", "adamw_scalars", "adamw"]
    assert names(LambLike(params(), backend="triton")) == ["lamb_like_scalars", "lamb_like_measure", "lamb_like"]
    groups = [{"params": [p], "lr": 0.1 * i} for i, p in enumerate(params())]
    assert names(adamw(groups, backend="triton")) == ["adamw_scalars", "adamw"]


def test_one_update_launch_per_variant() -> None:
    mixed = [torch.nn.Parameter(torch.zeros(4, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float32)]
    for p in mixed:
        p.grad = torch.zeros_like(p)
    record = recorded(private(RULES[0].cls(mixed, lr=0.1, backend="triton"), clip_grad_norm=1.0))
    assert [spec.name for spec, _, _ in record] == ["norm", "norm", "sgd_scalars", "sgd", "sgd"]


class CountingLauncher(launch.Recorder):
    """Compiles every new variant off-line, as a GPU would, and launches nothing."""

    def __init__(self, target: Any) -> None:
        super().__init__()
        self.target = target

    def first(self, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> Any:
        return launch.compile_for(spec, self.target)

    def again(self, kernel: Any, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
        pass


@pytest.mark.compiled
def test_changing_numbers_compiles_nothing() -> None:
    from triton.backends.compiler import GPUTarget

    p = torch.nn.Parameter(torch.zeros(5))
    optimizer = private(RULES[7].cls([p], backend="triton"), clip_grad_norm=1.0)
    optimizer._launcher = counting = CountingLauncher(GPUTarget("cuda", 90, 32))
    for step in range(8):
        p.grad = torch.ones(5)
        if step:
            group = optimizer.param_groups[0]
            group.update(lr=0.1 * step, betas=(0.1 * step, 0.5), eps=10.0**-step, weight_decay=0.1 * (step % 2))
            optimizer.state[p]["step"].fill_(1000.0 * step)
        if step == 5:
            optimizer.param_groups[0]["lr"] = torch.tensor(0.5)
        optimizer.step()
    assert counting.compiles == 3 and counting.launches == 24


def test_offsets_above_two_to_the_31(device: str) -> None:
    """The last chunk of a tensor of 2³¹ + 5 elements: untouched memory costs nothing but the pages that are used."""
    n = 2**31 + 5
    p = torch.nn.Parameter(torch.empty(n, dtype=torch.float16, device=device))
    p.grad = torch.empty(n, dtype=torch.float16, device=device)
    optimizer = RULES[0].cls([p], lr=1.0, backend="triton")
    tail = slice(n - n % CHUNK, n)
    with torch.no_grad():
        p[tail] = 3.0
        p.grad[tail] = 1.0
        before = p[tail.start - 4 : tail.start].clone()

    class LastChunk(launch.Launcher):
        def run(self, spec: launch.KernelSpec, grid: int, args: tuple[torch.Tensor, ...]) -> None:
            if spec.name == "sgd":
                args, grid = (*args[:2], args[2][:1].contiguous(), *args[3:]), 1
            super().run(spec, grid, args)

    optimizer._launcher = LastChunk()
    optimizer.step()
    assert torch.equal(p[tail].detach(), torch.full((n % CHUNK,), 2.0, dtype=torch.float16, device=device))
    assert torch.equal(p[tail.start - 4 : tail.start].view(torch.int16), before.view(torch.int16))
