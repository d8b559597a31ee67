"""Hugging Face `Trainer` on tiny models: both ways to give it an optimizer, and the mixin that lets the step clip.

In float64, where rounding does not hide a step that differs, against the same Trainer with torch.optim.AdamW.
"""

import gc
import json
import math
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import trainer_page
from compare import assert_equal
from tolerances import TOLERANCES
from torch import nn

import fusedopt
from fusedopt.options import KEY
from fusedopt.trainers.huggingface import StepClips

pytestmark = pytest.mark.needs("transformers>=5", "accelerate>=1.1")
STEPS = 6
LIMIT = 0.5
"""Below every norm of a gradient here."""
ADAMW: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Every run of a Trainer collects garbage; what other tests have left is not looked through each time."""
    gc.freeze()
    yield
    gc.unfreeze()


class Net(nn.Module):
    """A model that knows its losses; its LayerNorm and biases go to the group without decay."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.norm, self.head = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)
        self.losses: list[float] = []
        self.to(dtype)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        out = self.head(self.norm(torch.tanh(self.inner(x))))[:, 0]
        loss = (out - y).square().mean()
        self.losses.append(loss.item())
        return {"loss": loss, "logits": out}


def examples(dtype: torch.dtype) -> list[dict[str, torch.Tensor]]:
    """Enough for `STEPS` steps of three batches of two."""
    random = torch.Generator().manual_seed(1)
    numbers = torch.randn(6 * STEPS, 7, generator=random, dtype=torch.float64).to(dtype)
    return [{"x": row[:6], "y": 5 * row[6]} for row in numbers]


def tokens() -> list[dict[str, torch.Tensor]]:
    """Sentences for a language model."""
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(64, (6 * STEPS, 8), generator=random)
    return [{"input_ids": row, "labels": row} for row in ids]


def trained(cls: Any, folder: Path, given: Any, device: str, resume: str | None = None, **more: Any) -> Any:
    """A Trainer after training. given: (class, options), or a function that makes an optimizer of a model.

    more: arguments of the Trainer (model, train_dataset, callbacks), `scaler`, the rest TrainingArguments.
    """
    transformers = import_module("transformers")
    model = more.pop("model", None) or Net(torch.float64)
    mine = {key: more.pop(key) for key in ("train_dataset", "callbacks") if key in more}
    scaler = more.pop("scaler", None)
    arguments = {
        "per_device_train_batch_size": 2, "max_steps": STEPS, "logging_steps": 1, "report_to": [],
        "disable_tqdm": True, "use_cpu": device == "cpu", "learning_rate": 1e-2, "save_strategy": "no",
        "weight_decay": 0.1, "dataloader_pin_memory": False, "max_grad_norm": LIMIT, **more,
    }  # fmt: skip
    args = transformers.TrainingArguments(str(folder), **arguments)
    if isinstance(given, tuple):
        mine["optimizer_cls_and_kwargs"] = given
    else:
        optimizer = given(model)
        mine["optimizers"] = (optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS))
    mine.setdefault("train_dataset", examples(next(model.parameters()).dtype))
    trainer = cls(model=model, args=args, **mine)
    if scaler is not None:
        trainer.accelerator.scaler = scaler
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def clipping() -> Any:
    """The Trainer with the mixin."""
    return type("Clipping", (StepClips, import_module("transformers").Trainer), {})


