"""Lightning and Fabric on tiny models: steps with a closure, clipping there and here, 16-mixed, wrappers, resuming."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_page
from compare import assert_equal
from tolerances import TOLERANCES
from torch import nn
from torch.utils.data import DataLoader

import fusedopt

pytestmark = [
    pytest.mark.needs("pytorch-lightning>=2.5"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec"),  # Lightning uses torch's tree functions as they once were
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used"),
]
LIMIT = 0.5
"""Below every norm of a gradient here."""
NEAR = {"64-true": "trainers", "32-true": "trainers, float32", "bf16-mixed": "trainers, bf16"}


def module(optimizer: Any, **options: Any) -> Any:
    """A LightningModule under automatic optimization. optimizer: class; its options."""
    lightning = import_module("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, 1))
            self.losses: list[float] = []
            self.norms: list[float] = []

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            loss = (self.net(batch[0])[:, 0] - batch[1]).square().mean()
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            made = optimizer(self.net.named_parameters(), lr=1e-3, **options)
            if "clip_grad_norm" in options:
                made.register_step_post_hook(lambda *_: self.norms.append(float(made.metrics()["grad_norm"])))
            return [made], [torch.optim.lr_scheduler.LinearLR(made, 1.0, 0.1, 4)]

    return Module()


def fitted(model: Any, folder: Path, device: str, resume: Path | None = None, **arguments: Any) -> Any:
    """A Trainer after fitting a module to eight batches of two."""
    random = torch.Generator().manual_seed(0)
    rows = torch.randn(16, 65, generator=random)
    dtype = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(arguments.get("precision", ""), torch.float32)
    loader = DataLoader([(row[:64].to(dtype), 5 * row[64].to(dtype)) for row in rows], batch_size=2)  # pyright: ignore[reportArgumentType] # a list is a data set
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = import_module("pytorch_lightning").Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, default_root_dir=folder,
        **{"max_epochs": 1, **dict.fromkeys(quiet, False), **arguments},
    )  # fmt: skip
    trainer.fit(model, loader, ckpt_path=resume, **({"weights_only": True} if resume else {}))
    return trainer


def scaling(device: str, **options: Any) -> Any:
    """Lightning's 16-mixed with a scaler of which every gradient overflows at first."""
    plugins = import_module("pytorch_lightning.plugins.precision")
    return plugins.MixedPrecision("16-mixed", device, torch.amp.GradScaler(device, init_scale=2.0**40, **options))


@contextmanager
def never_clips(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(*_: Any, **__: Any) -> None:
        pytest.fail("Lightning clipped")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", fail)
        yield


# -------------------------------------------------------------------------------------------------------------- fits
@pytest.mark.parametrize(
    ("precision", "accumulation"), [("64-true", 1), ("64-true", 2), ("32-true", 1), ("bf16-mixed", 2)]
)
def test_a_fit_is_torchs_with_lightnings_clipping_and_with_ours(
    precision: str, accumulation: int, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"precision": precision, "accumulate_grad_batches": accumulation}
    theirs, ours = module(torch.optim.AdamW), module(fusedopt.AdamW)
    inside = module(fusedopt.AdamW, clip_grad_norm=LIMIT)
    fitted(theirs, tmp_path, device, gradient_clip_val=LIMIT, **common)
    fitted(ours, tmp_path, device, gradient_clip_val=LIMIT, **common)
    with never_clips(monkeypatch):
        trainer = fitted(inside, tmp_path, device, **common)
    bound = TOLERANCES[NEAR[precision]].value
    near = {"rel": 0.0, "abs": bound} if precision == "64-true" else {"rel": bound}
    assert ours.losses == pytest.approx(theirs.losses, **near)
    assert inside.losses == pytest.approx(theirs.losses, **near)
    assert len(inside.norms) == 8 / accumulation and min(inside.norms) > LIMIT
    assert {float(state["step"]) for state in trainer.optimizers[0].state.values()} == {8.0 / accumulation}


@pytest.mark.parametrize("amp_scaling", [False, True])
def test_16_mixed_clips_and_skips(amp_scaling: bool, tmp_path: Path, device: str) -> None:
    """With the default Lightning's clipping works; with amp_scaling=True it refuses, and the step's takes its place."""
    theirs, ours = module(torch.optim.AdamW), module(fusedopt.AdamW, amp_scaling=amp_scaling)
    inside = module(fusedopt.AdamW, amp_scaling=amp_scaling, clip_grad_norm=LIMIT)
    models, scales, steps = (theirs, ours, inside), [], []
    if amp_scaling:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fitted(ours, tmp_path, device, gradient_clip_val=LIMIT, plugins=[scaling(device)])
        models = (theirs, inside)
    for model in models:
        plugin = scaling(device, backoff_factor=2.0**-30)
        clip = {} if model is inside else {"gradient_clip_val": LIMIT}
        trainer = fitted(model, tmp_path, device, plugins=[plugin], **clip)
        scales.append(plugin.scaler.get_scale())
        steps.append({float(state["step"]) for state in trainer.optimizers[0].state.values()})
    assert set(scales) == {2.0**10} and all(step == {7.0} for step in steps)
    for model in models[1:]:
        assert model.losses == pytest.approx(theirs.losses, rel=TOLERANCES["trainers, bf16"].value)
        assert model.losses[1] == theirs.losses[1] and model.losses[0] != model.losses[-1]


def test_a_bf16_fit_resumes_bit_for_bit(tmp_path: Path, device: str) -> None:
    """8 more bits of each weight, int8 state and random rounding, through Lightning's checkpoint."""
    options = {"master_weights": "split8", "state_dtype": "int8", "state_rounding": "stochastic", "seed": 5}
    common = {"precision": "bf16-true"}
    whole = fitted(module(fusedopt.AdamW, **options), tmp_path, device, max_epochs=2, **common)
    half = fitted(module(fusedopt.AdamW, **options), tmp_path, device, **common)
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = fitted(
        module(fusedopt.AdamW, **options), tmp_path, device, tmp_path / "half.ckpt", max_epochs=2, **common
    )
    assert_equal(whole.optimizers[0], resumed.optimizers[0])
    assert any("exp_avg_q" in state for state in resumed.optimizers[0].state.values())
    assert {float(state["step"]) for state in resumed.optimizers[0].state.values()} == {16.0}


# ---------------------------------------------------------------------------------------------------------- wrappers
def test_fabric_wraps_a_subclass_of_our_class(device: str) -> None:
    """What it adds no method for reaches the class with the wrapper as self: hooks, groups and schedules still work."""
    fabric = import_module("lightning_fabric").Fabric(accelerator="gpu" if device == "cuda" else "cpu", devices=1)
    torch.manual_seed(0)
    model = nn.Linear(6, 3)
    optimizer = fusedopt.AdamW(model.named_parameters(), lr=1e-2, clip_grad_norm=LIMIT, ema_decay=0.9)
    net, wrapper = fabric.setup(model, optimizer)
    assert issubclass(type(wrapper), fusedopt.AdamW) and type(wrapper).__name__ == "FabricAdamW"
    calls: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    schedule = torch.optim.lr_scheduler.LambdaLR(wrapper, lambda step: 1.0 / (step + 1))
    for _ in range(2):
        wrapper.zero_grad()
        fabric.backward(net(torch.ones(2, 6, device=device)).square().mean())
        assert float(fabric.clip_gradients(net, wrapper, max_norm=10.0)) > LIMIT
        wrapper.step()
        schedule.step()
    assert len(calls) == 2 and optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 / 3)
    assert float(wrapper.optimizer.metrics()["grad_norm"]) > LIMIT
    with wrapper.optimizer.swap_ema(), pytest.raises(RuntimeError, match="swap_ema"):
        wrapper.step()
    wrapper.load_state_dict(wrapper.state_dict())
    wrapper.step()
    assert {float(state["step"]) for state in optimizer.state.values()} == {3.0}


