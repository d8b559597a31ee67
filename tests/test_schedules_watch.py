"""The watched file: what it says, when it is read, and that the schedule under it goes on as if it were not there."""

import io
import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_schedules import advance, same, sgd
from torch.optim import lr_scheduler

from fusedopt.schedules import NAMES, Watched, make

_times = itertools.count(1)


def write(file: Path, text: str) -> None:
    """As by hand: never twice within the resolution of the file system's clock."""
    file.write_text(text, encoding="utf-8")
    os.utime(file, (next(_times), next(_times)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "lr.txt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.05", [0.05, 0.005]),
        ("  5e-2  # for now\n\n", [0.05, 0.005]),
        ("x0.5", [0.1, 0.01]),
        ("0.7\nx 2\n# half of it was too little", [0.4, 0.04]),
        ("x0", [0.0, 0.0]),
        ("0", [0.0, 0.0]),
        ("", [0.2, 0.02]),
        (" \n# nothing\n", [0.2, 0.02]),
        (None, [0.2, 0.02]),
    ],
)
def test_the_last_line_counts(file: Path, text: str | None, expected: list[float]) -> None:
    if text is not None:
        write(file, text)
    optimizer = sgd(0.2, 0.02)
    watched = Watched(make("constant", optimizer, steps=9), optimizer, file)
    for rates in advance(watched, optimizer, 3):
        assert rates == pytest.approx(expected, rel=1e-15)
    assert watched.get_last_lr() == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: make("linear", optimizer, steps=40, warmup_steps=5, min_lr=0.01),
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9),
        lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 40, eta_min=0.01),
        lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=41, cycle_momentum=False),
    ],
    ids=["ours", "exponential", "cosine", "one cycle"],
)  # fmt: skip
def test_the_schedule_goes_on_underneath(file: Path, schedule: Any, tensor: bool) -> None:
    """torch's schedulers, whose next lr is a multiple of the present one, never see the file's."""
    lrs = [0.3, 0.1]
    plain = sgd(*lrs)
    expected = advance(schedule(plain), plain, 24)
    optimizer = sgd(*[torch.tensor(lr, dtype=torch.float64) if tensor else lr for lr in lrs])
    watched = Watched(schedule(optimizer), optimizer, file)
    seen = advance(watched, optimizer, 5)
    write(file, "x0.5")
    seen += advance(watched, optimizer, 5)
    write(file, "0.06")
    seen += advance(watched, optimizer, 5)
    file.unlink()
    seen += advance(watched, optimizer, 9)
    assert seen[:6] == expected[:6] and seen[16:] == expected[16:]
    assert seen[6:11] == [[0.5 * rate for rate in rates] for rates in expected[6:11]]
    ratio = expected[0][1] / expected[0][0]
    assert all(a == 0.06 and b == pytest.approx(0.06 * ratio, rel=1e-15) for a, b in seen[11:16])


def test_the_file_is_read_when_it_changes_and_not_otherwise(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, read = [], Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda self, **given: reads.append(self) or read(self, **given))
    write(file, "0.1")
    optimizer = sgd(0.2)
    watched = Watched(make("constant", optimizer, steps=99), optimizer, file)
    advance(watched, optimizer, 10)
    assert len(reads) == 1
    write(file, "0.3")
    assert advance(watched, optimizer, 10)[1:] == [[0.3]] * 9 and len(reads) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"0,0003", "'0,0003' is no learning rate: write .* x0.25 stays"),
        (b"x0.1\nfast", "'fast' is no learning rate"),
        (b"-1", "'-1' is no learning rate"),
        (b"xnan", "'xnan' is no learning rate"),
        (b"1e999", "'1e999' is no learning rate"),
        (b"x", "'x' is no learning rate"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"0.1\n" * 20_000, "not a small text file"),
    ],
)
def test_what_cannot_be_read_is_reported_once_and_changes_nothing(file: Path, content: bytes, message: str) -> None:
    write(file, "x0.25")
    optimizer = sgd(0.2)
    watched = Watched(make("constant", optimizer, steps=99), optimizer, file)
    advance(watched, optimizer, 2)
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=message) as caught:
        assert advance(watched, optimizer, 5) == [[0.05]] * 5
    assert len(caught) == 1 and str(caught[0].message).startswith(str(file))
    write(file, "x0.5")
    assert advance(watched, optimizer, 2)[1] == [0.1]