def logged(trainer: Any, key: str) -> list[float]:
    """What was logged at each step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assert_same_run(one: Any, other: Any) -> None:
    """Losses, norms and final weights within the bound; schedules equal."""
    near = {"rel": 0.0, "abs": TOLERANCES["trainers"].value}
    assert one.model.losses == pytest.approx(other.model.losses, **near)
    assert logged(one, "grad_norm") == pytest.approx(logged(other, "grad_norm"), **near)
    assert logged(one, "learning_rate") == logged(other, "learning_rate")
    for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=near["abs"])


def no_clipping(*_: Any, **__: Any) -> None:
    pytest.fail("the gradients were read for clipping, or for their norm")


# -------------------------------------------------------------------------------------------------- the same training
@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_loss_curve_is_torchs_with_and_without_the_mixin(
    accumulation: int, tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(cls: Any, given: Any, **more: Any) -> Any:
        return trained(cls, tmp_path, given, device, gradient_accumulation_steps=accumulation, **more)

    def decayed(model: nn.Module) -> Any:
        flat, matrices = [[p for p in model.parameters() if (p.dim() > 1) is dim] for dim in (False, True)]
        return fusedopt.AdamW([{"params": matrices}, {"params": flat, "weight_decay": 0.0}], **ADAMW)

    plain = import_module("transformers").Trainer
    reference = run(plain, (torch.optim.AdamW, ADAMW), lr_scheduler_type="constant")
    assert min(logged(reference, "grad_norm")) > LIMIT
    assert_same_run(run(plain, (fusedopt.AdamW, ADAMW), lr_scheduler_type="constant"), reference)
    scheduled = run(plain, decayed)
    monkeypatch.setattr(import_module("accelerate").Accelerator, "clip_grad_norm_", no_clipping)
    cls = clipping()
    assert_same_run(run(cls, (fusedopt.AdamW, ADAMW), lr_scheduler_type="constant"), reference)
    ours = run(cls, decayed)
    assert_same_run(ours, scheduled)
    assert logged(ours, "learning_rate")[-1] < ADAMW["lr"]
    source = (fusedopt.AdamW, {**ADAMW, "norm_at_backward": True, "clip_grad_norm": LIMIT})
    assert_same_run(run(cls, source, lr_scheduler_type="constant"), reference)


def test_without_the_mixin_every_step_reads_the_gradients(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the test above can fail; and what the mixin saves is there to be saved."""
    monkeypatch.setattr(import_module("accelerate").Accelerator, "clip_grad_norm_", no_clipping)
    plain = import_module("transformers").Trainer
    for limit in (LIMIT, 0.0):
        with pytest.raises(pytest.fail.Exception, match="for their norm"):
            trained(plain, tmp_path, (fusedopt.AdamW, ADAMW), device, max_grad_norm=limit)


