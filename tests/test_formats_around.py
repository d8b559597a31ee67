"""What is laid around a step with formats: masks, averages, metrics, clipping, scaling, skipping, layouts, captures."""

from typing import Any

import pytest
import torch
from format_cases import (
    FEW,
    FORMATS,
    LOWEST,
    assert_same,
    both,
    each_backend,
    each_format,
    give,
    parameters,
    params_of,
    placed,
    same,
    snapshot,
    step_both,
    tensors_of,
    unchanged,
)
from table import RULES, RuleRow

import fusedopt
from fusedopt import layout
from fusedopt.metrics import NAMES
from fusedopt_kernels import launch

AdamW: Any = fusedopt.AdamW


def held(optimizer: Any) -> list[torch.Tensor]:
    """The fp32 values that the weights' format holds."""
    from fusedopt.state import held_format

    return [
        p.detach().float() if (f := held_format(p, optimizer.state[p])) is None or f.key is None
        else f.load(p.detach(), optimizer.state[p][f.key])
        for p in params_of(optimizer)
    ]  # fmt: skip


@each_format
def test_masked_averaged_measured_clipped_and_cautious(name: str, device: str) -> None:
    """All at once; what is masked out keeps all bits of its weight, and the average is of what the format holds."""
    around: Any = dict(
        ema_decay=0.5, metrics=NAMES, clip_grad_value=0.5, cautious=True, cautious_decay=True, weight_decay=0.1
    )
    pair = both(lambda p, **b: AdamW(p, lr=0.1, **FORMATS[name], **around, **b), device, torch.bfloat16, FEW)
    step_both(pair, [0])
    for optimizer in pair:
        for p in params_of(optimizer):
            mask = torch.rand(p.shape, generator=torch.Generator().manual_seed(1)) < 0.5
            optimizer.set_update_mask(p, mask.to(device))
    start = held(pair[1])
    averages = [t.clone() for t in pair[1].ema_parameters()]
    step_both(pair, [2])
    for x, before, old, ema, p in zip(
        held(pair[1]), start, averages, pair[1].ema_parameters(), params_of(pair[1]), strict=True
    ):
        mask = pair[1].state[p]["update_mask"]
        # split8 and stochastic weights are stored once more, which changes no number that they can hold
        assert torch.equal(x[~mask], before[~mask]) and (x[mask] != before[mask]).any()
        torch.testing.assert_close(ema, old + 0.5 * (x - old), rtol=2**-23, atol=0)
    found = [optimizer.metrics() for optimizer in pair]
    for key in found[0]:
        torch.testing.assert_close(found[0][key], found[1][key], rtol=1e-6, atol=0, check_device=False)
    moved = torch.stack([(x - y).double().square().sum() for x, y in zip(held(pair[1]), start, strict=True)]).sum()
    torch.testing.assert_close(found[1]["update_norm"], moved.sqrt(), rtol=1e-6, atol=0, check_device=False)


def test_an_average_without_gradients_is_of_what_the_format_holds(device: str) -> None:
    pair = both(lambda p, **b: AdamW(p, lr=0.1, ema_decay=0.5, **LOWEST, **b), device, torch.bfloat16, FEW)
    step_both(pair, [0])
    old = [t.clone() for t in pair[1].ema_parameters()]
    for optimizer in pair:
        for p in params_of(optimizer):
            p.grad = None
        optimizer.step()
    assert_same(*pair)
    for x, before, ema in zip(held(pair[1]), old, pair[1].ema_parameters(), strict=True):
        torch.testing.assert_close(ema, before + 0.5 * (x - before), rtol=2**-23, atol=0)


TWO_PASS = [row for row in RULES if row.cls.rule.n_norms or row.cls.rule.grad_norm]


@pytest.mark.parametrize("row", list({row.name: row for row in TWO_PASS}.values()), ids=str)
def test_rules_with_norms(row: RuleRow, device: str) -> None:
    """The first pass reads the same values as the second."""
    options: Any = {**LOWEST, "clip_grad_norm": 0.5, "clip_scope": "tensor"}
    if row.cls.rule.grad_norm:
        options.pop("state_dtype")
    step_both(both(lambda p, **b: row.cls(p, **row.options, **options, **b), device, torch.bfloat16, FEW), range(2))


@each_backend
@each_format
def test_a_skipped_step_changes_no_code_scale_residual_or_stream(name: str, backend: str, device: str) -> None:
    """And the step after it is the one that would have been made in its place."""
    ours, plain = (
        AdamW(
            parameters(device, torch.bfloat16, FEW), **FORMATS[name], clip_grad_norm=1.0, skip_nonfinite=True,
            ema_decay=0.9, backend=backend,
        )
        for _ in range(2)
    )  # fmt: skip
    for optimizer in (ours, plain):
        give(0, params_of(optimizer), all_of=True)
        optimizer.step()
    before = snapshot(ours)
    for bad in (torch.inf, torch.nan):
        params_of(ours)[1].grad[1, 5] = bad  # pyright: ignore[reportOptionalSubscript] # give() gave it
        ours.step()
        assert unchanged(ours, before)
    for optimizer in (ours, plain):
        give(1, params_of(optimizer), all_of=True)
        optimizer.step()
    assert_same(ours, plain)