def test_a_folder_or_a_pipe_is_not_opened(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, pipe, tmp_path / "pipe" / "below"):
        with pytest.warns(UserWarning, match="not a small text file|Not a directory") as caught:
            optimizer = sgd(0.2)
            watched = Watched(make("constant", optimizer, steps=99), optimizer, path)
            assert advance(watched, optimizer, 5) == [[0.2]] * 5
        assert len(caught) == 1


@pytest.mark.parametrize("entry", ["x0.5", "0.05", ""])
@pytest.mark.parametrize("name", [*NAMES, "torch's"])
def test_a_resumed_run_has_the_same_bits(file: Path, name: str, entry: str) -> None:
    def begin() -> tuple[Watched, torch.optim.Optimizer]:
        optimizer = sgd(0.2, torch.tensor(0.1))
        if name == "torch's":
            return Watched(lr_scheduler.ExponentialLR(optimizer, 0.9), optimizer, file), optimizer
        return Watched(make(name, optimizer, steps=30, warmup_steps=4), optimizer, file), optimizer

    watched, optimizer = begin()
    write(file, entry)
    advance(watched, optimizer, 9)
    content = io.BytesIO()
    torch.save({"watched": watched.state_dict(), "optimizer": optimizer.state_dict()}, content)
    content.seek(0)
    state = torch.load(content, weights_only=True)
    file.unlink()
    resumed, other = begin()
    advance(resumed, other, 1)
    write(file, entry)
    other.load_state_dict(state["optimizer"])
    resumed.load_state_dict(state["watched"])
    assert same(resumed.get_last_lr(), watched.get_last_lr())
    assert same(advance(resumed, other, 12), advance(watched, optimizer, 12))
    write(file, "")
    assert same(advance(resumed, other, 5), advance(watched, optimizer, 5))


def test_a_resumed_run_has_the_last_valid_line_when_the_file_is_damaged(file: Path) -> None:
    optimizer = sgd(0.2)
    watched = Watched(make("constant", optimizer, steps=30), optimizer, file)
    write(file, "x0.5")
    advance(watched, optimizer, 2)
    state = watched.state_dict()
    write(file, "x0.5.5")
    with pytest.warns(UserWarning, match="the schedule stays"):
        resumed = Watched(make("constant", optimizer, steps=30), optimizer, file)
    resumed.load_state_dict(state)
    with pytest.warns(UserWarning, match="x0.5 stays"):
        assert advance(resumed, optimizer, 4) == [[0.1]] * 4


def test_plateau_drops_its_own_lr_and_not_the_files(file: Path) -> None:
    optimizer = sgd(0.2)
    schedule = make("plateau", optimizer, steps=30, arguments={"patience": 0, "factor": 0.5})
    watched = Watched(schedule, optimizer, file)
    write(file, "0.7")
    advance(watched, optimizer, 2)
    for loss in (1.0, 2.0):
        watched.validated(loss)
        assert optimizer.param_groups[0]["lr"] == 0.7
    file.unlink()
    assert advance(watched, optimizer, 2) == [[0.7], [0.1]]
    Watched(lr_scheduler.ExponentialLR(optimizer, 0.9), optimizer, file).validated(1.0)  # has no use for it
    plateau = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    Watched(plateau, optimizer, file).step(1.0)
    assert plateau.best == 1.0


def test_ranks_go_by_what_they_agree_on(tmp_path: Path) -> None:
    """The second rank has no file; in between each asks with what its own says."""
    asked: list[str] = []
    first, second = sgd(0.2), sgd(0.2)
    write(tmp_path / "lr.txt", "x0.5")
    leader = Watched(make("constant", first, steps=9), first, tmp_path / "lr.txt")
    follower = Watched(
        make("constant", second, steps=9), second, tmp_path / "none", lambda own: asked.append(own) or leader.entry
    )
    assert advance(follower, second, 3) == advance(leader, first, 3) == [[0.1]] * 3
    assert asked == [""] * 4


def test_a_warning_that_is_an_error_leaves_the_lr_as_it_was(file: Path) -> None:
    optimizer = sgd(0.2)
    write(file, "x0.5")
    watched = Watched(make("constant", optimizer, steps=9), optimizer, file)
    write(file, "half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="'half' is no learning rate"):
            watched.step()
    assert optimizer.param_groups[0]["lr"] == 0.1