def test_a_limit_that_a_callback_changes_holds_from_the_next_step(tmp_path: Path, device: str) -> None:
    """Also off and on again; without a limit there is no norm to log unless one is asked for."""
    limits = [LIMIT, 0.25, 0.0, 0.0, 2.0, 2.0]
    base = import_module("transformers").TrainerCallback

    def change(_: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.max_grad_norm = limits[state.global_step]

    callbacks = [type("Change", (base,), {"on_step_begin": change})()]
    plain = import_module("transformers").Trainer
    reference = trained(plain, tmp_path, (torch.optim.AdamW, ADAMW), device, callbacks=callbacks)
    asked = (fusedopt.AdamW, {**ADAMW, "metrics": ("grad_norm",)})
    ours = trained(clipping(), tmp_path, asked, device, callbacks=callbacks)
    assert_same_run(ours, reference)
    assert {group[KEY]["clip_grad_norm"] for group in ours.optimizer.param_groups} == {2.0}
    silent = trained(clipping(), tmp_path, (fusedopt.AdamW, ADAMW), device, callbacks=callbacks)
    assert [("grad_norm" in entry) for entry in silent.state.log_history[:STEPS]] == [limit > 0 for limit in limits]
    assert silent.model.losses == ours.model.losses
    limits[-1] = 0.0
    last = trained(clipping(), tmp_path, (fusedopt.AdamW, ADAMW), device, callbacks=callbacks)
    assert not any(KEY in group for group in last.optimizer.param_groups)


def test_an_overflow_skips_the_step_and_holds_the_schedule(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under accelerate's GradScaler; it and unscaling are switched on by hand, because fp16 is refused on CPUs."""

    def unscale(self: Any) -> None:
        for wrapped in self._optimizers:
            self.scaler.unscale_(wrapped.optimizer)

    def run(cls: Any, given: Any) -> Any:
        scaler = torch.amp.GradScaler(device, init_scale=2.0**127, backoff_factor=2.0**-30)
        return trained(cls, tmp_path, given, device, scaler=scaler, model=Net(torch.float32))

    monkeypatch.setattr(import_module("accelerate").Accelerator, "unscale_gradients", unscale)
    reference = run(import_module("transformers").Trainer, (torch.optim.AdamW, ADAMW))
    ours = run(clipping(), (fusedopt.AdamW, ADAMW))
    rates, norms = logged(ours, "learning_rate"), logged(ours, "grad_norm")
    assert rates == logged(reference, "learning_rate")
    assert rates[0] == rates[1] > rates[2]
    assert math.isnan(norms[0]) and not math.isfinite(logged(reference, "grad_norm")[0])
    assert norms[1:] == pytest.approx(logged(reference, "grad_norm")[1:], rel=TOLERANCES["trainers, float32"].value)
    assert {float(state["step"]) for state in ours.optimizer.state.values()} == {STEPS - 1.0}


# ------------------------------------------------------------------------------------------------- bf16, and resuming
LOW = {
    "state_dtype": "int8", "state_rounding": "stochastic", "master_weights": "split8", "ema_decay": 0.9, "seed": 5,
}  # fmt: skip


def llama() -> Any:
    """A language model in bf16 whose embedding is also its output layer."""
    transformers = import_module("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def test_a_bf16_language_model_resumes_bit_for_bit(tmp_path: Path, device: str) -> None:
    """With 8 more bits of each weight, int8 state, random rounding and averages in the Trainer's own checkpoint."""

    def run(folder: str, resume: str | None = None) -> Any:
        given = (fusedopt.AdamW, {**ADAMW, **LOW})
        more = {"model": llama(), "train_dataset": tokens(), "save_strategy": "steps", "save_steps": STEPS // 2}
        return trained(clipping(), tmp_path / folder, given, device, resume, **more)

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}"))
    assert_equal(whole.optimizer.optimizer, resumed.optimizer.optimizer)
    assert whole.optimizer.optimizer.state_dict()["param_groups"] == resumed.optimizer.state_dict()["param_groups"]
    assert any("exp_avg_q" in state for state in resumed.optimizer.state.values())
    for key in ("loss", "grad_norm", "learning_rate"):
        assert logged(whole, key) == logged(resumed, key) and len(logged(whole, key)) == STEPS


def test_a_resumed_run_clips_by_its_own_limit(tmp_path: Path, device: str) -> None:
    """As the Trainer does; the file holds the limit that it was written under."""
    more = {"save_strategy": "steps", "save_steps": STEPS // 2}
    trained(clipping(), tmp_path, (fusedopt.AdamW, ADAMW), device, **more)
    saved = str(tmp_path / f"checkpoint-{STEPS // 2}")
    resumed = trained(clipping(), tmp_path / "b", (fusedopt.AdamW, ADAMW), device, saved, max_grad_norm=0.125)
    assert {group[KEY]["clip_grad_norm"] for group in resumed.optimizer.param_groups} == {0.125}
    state = json.loads((Path(saved) / "trainer_state.json").read_text())
    assert state["log_history"][0]["grad_norm"] > LIMIT


# ---------------------------------------------------------------------------------------------------------- refusals
def under(**flags: bool) -> Callable[[Any], None]:
    """Makes a Trainer believe that it runs under an engine that is not here."""
    return lambda trainer: vars(trainer).update(flags)


@pytest.mark.parametrize(
    ("given", "engine", "error", "match"),
    [
        ((torch.optim.AdamW, ADAMW), under(), TypeError, "optimizer of fusedopt, got AdamW: pass optimizer_cls_and_kw"),
        ((fusedopt.AdamW, {"clip_grad_norm": 1.0}), under(), ValueError, "clip_grad_norm=1.0 .* max_grad_norm=0.5"),
        ((fusedopt.SGD, {"release_gradients": True}), under(), ValueError, "release_gradients=True"),
        ((fusedopt.AdamW, ADAMW), under(is_deepspeed_enabled=True), ValueError, "DeepSpeed clips"),
        ((fusedopt.AdamW, ADAMW), under(is_fsdp_enabled=True), ValueError, "under FSDP1 .*norm_group="),
    ],
    ids=["torch's", "two limits", "release", "deepspeed", "fsdp1"],
)  # fmt: skip
def test_what_the_mixin_cannot_do_is_refused(
    given: Any, engine: Any, error: Any, match: str, tmp_path: Path, device: str
) -> None:
    transformers = import_module("transformers")
    args = transformers.TrainingArguments(
        str(tmp_path), max_grad_norm=LIMIT, use_cpu=device == "cpu", report_to=[], disable_tqdm=True
    )
    trainer = clipping()(model=Net(torch.float32), args=args, optimizer_cls_and_kwargs=given)
    engine(trainer)
    with pytest.raises(error, match=match):
        trainer.create_optimizer()


def test_a_trainer_without_the_methods_that_it_takes_over_is_refused(device: str) -> None:
    """It would clip by itself, and the step not at all."""
    old = type("Trainer", (), {"create_optimizer": lambda self: adamw, "_clip_grad_norm": None})
    adamw = fusedopt.AdamW([nn.Parameter(torch.ones(2, device=device))])
    with pytest.raises(TypeError, match=r"_get_grad_norm .* use transformers 5"):
        type("Clipping", (StepClips, old), {})().create_optimizer()


@pytest.mark.filterwarnings("ignore:.*pin_memory")  # the Trainer pins by default, with no GPU too
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert min(logged(trainer_page.run("Hugging Face Trainer")["trainer"], "grad_norm")) > 0
