"""What a measurement must not get wrong without anybody's noticing. The GPU path runs over an imitation."""

import contextlib
import dataclasses
import gc
import json
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cuda
import pytest
import torch
from click.testing import CliRunner

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf import cases, check, clock, everything, instances, measure, results, run
from perf.contenders import CONTENDERS, FUSEDOPT, Contender, Setup, ours
from perf.contenders.around import Steps
from perf.contenders.torch_optim import compiled
from perf.instances import Job, build
from perf.measure import Bench
from perf.stages import first_step
from perf.work import ADAMW, FORMATS, MAX_NORM, WORKS

SMALL = cases.Fitted(cases.Case("small", "two tensors", dict), {"a": (64, 64), "b": (7,)}, "whole")
forms = pytest.mark.parametrize("form", FORMATS.values(), ids=lambda form: form.name)


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """On the imitation of a GPU."""
    with fake_cuda.bench(tmp_path, monkeypatch, rounds=3) as found:
        yield found


def job(device: str = "cuda", form: str = "fp32", work: str = "clip") -> Job:
    return Job(SMALL, FORMATS[form], WORKS[work], device)


def named(name: str, make: Callable[[Setup], Any]) -> Contender:
    return dataclasses.replace(FUSEDOPT, name=name, make=make)


# What the check notices ---------------------------------------------------------------------------------------------


def without(work: str) -> Callable[[Setup], Any]:
    """Ours doing less than it was asked for."""
    return lambda setup: FUSEDOPT.make(dataclasses.replace(setup, work=WORKS[work]))


def clips_what_is_scaled(setup: Setup) -> Any:
    step = without("step")(setup)

    def whole() -> None:
        torch.nn.utils.clip_grad_norm_(setup.params, MAX_NORM)
        for p in setup.params:
            assert p.grad is not None
            p.grad /= setup.scale
        step()

    return whole


@forms
@pytest.mark.parametrize(
    "work, make", [("clip", without("step")), ("amp", without("clip")), ("amp", clips_what_is_scaled)],
    ids=["no clipping", "no unscaling", "clipping before unscaling"],
)  # fmt: skip
def test_work_that_is_left_out_is_noticed_in_every_format(form: Any, work: str, make: Callable[[Setup], Any]) -> None:
    assert not check.error(named("wrong", make), form, WORKS[work], "cpu") <= FUSEDOPT.tolerance(form)


def test_a_step_that_is_not_skipped_is_noticed() -> None:
    def make(setup: Setup) -> Any:
        step = FUSEDOPT.make(dataclasses.replace(setup, work=WORKS["clip"]))

        def unscaled() -> None:
            for p in setup.params:
                assert p.grad is not None
                p.grad /= setup.scale
            step()

        return unscaled

    form = FORMATS["fp32"]
    assert not check.error(named("never skips", make), form, WORKS["amp"], "cpu") <= form.tolerance


@forms
def test_lost_weight_decay_is_noticed_in_every_format(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "ADAMW", {**ADAMW, "weight_decay": 0.0})
    try:
        assert check.error(FUSEDOPT, form, WORKS["step"], "cpu") > FUSEDOPT.tolerance(form)
    except ArithmeticError as lost:  # what the tolerance hides
        assert form.name != "fp32" and re.fullmatch("weight decay is -?[0-3]% of what it should be", str(lost))


def test_weights_that_are_rounded_in_every_step_do_not_lose_nothing() -> None:
    def make(setup: Setup) -> Any:
        wide = [p.detach().float() for p in setup.params]
        optimizer = torch.optim.AdamW(wide, **ADAMW)

        @torch.no_grad()
        def step() -> None:
            for q, p in zip(wide, setup.params, strict=True):
                assert p.grad is not None
                q.copy_(p)
                q.grad = p.grad.float()
            optimizer.step()
            for q, p in zip(wide, setup.params, strict=True):
                p.copy_(q)

        return step

    form = FORMATS["bf16"]
    assert check.error(named("forgets", make), form, WORKS["step"], "cpu") > 1.5 * form.tolerance


def test_a_first_step_is_judged_by_its_contender_s_tolerance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"seconds": 1.0, "import_s": 1.0, "error": 0.9 * FUSEDOPT.tolerance(FORMATS["half"])}
    assert found["error"] > FORMATS["half"].tolerance
    monkeypatch.setattr(first_step, "_timed", lambda *arguments: found)
    row = first_step._row(results.Writer(tmp_path / "r.jsonl"), FUSEDOPT, job("cpu", "half"), 0.0)
    assert row["kind"] == "first"


