"""What `fusedopt compare` runs, keeps and never runs twice; all runs are stubs."""

import json
from pathlib import Path

import pytest
from compare_command import Compare, assert_refused
from stub_runs import StubRuns

from fusedopt.compare import plot, tuned
from fusedopt.train.errors import Stopped

SHORT = ("--schedules", "cosine", "--steps", 20)
AXES = (*SHORT, "--optimizers", "sgd", "adamw", "--seeds", 2)


@pytest.fixture
def compare(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Compare:
    """Without plots, which would cost most of the time here."""
    monkeypatch.setattr(plot, "draw", lambda *_: {})
    return Compare(tmp_path, capsys, monkeypatch)


def names(compare: Compare) -> list[str]:
    return [folder.name for _, folder in compare.session.ran]


def test_a_stopped_comparison_goes_on_where_it_was(compare: Compare) -> None:
    compare.stub(StubRuns(stop=(3, Stopped(15))))
    result = compare(*AXES)
    assert result.status == 128 + 15 and "the same command continues" in result.err
    assert [row["cell"] for row in compare.rows()] == ["sgd-cosine-seed0", "adamw-cosine-seed0"]
    compare.stub(StubRuns())
    result = compare(*AXES)
    assert result.status == 0 and "2 of 4 runs have a result already" in result.out
    assert names(compare) == ["sgd-cosine-seed1", "adamw-cosine-seed1"]
    compare.stub(StubRuns())
    assert compare(*AXES).status == 0 and compare(*AXES, "--report").status == 0 and not compare.session.ran
    compare(*SHORT, "--optimizers", "lion", "--seeds", 1)  # more of the same comparison
    assert names(compare) == ["lion-cosine-seed0"] and len(compare.rows()) == 5


def test_a_row_holds_what_the_run_was_and_became(compare: Compare) -> None:
    compare(*AXES)
    row = compare.rows()[1]
    expected = {"cell": "adamw-cosine-seed0", "status": "done", "schedule": "cosine", "seed": 0, "batch_size": None}
    assert expected.items() <= row.items() and row["own"]["optimizer"] == "adamw" and row["fixed"]["steps"] == 20
    assert row["config"]["num_layers"] == 1 and row["config"]["val_interval"] == 1 and "out" not in row["config"]
    assert row["curve"][0] == [0, 6.0] and row["curve"][-1] == [20, row["val_loss_last"]]
    assert row["machine"]["cores"] >= 1 and row["measured"]["chrf_held_out"] > 0 and "text" in row["data"][0]


def test_other_settings_need_another_folder(compare: Compare) -> None:
    compare.stub(StubRuns(stop=(2, Stopped(15))))
    compare(*AXES)
    assert_refused(compare(*AXES, "--steps", 30), "in the results has other settings: --steps was 20, now 30: restore")
    (compare.folder / "out" / "results.jsonl").unlink()
    result = compare(*SHORT, "--optimizers", "adamw", "--clip", 2)  # begun, without a result
    assert_refused(result, "adamw-cosine-seed0 in")
    assert "--clip was the default, now 2.0: restore these, or choose another --out" in result.err
    assert compare(*AXES, "--steps", 30, out="other").status == 0


def test_divergence_is_a_result_and_refusal_is_tried_again(compare: Compare) -> None:
    compare.stub(StubRuns(diverges=0.05, broken="adamw"))  # train's rate for sgd is 0.1
    result = compare(*AXES)
    assert result.status == 0 and "run 1 of 4: sgd-cosine-seed0: diverged: the loss is no longer finite" in result.out
    assert [row["status"] for row in compare.rows()] == ["diverged", "refused", "diverged", "refused"]
    assert compare.rows()[0]["step"] == 2 and compare.rows()[1]["reason"] == "adamw does not work here"
    assert "2 diverged (step 2, 2)" in result.out and "2 refused" in result.out
    compare.stub(StubRuns())
    assert compare(*AXES).status == 0
    assert names(compare) == ["adamw-cosine-seed0", "adamw-cosine-seed1"]
    assert [row["status"] for row in compare.rows()] == ["diverged", "done", "diverged", "done"]


def test_what_no_run_can_do_ends_it_and_what_some_cannot_does_not(compare: Compare) -> None:
    result = compare(*AXES, "--schedules", "wsd", "--warmup-steps", 18)  # no room for wsd's decay
    assert result.status == 0 and "2 refused" in result.out
    assert {(row["schedule"], row["status"]) for row in compare.rows()} == {("cosine", "done"), ("wsd", "refused")}
    assert_refused(compare(*AXES, "--warmup-steps", 20, out="none"), "--warmup-steps 20 must be less than --steps 20")
    assert not compare.rows("none")


def test_tuned_rates_are_found_kept_and_used(compare: Compare) -> None:
    result = compare(*SHORT, "--optimizers", "sgd", "adamw", "lion", "--seeds", 2, "--tune-lr")
    assert result.status == 0
    swept = [settings for settings, folder in compare.session.ran if folder.parent.name == "tune"]
    assert {settings["seed"] for settings in swept} == {tuned.SEED} and len(swept) == 12
    assert {row["optimizer"]: row["own"]["lr"] for row in compare.rows()} == {"sgd": 0.1, "adamw": 0.01, "lion": 0.001}
    assert "0.0032: " in result.out and "†" not in result.out
    (entry,) = json.loads((compare.folder / "out" / "tuned.json").read_text())
    assert entry["settings"]["hidden_size"] == 16 and entry["optimizers"]["adamw"]["lr"] == 0.01
    assert entry["optimizers"]["adamw"]["steps"] == 20 and len(entry["optimizers"]["adamw"]["tried"]) == 4
    compare.stub(StubRuns())
    compare(*SHORT, "--optimizers", "lion", "--seeds", 3)  # the file is found again, and nothing is tuned twice
    assert [settings["lr"] for settings, _ in compare.session.ran] == [0.001]
    (compare.folder / "larger").mkdir()
    (compare.folder / "out" / "tuned.json").rename(compare.folder / "larger" / "tuned.json")
    result = compare(*SHORT, "--hidden-size", 32, "--optimizers", "adamw", out="larger")
    assert "with train's learning rate (--tune-lr finds one): adamw" in result.out and "0.002†" in result.out


def test_a_search_survives_a_kill_and_divergence(compare: Compare) -> None:
    compare.stub(StubRuns(stop=(3, Stopped(2))))
    assert compare(*AXES, "--tune-lr").status == 130
    compare.stub(StubRuns(diverges=0.0, broken="adamw"))
    result = compare(*AXES, "--tune-lr")
    assert "adamw cannot be tuned: adamw does not work here" in result.out
    assert names(compare)[0] == "sgd-cosine-lr1" and "sgd-cosine-lr0.32" not in names(compare)
    compare.stub(StubRuns(diverges=0.0))
    result = compare(*SHORT, "--tune-lr", "--optimizers", "lion", "--seeds", 1, out="lost")
    assert "lion diverged at every learning rate from " in result.out and result.status == 0


def test_batch_sizes_have_their_own_steps_and_rates(compare: Compare) -> None:
    options = ("--optimizers", "adamw", "--schedules", "cosine", "--seeds", 1, "--batch-sizes", 1, 16, "full")
    result = compare(*options, "--epochs", 2)
    assert result.status == 0, result.err
    runs = {row["batch_size"]: row["config"] for row in compare.rows()}
    examples = runs["full"]["batch_size"]
    assert runs["full"]["steps"] == 2 and runs[1]["steps"] == 2 * examples and runs[16]["steps"] == -(-examples // 8)
    assert runs[16]["lr"] == 2 * 2e-3 and runs[1]["lr"] == 2e-3 / 2  # √(16/4), √(1/4): --batch-size is 4
    assert runs[16]["val_batches"] * 16 == runs[1]["val_batches"] == 512
    assert "Final validation loss by batch size" in result.out


def test_a_file_of_settings_gives_what_all_runs_share(compare: Compare) -> None:
    path = compare.folder / "settings.json"
    path.write_text(json.dumps({"clip": 0.5, "steps": 9, "lr": 0.5, "optimizer": "lion", "dropout": 0.2}))
    result = compare("--config", path, "--optimizers", "sgd", "--seeds", 1, "--dropout", 0.1)
    assert result.status == 0 and "because each run has its own: optimizer, lr" in result.out
    config = compare.rows()[0]["config"]
    assert (config["clip"], config["steps"], config["dropout"], config["optimizer"]) == (0.5, 9, 0.1, "sgd")
    assert config["lr"] == 0.1


def test_damaged_files_are_named(compare: Compare) -> None:
    compare(*AXES)
    (compare.folder / "out" / "results.jsonl").write_text('{"cell": "a"}\n')
    assert_refused(compare(*AXES), "results.jsonl: line 1 is no result of a comparison")
    (compare.folder / "out" / "results.jsonl").unlink()
    (compare.folder / "out" / "tuned.json").write_text("[1]")
    assert_refused(compare(*AXES), "tuned.json is damaged: delete it to tune anew")