@each_backend
def test_a_scaler_unscales_and_skips(backend: str, device: str) -> None:
    ours, plain = (AdamW(parameters(device, torch.bfloat16, FEW), **LOWEST, backend=backend) for _ in range(2))
    scaler = fusedopt.GradScaler(device, init_scale=1024.0)
    scaler.scale(torch.ones((), device=device))
    for step in range(3):
        for optimizer in (ours, plain):
            give(step, params_of(optimizer), all_of=True)
        for p in params_of(ours):
            p.grad = p.grad * scaler.get_scale() if p.grad is not None else None
        if step == 1:
            params_of(ours)[0].grad[0, 0] = torch.inf  # pyright: ignore[reportOptionalSubscript] # give() gave it
        scaler.step(ours)
        scaler.update()
        if step != 1:
            plain.step()
        assert_same(ours, plain)


@pytest.mark.long
@each_backend
@pytest.mark.parametrize("how", ["channels last", "transposed", "gaps"])
def test_other_layouts_are_packed_and_give_the_same_bits(how: str, backend: str, device: str) -> None:
    """Groups are runs of indices and random numbers go by the index, whatever lies where; announced once."""
    for options in (LOWEST, dict(master_weights="stochastic", state_dtype="float32"), dict(state_dtype="int4")):
        plain = AdamW(parameters(device, torch.bfloat16, [(64, 5, 4, 4), (8, 8, 9, 9)]), **options, backend=backend)
        ours = AdamW([placed(p, how) for p in params_of(plain)], **options, backend=backend)
        strides = [p.stride() for p in params_of(ours)]
        layout._announced.clear()
        for step in range(2):
            give(step, params_of(ours), params_of(plain), all_of=True)
            plain.step()
            if step == 0:
                with pytest.warns(UserWarning, match="packed and unpacked at every step"):
                    ours.step()
            else:
                ours.step()
            assert_same(ours, plain)
        assert [p.stride() for p in params_of(ours)] == strides


@each_backend
def test_split16_weights_need_no_packing(backend: str, device: str) -> None:
    """Nothing there goes by the index: a warning would be an error."""
    plain = AdamW(parameters(device, torch.bfloat16, [(64, 5, 4, 4)]), master_weights="split16", backend=backend)
    ours = AdamW([placed(p, "channels last") for p in params_of(plain)], master_weights="split16", backend=backend)
    for step in range(2):
        for p, q in zip(params_of(ours), params_of(plain), strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step)).to(q)
            p.grad = q.grad.contiguous(memory_format=torch.channels_last)
        ours.step()
        plain.step()
        assert_same(ours, plain)


@each_backend
@each_format
def test_flattened_parameters_give_the_same_bits(name: str, backend: str, device: str) -> None:
    ours, plain = (AdamW(parameters(device, torch.bfloat16), **FORMATS[name], backend=backend) for _ in range(2))
    fusedopt.flatten_(params_of(ours), grads=True)
    for step in range(2):
        give(step, params_of(plain), all_of=True)
        for p, q in zip(params_of(ours), params_of(plain), strict=True):
            assert q.grad is not None
            p.grad = q.grad.clone() if p.grad is None else p.grad.copy_(q.grad)
        ours.step()
        plain.step()
        assert_same(ours, plain)


def groups_of(params: list[Any]) -> list[dict[str, Any]]:
    """A group of each format."""
    return [{"params": [p], **options} for p, options in zip(params, FORMATS.values(), strict=True)]


def test_groups_with_formats_of_their_own(device: str) -> None:
    """The bits of one optimizer each, in one launch for each variant."""
    shapes = [(64, 64)] * len(FORMATS)
    pair = both(lambda p, **b: AdamW(groups_of(p), lr=0.1, **b), device, torch.bfloat16, shapes)
    step_both(pair, range(2), all_of=True)
    twin = parameters(device, torch.bfloat16, shapes)
    for i, (p, options) in enumerate(zip(twin, FORMATS.values(), strict=True)):
        if "stochastic" in (options.get("state_rounding"), options["master_weights"]) or i == 0:
            continue  # ordinals, and with them streams, differ
        alone = AdamW([p], lr=0.1, **options, backend="eager")
        for step in range(2):
            give(step, twin, all_of=True)
            alone.step()
        assert all(same(x, tensors_of(pair[0])[i][k]) for k, x in tensors_of(alone)[0].items())
    optimizer = AdamW(groups_of(params_of(pair[1])), lr=0.1, backend="triton")
    optimizer._launcher = recorder = launch.Recorder()
    optimizer.step()
    assert len(recorder.record) == 1 + len(FORMATS) == recorder.compiles