def test_what_is_called_on_fabrics_wrapper_reaches_the_optimizer(device: str) -> None:
    """Its class derives from ours, so that attributes of our class would hide those of the optimizer inside."""
    fabric = import_module("lightning_fabric").Fabric(accelerator=device)
    net = nn.Linear(6, 3)
    inner = fusedopt.AdamW(net.named_parameters(), clip_grad_norm=0.5, ema_decay=0.9, norm_at_backward=True)
    model, optimizer = fabric.setup(net, inner)

    def backward() -> None:
        fabric.backward(model(torch.ones(2, 6, device=device)).square().mean())

    for _ in range(2):
        optimizer.zero_grad()
        with optimizer.accumulate():
            backward()
        backward()
        optimizer.step()
    assert optimizer.metrics().keys() == inner.metrics().keys() >= {"grad_norm", "clip_coefficient"}
    with optimizer.swap_ema(), pytest.raises(RuntimeError, match="inside `with optimizer"):
        optimizer.step()
    optimizer.refresh()
    optimizer.warmup()


@pytest.mark.parametrize("amp_scaling", [False, True])
def test_fabric_unscales_before_it_clips(amp_scaling: bool, device: str) -> None:
    plugins = import_module("lightning_fabric.plugins.precision")
    precision = plugins.MixedPrecision("16-mixed", device, torch.amp.GradScaler(device, init_scale=2.0**4))
    accelerator = "gpu" if device == "cuda" else "cpu"
    fabric = import_module("lightning_fabric").Fabric(accelerator=accelerator, devices=1, plugins=[precision])
    torch.manual_seed(0)
    net, wrapper = fabric.setup(
        model := nn.Linear(6, 3), fusedopt.AdamW(model.parameters(), lr=1e-2, amp_scaling=amp_scaling)
    )
    fabric.backward(net(torch.ones(2, 6, device=device)).square().mean())
    if amp_scaling:
        with pytest.raises(NotImplementedError, match="Gradient clipping is not implemented"):
            fabric.clip_gradients(net, wrapper, max_norm=LIMIT)
    else:
        scaled = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        assert float(fabric.clip_gradients(net, wrapper, max_norm=LIMIT)) == pytest.approx(float(scaled) / 2**4)
    wrapper.step()
    assert {float(state["step"]) for state in wrapper.optimizer.state.values()} == {1.0}


@pytest.mark.filterwarnings("ignore:.*logging interval")
def test_the_page_runs() -> None:
    assert float(trainer_page.run("Lightning")["trainer"].callback_metrics["grad_norm"]) > 0