# What contenders do -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own imports
def test_every_compiled_step_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch runs a function as it is once it has compiled 8 versions of it."""
    made: list[Any] = []
    compiler = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend=backend))
    from torch._dynamo import config

    with config.patch(recompile_limit=config.recompile_limit, fail_on_recompile_limit_hit=False):  # as they were, then
        for _ in range(10):
            p = torch.nn.Parameter(torch.ones(3))
            p.grad = torch.ones(3)
            compiled(False)(Setup([p], FORMATS["fp32"], WORKS["step"]))()
    assert len(made) == 10


def test_gradients_of_copies_are_set_once() -> None:
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    steps = Steps(Setup([p], FORMATS["bf16"], WORKS["clip"]), torch.optim.AdamW, copied=True)
    (grad,) = (q.grad for q in steps.params)
    assert grad is not None
    steps.step()
    assert steps.params[0].grad is grad and torch.linalg.vector_norm(grad) == pytest.approx(1)


def test_clipping_by_grad_scale_updates_the_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []
    update: Any = torch._amp_update_scale_  # pyright: ignore[reportPrivateImportUsage] # has no other name
    monkeypatch.setattr(torch, "_amp_update_scale_", lambda s, *more: scales.append(float(update(s, *more))))
    assert check.error(CONTENDERS["torch fused, clipping by grad_scale"], FORMATS["fp32"], WORKS["amp"], "cpu") < 1e-5
    assert scales == [check.SCALE] * check.STEPS + [check.SCALE / 2]


# Memory and time ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", [False, True])
def test_what_a_batch_held_is_free_before_the_next(gpu: Bench, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    """Even what is held in cycles, and what a contender held that could not be built."""
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def make(setup: Setup) -> Any:
        def step() -> None:
            if fails and step.__dict__.setdefault("steps", iter([1, 2])) and next(step.__dict__["steps"], None) is None:
                raise RuntimeError("out of memory")

        step.__dict__.update(itself=step, params=setup.params)
        held.extend(map(weakref.ref, setup.params))
        return step

    def count(*_: object) -> int:
        alive.append(sum(ref() is not None for ref in held))
        return 0

    def next_one(setup: Setup) -> Any:
        count()
        return lambda: None

    who = [named("cyclic", make), named("next", next_one)]
    gpu.checked = {(c.name, "fp32", "clip"): None for c in who}
    gpu.memory = 1e8 if fails else 1.0  # together, or one after the other
    gc.disable()
    try:
        measure.measure(gpu, job(), who)
    finally:
        gc.enable()
    assert held and set(alive) == {0}


def test_steps_of_many_launches_are_not_profiled_nor_copied(gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "launches", lambda step: 7)
    assert build(FUSEDOPT, job(), 0).launches == 7
    monkeypatch.setattr(instances, "SLOW", 0.0)
    assert build(FUSEDOPT, job(), 0).launches is None
    made: list[Setup] = []
    counter = named("counter", lambda setup: made.append(setup) or (lambda: None))
    monkeypatch.setattr(instances, "MAX_TENSORS", 5)
    build(counter, job(), 10**9)
    assert len(made) == 2


def test_the_gpu_is_kept_busy_by_fast_cycles_and_not_for_long(gpu: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[int] = []
    seconds = iter([0.04, 0.02, 0.01, 0.01, 0.01, 0.01])
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append)
    with monkeypatch.context() as patch:
        patch.setattr(clock.CudaClock, "_elapsed", lambda self, call: next(seconds))
        found = clock.CudaClock()
    now = iter([0.0, 3.0, 3.5])
    monkeypatch.setattr(clock.time, "perf_counter", lambda: next(now, 4.0))
    assert found.sample(lambda: None).host == 3.0
    assert slept == [pytest.approx(found.LONGEST / (0.01 / found.SPIN), rel=1e-6)]


def test_launches_are_kernels_and_not_annotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen on the GPU by itself or, where that shows nothing, with the CPU's events beside them."""

    def event(device: str, annotation: bool = False) -> Any:
        return SimpleNamespace(device_type=SimpleNamespace(name=device), is_user_annotation=annotation)

    seen = {1: list[Any](), 2: [event("CPU"), event("CUDA"), event("CUDA", annotation=True), event("CUDA")]}

    def profile(activities: list[Any]) -> Any:
        return contextlib.nullcontext(SimpleNamespace(events=lambda: seen[len(activities)]))

    monkeypatch.setattr(torch.profiler, "profile", profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert instances.launches(lambda: None) == 2
    seen[1] = [event("CUDA")]
    assert instances.launches(lambda: None) == 1


# What is lost -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_not_begun_again(gpu: Bench) -> None:
    gpu.memory = 1.0
    assert run.measure_jobs(gpu, selection=run.Selection(("gpt2",), ("fp32",), ("step",), graph=True), tell=len)
    (row,) = gpu.writer.rows
    assert row["why"] == "does not fit" and (row["case"], row["graph"]) == ("gpt2", True)


@pytest.mark.parametrize("checked", [False, True])
def test_nobody_gets_the_blame_for_a_gpu_that_another_lost(
    gpu: Bench, monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def kills(setup: Setup) -> Any:
        monkeypatch.setattr(torch.cuda, "synchronize", dead)
        dead()

    guilty, innocent = named("guilty", kills), named("innocent", FUSEDOPT.make)
    gpu.checked = {} if checked else {("guilty", "fp32", "clip"): None, ("innocent", "fp32", "clip"): None}
    with pytest.raises(measure.GpuLost, match="illegal memory access"):
        measure.measure(gpu, job(), [guilty, innocent])
    assert [(row["contender"], row.get("wrong", False)) for row in gpu.writer.rows] == [("guilty", checked)]


def test_what_was_wrong_is_not_tried_again_after_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "r.jsonl"
    row = {"kind": "red", "contender": "x", "format": "fp32", "work": "clip", "why": "it kills"}
    out.write_text("".join(json.dumps(r) + "\n" for r in (row | {"wrong": True}, row | {"contender": "y"})))
    given: list[Bench] = []
    monkeypatch.setattr(everything, "measure_jobs", lambda bench, deadline, **more: given.append(bench))
    done = CliRunner().invoke(
        everything.measure, ["--out", str(out), "--device", "cpu", "--seconds", "5", "--begun", "0", "--lost", "0"]
    )
    assert done.exit_code == 0, done.output
    assert given[0].checked == {("x", "fp32", "clip"): "it kills"}
