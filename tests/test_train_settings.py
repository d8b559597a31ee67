"""From options to settings: what depends on the data, kinds of decay, `--config`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from train_command import SMALL, TEXT, Train, assert_refused, equal

from fusedopt import FusedOptimizer
from fusedopt.train import session, settings, text
from fusedopt.train.config import fill, resolve
from fusedopt.train.errors import BadInput
from fusedopt.train.job import validated
from fusedopt.train.optimizers import DEFAULTS, make_optimizer

TASK = text.load((TEXT,))
WINDOWS = (len(TASK.text.train) - 1) // 16 - 1
"""Examples of an epoch of 16 bytes each."""


@pytest.fixture
def train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    return Train(tmp_path, capsys)


def sized(**given: Any) -> dict[str, Any]:
    return settings.sized(given, fill({"max_seq_len": 16}, "cpu", DEFAULTS), TASK)


def test_what_depends_on_the_data_becomes_numbers() -> None:
    assert sized(batch_size=4, steps=7, lr=0.1) == dict(batch_size=4, steps=7, lr=0.1)
    assert sized(batch_size="full", epochs=3) == dict(batch_size=WINDOWS, steps=3)
    assert sized(batch_size=10, epochs=0.5) == dict(batch_size=10, steps=-(-WINDOWS // 20))
    found = sized(lr=0.0005, base_batch_size=128, batch_size=1024, lr_scaling="sqrt")
    assert found == dict(lr=pytest.approx(0.0014142135, rel=1e-7), batch_size=1024)
    assert sized(lr=0.0005, base_batch_size=128, batch_size=1024, lr_scaling="linear")["lr"] == 0.004
    assert sized(lr_scaling="linear", batch_size=64)["lr"] == 4 * 2e-3  # adamw's lr is for the default size, 16
    assert sized(lr_scaling="none", lr=0.3) == dict(lr=0.3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(epochs=1, steps=5), "--epochs and --steps"),
        (dict(epochs=1e308), "--epochs 1e\\+308 is too many"),
        (dict(epochs=0), "--epochs must be a finite number above 0, not 0"),
        (dict(base_batch_size=8), "--base-batch-size 8 does nothing without --lr-scaling"),
        (dict(lr_scaling="sqrt", base_batch_size=0), "--base-batch-size must be at least 1, not 0"),
    ],
)
def test_sizes_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        sized(**given)


BAD = {
    "task": (["--task", "translat"], "unknown task translat: did you mean translate?"),
    "tokenizer": (["--tokenizer", "bpe"], "--tokenizer bpe is for --task translate"),
    "text": (["--task", "translate", "--text", TEXT], "--text is for --task text"),
    "vocabulary": (["--vocabulary-size", "300"], "--vocabulary-size 300 is for --task translate"),
    "smoothing": (["--label-smoothing", "1"], "--label-smoothing must be at least 0 and less than 1"),
    "l1": (["--l1", "-1"], "--l1 must be a finite number"),
    "l1 of torch": (["--l1", "1e-3", "--compare", "torch"], "torch.optim's AdamW has none"),
    "patience": (["--patience", "2", "--compare", "torch"], "choose one"),
    "batch": (["--batch-size", "all"], "batch-size"),
    "length": (["--epochs", "1", "--max-seq-len", "0"], "--max-seq-len must be at least 1"),
    "no decay": (["--decay", "l2", "--optimizer", "adam"], "--decay l2 does nothing without --weight-decay"),
    "l2": (["--decay", "l2"], "AdamW has none of this kind (these have: adadelta, adagrad, adam,"),
    "decoupled": (["--decay", "decoupled", "--optimizer", "sgd"], "SGD has none of this kind"),
    "schedule's argument": (["--schedule", "step", "--schedule-arg", "gama=0.5"], "did you mean gamma?"),
    "schedule's phases": (["--steps", "9", "--schedule", "piecewise", "--schedule-arg", "boundaries=(5, 90)"],
                          "piecewise"),
    "config": (["--config", "nowhere.json"], "no such file"),
    "lr file": (["--lr-file", "nowhere/lr"], "its folder does not exist"),
}  # fmt: skip


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input(train: Train, args: list[str], message: str) -> None:
    assert_refused(train(*args, text=None if "--text" in args or "translat" in args else TEXT), message)
    assert not (train.folder / "run").exists()


def optimizer(**given: Any) -> FusedOptimizer:
    config = resolve({**given, "hidden_size": 16, "num_layers": 1, "num_heads": 2}, "cpu", DEFAULTS)
    made = make_optimizer(config, "fusedopt", TASK.model(config))
    assert isinstance(made, FusedOptimizer)
    return made


def test_kinds_of_decay_and_l1_reach_the_matrices_alone() -> None:
    kinds = {("adam", "own"): False, ("adam", "decoupled"): True, ("adamw", "decoupled"): True, ("adopt", "l2"): False}
    for (name, decay), decoupled in kinds.items():
        made = optimizer(optimizer=name, decay=decay, weight_decay=0.3, l1=1e-4)
        matrices, gains = made.param_groups
        assert made.rule.decoupled(matrices) == decoupled, name
        assert (matrices["weight_decay"], gains["weight_decay"]) == (0.3, 0.0)
        assert matrices["fusedopt"]["l1"] == 1e-4 and not gains.get("fusedopt", {}).get("l1")
        assert all(p.ndim >= 2 for p in matrices["params"]) and all(p.ndim == 1 for p in gains["params"])


def test_a_file_of_settings_is_the_options_and_options_win(train: Train) -> None:
    options = ("--steps", 8, "--optimizer", "sgd", "--optimizer-arg", "momentum=0.5", "--lr", 0.05)
    assert train(*options, "--schedule", "step", "--schedule-arg", "step_size=2", out="one").status == 0
    file = train.folder / "one" / "config.json"
    assert train("--config", file, out="again").status == 0
    assert equal(train.state("one")["runs"], train.state("again")["runs"])
    more = ("--optimizer-arg", "nesterov=True", "--schedule", "linear", "--epochs", 0.01)
    assert train("--config", file, *more, out="other").status == 0
    changed = json.loads((train.folder / "other" / "config.json").read_text())
    assert changed["optimizer_args"] == {"momentum": 0.5, "nesterov": True} and changed["lr"] == 0.05
    assert changed["steps"] == -(-WINDOWS // 400)
    assert train("--config", file, "--optimizer", "lion", "--schedule", "cosine", out="lion").status == 0
    changed = json.loads((train.folder / "lion" / "config.json").read_text())
    assert (changed["optimizer_args"], changed["schedule_args"]) == ({}, {})


def test_a_file_gives_the_batch_size_that_its_rate_is_for_and_arguments_of_its_optimizer(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    given = {"lr": 0.01, "batch_size": 4, "optimizer_args": {"betas": [0.8, 0.9]}, "optimizer": "adamw"}
    file.write_text(json.dumps(given))
    found = settings.from_options({"config": str(file), "lr_scaling": "sqrt", "batch_size": 16, "optimizer": "AdamW"})
    assert settings.sized(found, fill({}, "cpu", DEFAULTS), TASK)["lr"] == 0.02
    assert found["optimizer_args"] == {"betas": (0.8, 0.9)}
    file.write_text('{"lr": 0.001, "lr_scaling": "sqrt", "base_batch_size": 16, "batch_size": 64}')
    found = settings.from_options({"config": str(file), "lr_scaling": "linear"})
    assert settings.sized(found, fill({}, "cpu", DEFAULTS), TASK)["lr"] == 0.004
    found = settings.from_options({"config": str(file), "lr_scaling": "none"})
    assert settings.sized(found, fill({}, "cpu", DEFAULTS), TASK)["lr"] == 0.001
    file.write_text('{"text": ["mine.txt"], "lr": 0.1}')
    assert settings.from_options({"config": str(file), "task": "translate"}) == {"lr": 0.1, "task": "translate"}
    file.write_text('{"optimizer_args": {"eps": 1e-6}}')
    assert settings.from_options({"config": str(file), "optimizer": "adamw"})["optimizer_args"] == {"eps": 1e-6}
    assert "optimizer_args" not in settings.from_options({"config": str(file), "optimizer": "adam"})


def test_the_session_is_the_command(train: Train) -> None:
    small = {SMALL[i][2:].replace("-", "_"): SMALL[i + 1] for i in range(0, len(SMALL), 2)}
    given = {**{name: int(value) for name, value in small.items() if name != "device"}, "text": [TEXT], "steps": 6}
    assert train("--steps", 6).status == 0
    rows: list[dict[str, Any]] = []
    done = session.run(given, train.folder / "session", watch=rows.extend)
    assert equal(train.state()["runs"], train.state("session")["runs"])
    assert validated(given).as_dict() == {**done.config.as_dict(), "out": "runs/train"}
    found = done.summary["runs"]["fusedopt"]
    assert [row["step"] for row in rows] == list(range(7)) and found["val_loss_last"] == rows[-1]["val_loss"]
    assert found["val_loss_best"] == min(row["val_loss"] for row in rows if "val_loss" in row)
    weights = [*TASK.model(done.config).parameters()]
    assert found["held_bytes"] == 16 * sum(p.numel() for p in weights) + 4 * len(weights)  # with step counts
    assert session.run(given, train.folder / "session").summary == done.summary
    with pytest.raises(BadInput, match="unknown setting learning_rate"):
        validated({**given, "learning_rate": 1.0})
    with pytest.raises(BadInput, match="resuming would not be bit-exact: --lr was"):
        session.run({**given, "lr": 0.5}, train.folder / "session")

    def abandon(rows: object) -> None:
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"):
        session.run(given, train.folder / "abandoned", watch=abandon)


def test_smoothed_labels_train_and_do_not_validate(train: Train) -> None:
    config = resolve(dict(label_smoothing=0.3, hidden_size=16, num_layers=1, num_heads=2), "cpu", DEFAULTS)
    model, batch = TASK.model(config), TASK.held_out(config)[0]
    smoothed, plain = float(model(*batch).detach()), float(model.eval()(*batch).detach())
    flat = torch.nn.functional.log_softmax(_logits(model, batch[0]), -1)
    spread = -float(flat.mean())
    assert smoothed == pytest.approx(0.7 * plain + 0.3 * spread, rel=1e-5)


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    handle = model.head.register_forward_hook(lambda module, args, output: found.append(output.detach()))
    model(tokens, tokens)
    handle.remove()
    return found[0].float()
