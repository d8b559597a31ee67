"""The measuring itself: what is checked and timed, and which rows come of it. The GPU path runs over an imitation."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import fake_cuda
import pytest
import torch

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf import cases, check, clock, results, run
from perf.contenders import CONTENDERS, FUSEDOPT, Setup
from perf.instances import Job, build
from perf.measure import Bench, measure
from perf.work import FORMATS, WORKS

HERE = [c for c in CONTENDERS.values() if "cpu" in c.devices and c.package in ("torch", "fusedopt")]
SMALL = cases.Case("small", "three tensors", lambda: {"a": (64, 64), "b": (7,), "c": ()})


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    found = Bench.on(results.Writer(tmp_path / "r.jsonl"), "cpu")
    found.memory = 1e8
    return found


@pytest.fixture
def gpu_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """On the imitation of a GPU."""
    with fake_cuda.bench(tmp_path, monkeypatch, rounds=4) as found:
        yield found


def job(device: str = "cpu", work: str = "clip", graph: bool = False) -> Job:
    fitted = SMALL.fitted(1e9)
    assert fitted is not None
    return Job(fitted, FORMATS["fp32"], WORKS[work], device, graph)


def named(name: str, make: Callable[[Setup], Any]) -> Any:
    return dataclasses.replace(FUSEDOPT, name=name, make=make)


# Cases -------------------------------------------------------------------------------------------------------------


def test_cases_are_what_they_are_called() -> None:
    sizes = {name: (f.tensors, f.elements) for name in cases.CASES if (f := cases.CASES[name].fitted(math.inf))}
    assert sizes["gpt2"] == (148, 124_439_808)
    assert sizes["llama3.2-1b"] == (146, 1_235_814_400)
    assert sizes["llama3-8b"] == (291, 8_030_261_248)
    assert sizes["resnet50"] == (161, 25_557_032)
    assert sizes["qwen3-30b-a3b"][0] == 18_867
    assert (sizes["tiny-1000"], sizes["tiny-10000"]) == ((1000, 1_024_000), (10_000, 640_000))
    assert sizes["over-int32"][1] > 2**31


@pytest.mark.parametrize("name", ["gpt2", "llama3-8b", "vit-h-14", "qwen3-30b-a3b"])
def test_a_case_that_does_not_fit_is_cut_to_whole_layers(name: str) -> None:
    case = cases.CASES[name]
    whole = case.fitted(math.inf)
    assert whole is not None and whole.part == "whole"
    cut = case.fitted(0.6 * whole.elements)
    assert cut is not None and "layers" in cut.part and cut.elements <= 0.6 * whole.elements
    kept, layers = map(int, cut.part.replace(" layers", "").split(" of "))
    per_layer = (whole.tensors - cut.tensors) / (layers - kept)
    assert per_layer == int(per_layer) and kept * per_layer < cut.tensors
    assert case.fitted(1000) is None


def test_one_tensor_cannot_be_cut() -> None:
    assert cases.CASES["embedding"].fitted(1e6) is None


# Correctness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contender", HERE, ids=lambda c: c.name)
def test_contenders_compute_adamw(contender: Any) -> None:
    pairs = [(f, w) for f in FORMATS.values() for w in WORKS.values() if contender.takes(f, w, "cpu")]
    assert pairs
    for form, work in pairs:
        assert check.error(contender, form, work, "cpu") <= form.tolerance


@pytest.mark.parametrize("wrong", [{"lr": 1.0001e-2}, {"weight_decay": 0.09}, {"eps": 1e-3}, {"betas": (0.9, 0.99)}])
def test_wrong_hyper_parameters_are_found(wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from perf.contenders import ours
    from perf.work import ADAMW

    monkeypatch.setattr(ours, "ADAMW", {**ADAMW, **wrong})
    assert not check.error(FUSEDOPT, FORMATS["fp32"], WORKS["step"], "cpu") <= FORMATS["fp32"].tolerance


def test_missing_clipping_is_found() -> None:
    """AdamW hardly depends on the size of gradients; the check must see that it changed from step to step."""

    def make(setup: Setup) -> Any:
        return FUSEDOPT.make(dataclasses.replace(setup, work=WORKS["step"]))

    assert check.error(named("no clipping", make), FORMATS["fp32"], WORKS["clip"], "cpu") > FORMATS["fp32"].tolerance


def test_red_means_no_number(bench: Bench) -> None:
    def fails(setup: Setup) -> Any:
        raise RuntimeError("no kernel\nimage")

    idle = named("idle", lambda setup: lambda: None)
    rows = measure(bench, job(), [FUSEDOPT, idle, named("fails", fails)])
    assert [row["contender"] for row in rows] == ["fusedopt"]
    red = {row["contender"]: row["why"] for row in bench.writer.rows if row["kind"] == "red"}
    assert red["idle"].startswith("wrong result: off by 1 of the change")
    assert red["fails"] == "RuntimeError: no kernel image"


def test_a_step_that_fails_later_costs_nobody_else(bench: Bench) -> None:
    calls = iter(range(100))

    def make(setup: Setup) -> Any:
        step = FUSEDOPT.make(setup)

        def later() -> None:
            if next(calls) > check.STEPS + 3:
                raise RuntimeError("out of luck")
            step()

        return later

    rows = measure(bench, job(), [FUSEDOPT, named("late", make), named("other", FUSEDOPT.make)])
    assert [row["contender"] for row in rows] == ["fusedopt", "other"]
    (red,) = (row for row in bench.writer.rows if row["kind"] == "red")
    assert (red["contender"], red["why"]) == ("late", "while it was timed: RuntimeError: out of luck")


def test_who_takes_minutes_to_begin_is_left_out_and_named(bench: Bench) -> None:
    slow = dataclasses.replace(FUSEDOPT, name="slow", most_tensors=2)
    assert [row["contender"] for row in measure(bench, job(), [FUSEDOPT, slow])] == ["fusedopt"]
    assert [row["why"] for row in bench.writer.rows if row["contender"] == "slow"] == [
        "left out: with more than 2 tensors it takes minutes"
    ]


# Clocks ------------------------------------------------------------------------------------------------------------


class Scripted:
    """A clock whose seconds are what the calls return."""

    def sample(self, call: Callable[[], Any]) -> clock.Sample:
        return clock.Sample(*call())


def test_calls_take_turns_and_ratios_are_within_a_round() -> None:
    order: list[str] = []
    slow = iter([9, 9, 2.0, 4.0, 6.0, 8.0, 10.0])

    def a() -> tuple[float, float, float]:
        order.append("a")
        return (1.0, 0.5, 1.5)

    def b() -> tuple[float, float, float]:
        order.append("b")
        seconds = next(slow)
        return (seconds, 0.5, seconds)

    times = clock.turns({"a": a, "b": b}, Scripted(), rounds=5, seconds=60)
    assert order[:6] == ["a", "b", "b", "a", "a", "b"]
    assert times.spread("b", "device") == {"p20": pytest.approx(3.6), "median": 6.0, "p80": pytest.approx(8.4)}
    assert times.ratio("a", "b", "device")["median"] == pytest.approx(1 / 6)
    assert times.spread("a", "host")["median"] == 0.5


def test_rounds_end_when_time_is_up_but_not_before_three() -> None:
    times = clock.turns({"a": lambda: (1, 1, 1)}, Scripted(), rounds=50, seconds=0)
    assert len(times.samples["a"]) == 3


def test_cuda_clock_over_an_imitation(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cuda.on_cpu(monkeypatch):
        calls = []
        sample = clock.CudaClock().sample(lambda: calls.append(1))
    assert len(calls) == 2 and sample.host <= sample.wall and sample.device >= 0


# The GPU's path ----------------------------------------------------------------------------------------------------


def test_rows_of_the_gpu_path(gpu_bench: Bench) -> None:
    rows = measure(gpu_bench, job("cuda"), [FUSEDOPT, CONTENDERS["torch fused"]])
    ours, theirs = results.read(gpu_bench.writer.path)
    assert [r["contender"] for r in rows] == ["fusedopt", "torch fused"] and rows[1] == theirs
    assert ours["rounds"] == 4 and ours["held_bytes"] == 0 and ours["peak_bytes"] == 2000
    assert (ours["bytes"], ours["bytes_from"], theirs["bytes"], theirs["bytes_from"]) == (32, "counted", 40, "derived")
    rate = ours["bytes"] * ours["elements"] / ours["device_ms"]["median"] / 1e6
    assert ours["gb_s"] == pytest.approx(rate, rel=1e-3)
    assert ours["share"] == pytest.approx(ours["gb_s"] / ours["ceiling_gb_s"], rel=1e-3)
    assert theirs["ratio"]["p20"] <= theirs["ratio"]["median"] <= theirs["ratio"]["p80"] and "ratio" not in ours
    assert ours["machine"]["gpu"] == "Imitation" and {"commit", "dirty"} <= ours.keys()


def test_captured_steps_are_replayed(gpu_bench: Bench) -> None:
    fake_cuda.Graph.replays = 0
    (row,) = measure(gpu_bench, job("cuda", graph=True), [FUSEDOPT, CONTENDERS["torch for-loop"]])
    assert row["graph"] is True and fake_cuda.Graph.replays == 1 + 2 * (4 + 2)


def test_small_cases_rotate_among_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[torch.nn.Parameter]] = []
    counter = named("counter", lambda setup: made.append(list(setup.params)) or (lambda: None))
    with fake_cuda.on_cpu(monkeypatch):
        build(counter, job("cuda"), cache_bytes=50_000)
        assert len(made) == 4 * 50_000 // (4104 * 20)
        made.clear()
        build(counter, job("cuda"), cache_bytes=10**9)
        assert len(made) == 8
        made.clear()
        build(counter, job("cuda"), cache_bytes=100)
    assert len(made) == 1


def test_contenders_that_do_not_fit_together_are_measured_in_batches_with_ours(bench: Bench) -> None:
    bench.memory = 2.5 * 4104 * 20
    rows = measure(bench, job(), HERE[:4])
    assert [row["contender"] for row in rows] == [c.name for c in HERE[:4]]
    assert all("ratio" in row for row in rows[1:])


# Selection and files -----------------------------------------------------------------------------------------------


def test_every_case_format_and_work_comes_early() -> None:
    first = list(run.order("cuda", run.Selection()))[: len(run.FIRST)]
    assert {key[0] for key in first} == set(cases.CASES)
    assert {key[1] for key in first} == set(FORMATS) and {key[2] for key in first} == set(WORKS)
    assert len(set(run.order("cuda", run.Selection()))) == len(cases.CASES) * len(FORMATS) * len(WORKS) * 2
    chosen = run.Selection(cases=("gpt2",), works=("amp",), graph=False)
    assert list(run.order("cuda", chosen)) == [("gpt2", form, "amp", False) for form in FORMATS]


def test_no_job_is_begun_that_cannot_end_in_time(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10_000, 10))
    monkeypatch.setattr(run.time, "monotonic", lambda: next(now))
    monkeypatch.setattr(run, "_measure_one", lambda bench, key, who, named: iter(()))
    said: list[str] = []
    done = run.measure_jobs(bench, 45, tell=said.append)
    assert len(done) == 2 and said == ["out of time: the rest from tiny-1000 fp32 clip on was not measured"]


def test_a_torn_last_line_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    results.Writer(path).add("copy", device="cpu", gb_s=1.0)
    path.write_text(path.read_text() + '{"kind": "mea')
    assert [row["kind"] for row in results.read(path)] == ["copy"]
    path.write_text(path.read_text() + "\n" + json.dumps({"kind": "copy"}) + "\n")
    with pytest.raises(ValueError, match=r"r\.jsonl:2 is no row"):
        results.read(path)


def test_missing_packages_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = dataclasses.replace(FUSEDOPT, name="absent", package="no_such_package", install="pip install absent")
    monkeypatch.setitem(run.CONTENDERS, "absent", absent)
    rows = run.missing(results.Writer(tmp_path / "r.jsonl"), run.Selection(contenders=("absent",)))
    assert [(row["contender"], row["install"]) for row in rows] == [("absent", "pip install absent")]


def test_sizes_of_cases_need_no_memory() -> None:
    assert sum(prod(s) for s in cases.CASES["over-int32"].shapes().values()) == 2**31 + 2**15


def test_what_a_run_writes_does_not_make_it_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    monkeypatch.setattr(results, "_git", lambda *arguments: asked.append(arguments))
    results.stamp.cache_clear()
    results.stamp()
    results.stamp.cache_clear()
    assert any(
        arguments[:2] == ("status", "--short") and ":(top,exclude)perf/results" in arguments for arguments in asked
    )
