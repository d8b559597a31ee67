"""The bandwidth model: launches and times against published ones, and what must hold of any."""

import math
from collections.abc import Sequence
from math import prod
from pathlib import Path

import pytest

pytest.importorskip("perf", reason="perf/ is part of the checkout only")

from perf import predict
from perf.cases import CASES, Case, Fitted
from perf.contenders import CONTENDERS, FUSEDOPT
from perf.predict import hardware, launches
from perf.predict import model as bandwidth_model
from perf.predict.launches import NARROW, WIDE, Arguments, multi_tensor, plan
from perf.predict.model import Model, Prediction
from perf.results import Row, Writer
from perf.work import FORMATS, WORKS

H200 = hardware.HARDWARE["H200"]


def fitted(shapes: Sequence[tuple[int, ...]]) -> Fitted:
    found = Case("a case", "", lambda: {f"p{i}": shape for i, shape in enumerate(shapes)}).fitted(math.inf)
    assert found is not None
    return found


def sizes(case: str) -> tuple[int, ...]:
    found = CASES[case].fitted(math.inf)
    assert found is not None
    return tuple(map(prod, found.shapes.values()))


def code_rows() -> list[Row]:
    """As the compiler makes them for sm_90: kernels of fp32 and int8, the former for every work."""
    names = ("format", "work", "kernel", "registers", "bytes", "loaded", "instructions")
    norm, int8_norm = ("norm", 70, 4.0, 4.0, 3.9), ("norm", 72, 2.0, 2.0, 5.4)
    update, int8 = ("adamw", 54, 28.0, 16.0, 42.8), ("adamw", 80, 12.19, 7.09, 67.8)
    rows = [("fp32", "step", *update), ("int8", "clip", *int8_norm), ("int8", "clip", *int8)]
    rows += [("fp32", work, *kernel) for work in ("clip", "amp") for kernel in (norm, update)]
    about = {"kind": "code", "arch": "sm_90", "chunk": "full", "warps": 4}
    return [{**about, **dict(zip(names, row, strict=True))} for row in rows]


LINES = {
    ("torch fused", "step"): (100, 5.0), ("torch fused", "clip"): (150, 8.0), ("torch foreach", "step"): (200, 16.0),
    ("fusedopt", "step"): (100, 1.25), ("fusedopt", "clip"): (100, 1.25),
}  # fmt: skip
"""Microseconds of a step, and more for each tensor."""


def host_rows(scale: float = 1.0) -> list[Row]:
    rows = []
    for (who, work), (begin, slope) in LINES.items():
        for tensors in (100, 1000, 10000):
            us = dict.fromkeys(("p20", "median", "p80"), scale * (begin + slope * tensors))
            rows.append({"kind": "host", "contender": who, "work": work, "tensors": tensors, "host_us": us})
    return rows


def model(arguments: Arguments = WIDE, bandwidth: float | None = None) -> Model:
    return Model.of([*code_rows(), *host_rows()], H200, bandwidth, arguments)


def predicted(
    name: str, case: Fitted, work: str = "clip", form: str = "fp32", arguments: Arguments = WIDE
) -> Prediction:
    found = bandwidth_model.predict(model(arguments), CONTENDERS[name], case, FORMATS[form], WORKS[work])
    assert found is not None
    return found


# Launches ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("case", "narrow", "wide"), [("gpt2", 7, 1), ("llama3-8b", 384, 55)])
def test_calls_are_cut_as_published(case: str, narrow: int, wide: int) -> None:
    for lists in (1, 2, 3, 4):
        assert len(multi_tensor(sizes(case), lists, NARROW)) == narrow
        assert len(multi_tensor(sizes(case), lists, WIDE)) == wide


def test_a_launch_is_full_of_tensors_or_of_blocks() -> None:
    assert multi_tensor((1,) * 73, 4, NARROW) == (36, 36, 1)
    assert multi_tensor((*(0,) * 10, *(1,) * 37), 4, NARROW) == (36, 1) and multi_tensor((), 4, NARROW) == ()
    assert multi_tensor((320 * 65536,), 4, NARROW) == (320,) and multi_tensor((320 * 65536 + 1,), 4, NARROW) == (320, 1)
    # What goes on in the next launch is one of its 36 tensors.
    assert multi_tensor((320 * 65536 + 1, *(1,) * 36), 4, NARROW) == (320, 36, 1)
    # The last chunk of the 36th fills the blocks too.
    assert multi_tensor((*(1,) * 35, 285 * 65536, 1), 4, NARROW) == (320, 1)


STEPS = {
    "torch fused": ((9, 2), (387, 56)),
    "torch foreach": ((56, 8), (3072, 440)),
    "torch for-loop": ((1184, 1184), (2328, 2328)),
}
"""GPT-2 and Llama 3 8B, each with 4 KB and 32 KB of arguments."""
SMALL = {"clip": 8, "amp": 13}
"""Launches of clipping that do not grow, and of clipping and scaler."""


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("case", ["gpt2", "llama3-8b"])
def test_launches_of_torch_are_the_published_ones(name: str, case: str) -> None:
    for index, arguments in enumerate((NARROW, WIDE)):
        once, step = (plan(CONTENDERS[name], "fp32", work) for work in ("clip", "step"))
        assert once is not None and step is not None
        expected = STEPS[name][case != "gpt2"][index]
        assert step.count(sizes(case), arguments) == expected
        call = len(multi_tensor(sizes(case), 1, arguments))
        assert once.count(sizes(case), arguments) == expected + 2 * call + SMALL["clip"]
        scaled = plan(CONTENDERS[name], "fp32", "amp")
        assert scaled is not None
        rollback = 1 + len(multi_tensor((1,) * len(sizes(case)), 2, arguments)) if name == "torch fused" else 0
        assert scaled.count(sizes(case), arguments) == expected + 3 * call + SMALL["amp"] + rollback


@pytest.mark.parametrize("contender", CONTENDERS.values(), ids=lambda c: c.name)
def test_sweeps_add_up_to_the_traffic_that_a_contender_tells(contender: launches.Contender) -> None:
    for form in contender.formats:
        for work in contender.works:
            found, told = plan(contender, form, work), contender.traffic(form, work)
            if found is not None:
                assert told is not None and sum(sweep.bytes for sweep in found.sweeps) == pytest.approx(told[0])


def test_apex_has_the_narrow_table_whatever_torch_has() -> None:
    found = plan(CONTENDERS["apex FusedAdam"], "fp32", "step")
    assert found is not None and found.count(sizes("llama3-8b"), WIDE) == 384


def test_ours_does_not_grow_with_the_tensors() -> None:
    few, many = [(64, 64)], [(64, 64)] * 50 + [(7,), (3, 3), ()]
    for form in FORMATS:
        for work, launched in (("step", 2), ("clip", 3), ("amp", 4)):
            assert bandwidth_model.own_launches(few, form, work) == launched
            # Small tensors keep fp32 state, and those are a second variant.
            assert bandwidth_model.own_launches(many, form, work) == launched + (form == "int8")
    ragged = [*few, (60, 100)]
    assert bandwidth_model.own_launches(ragged, "int8", "step") == 3
    assert bandwidth_model.own_launches([*ragged, (7,)], "int8", "step") == 4


# Times -------------------------------------------------------------------------------------------------------------
PUBLISHED = {
    (10000, 64): (21.65, 20.82),
    (1000, 1024): (2.12, 2.02),
    (200, 2**20): (1.70, 1.49),
    (10, 2**24): (1.36, 1.17),
}
"""(tensors, elements) → ms on an H200 with 4 KB and 32 KB of arguments: pytorch#178641."""


@pytest.mark.parametrize("problem", PUBLISHED)
def test_the_model_gives_published_times(problem: tuple[int, int]) -> None:
    case = fitted([(problem[1],)] * problem[0])
    for arguments, ms in zip((NARROW, WIDE), PUBLISHED[problem], strict=True):
        wall = predicted("torch fused", case, "step", arguments=arguments).wall
        assert wall == pytest.approx(ms / 1e3, rel=0.09)


def test_targets_are_within_what_bytes_allow() -> None:
    """At large sizes launches and tails vanish beside bytes: 40 to 32, 36 to 32, and 32 to 14.19."""
    case = fitted([(2**30,)] * 4)
    ours, fused = (predicted(name, case).device for name in ("fusedopt", "torch fused"))
    assert fused / ours == pytest.approx(40 / 32, rel=5e-3)
    assert predicted(launches.BY_GRAD_SCALE, case).device / ours == pytest.approx(36 / 32, rel=5e-3)
    assert fused / predicted("fusedopt", case, form="int8").device == pytest.approx(40 / 14.19, rel=5e-3)
    assert ours == pytest.approx(32 * 2**32 / 4.3e12, rel=5e-3)


def test_issuing_takes_over_where_bandwidth_is_plenty() -> None:
    case = fitted([(2**30,)])
    slow, fast = (
        bandwidth_model.predict(model(bandwidth=b), FUSEDOPT, case, FORMATS["int8"], WORKS["clip"])
        for b in (1e12, 1e14)
    )
    assert slow is not None and fast is not None and slow.instructions == pytest.approx(73.2)
    assert slow.sweeps == pytest.approx(14.19 * 2**30 / 1e12)
    assert fast.sweeps == pytest.approx(73.2 * 2**30 / H200.issue_rate)


@pytest.mark.parametrize(
    "name", ["fusedopt", "torch fused", "torch foreach", "apex FusedAdam", "torch.compile of the step"]
)
def test_more_takes_longer(name: str) -> None:
    small, wide, many = (predicted(name, fitted([(size,)] * n)) for size, n in ((2**20, 10), (2**21, 10), (2**20, 20)))
    for more in (wide, many):
        assert more.device > small.device
        assert more.host is None or small.host is None or more.host >= small.host
    step, scaled = (predicted(name, fitted([(2**21,)] * 10), work) for work in ("step", "amp"))
    assert scaled.device >= wide.device > step.device


def test_every_launch_costs_time() -> None:
    loop = predicted("torch for-loop", fitted([(8,)] * 100), "step")
    assert loop.launches == 800 and loop.device == pytest.approx(800 * bandwidth_model.GAP, rel=1e-3)


def test_a_norm_costs_time_for_each_tensor_of_several_chunks() -> None:
    case = fitted([(16385,)] * 3 + [(16384,)] * 126)
    assert predicted("fusedopt", case).joins == pytest.approx(3 * bandwidth_model.JOIN + 2 * bandwidth_model.TURN)
    assert predicted("fusedopt", case, "step").joins == 0


def test_host_time_is_in_proportion_to_torchs_fused_step() -> None:
    """A machine that is three times slower says the same: torch's fused step is 2 µs a tensor by definition."""
    case = fitted([(8,)] * 1000)
    costs, slow = (bandwidth_model.host_costs(host_rows(scale)) for scale in (1, 3))
    assert costs["torch fused", "step"] == pytest.approx((40e-6, 2e-6))
    assert costs["fusedopt", "clip"] == pytest.approx((40e-6, 0.5e-6))
    assert slow["fusedopt", "clip"] == pytest.approx((40e-6, 0.5e-6))
    ours = predicted("fusedopt", case)
    assert ours.host == pytest.approx(40e-6 + 0.5e-3 + 4 * 4e-6)
    assert ours.wall == ours.host and ours.device < 1e-4
    # What clipping adds to foreach is what it adds to the fused step.
    foreach = predicted("torch foreach", case)
    assert foreach.launches is not None
    assert foreach.host == pytest.approx(100e-6 + (6.4e-6 + 1.2e-6) * 1000 + 4e-6 * foreach.launches)


def test_no_step_takes_less_than_nothing() -> None:
    """A line that would begin below 0 goes through it."""
    us = {100: 100.0, 1000: 2000.0}
    rows = [
        {"kind": "host", "contender": "torch fused", "work": "step", "tensors": n, "host_us": t} for n, t in us.items()
    ]
    assert bandwidth_model.host_costs(rows) == {("torch fused", "step"): pytest.approx((0, 2e-6))}
    assert bandwidth_model.host_costs(rows[:1]) == {("torch fused", "step"): pytest.approx((0, 2e-6))}


def test_without_rows_there_are_bytes_only() -> None:
    bare = Model.of([], H200)
    found = bandwidth_model.predict(bare, FUSEDOPT, fitted([(2**24,)]), FORMATS["fp32"], WORKS["step"])
    assert found is not None and found.host is None and found.wall is None and found.instructions is None
    assert found.sweeps == pytest.approx(28 * 2**24 / 4.3e12)


# Rows --------------------------------------------------------------------------------------------------------------
@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Writer:
    """Rows of three cases, the second of which does not fit in fp32."""
    monkeypatch.setattr(predict, "KNOWN", tmp_path / "none.jsonl")
    large = Case("large", "", lambda: {"weight": (4_000_000, 1000)})
    monkeypatch.setattr(predict, "CASES", {"gpt2": CASES["gpt2"], "large": large, "tiny-1000": CASES["tiny-1000"]})
    writer = Writer(tmp_path / "rows.jsonl")
    writer.rows = [*code_rows(), *host_rows()]
    predict.rows(writer)
    return writer


def test_every_row_says_that_it_is_predicted(few: Writer) -> None:
    rows = [row for row in few.rows if row["kind"] == "predicted"]
    assert all(row["predicted"] is True and row["hardware"] == "H200" and row["inputs"] for row in rows)
    found = {(row["case"], row["format"], row["work"], row["contender"]): row for row in rows}
    told = [c for c in CONTENDERS.values() if c.traffic("fp32", "clip") and (c.most_tensors or 148) >= 148]
    assert {key[3] for key in found if key[:3] == ("gpt2", "fp32", "clip")} == {c.name for c in told}
    assert not any(key[0] == "tiny-1000" and "compile" in key[3] for key in found), "it would take minutes to begin"
    assert ("large", "int8", "step", "fusedopt") in found and ("large", "fp32", "step", "fusedopt") not in found
    ours, fused = (found["gpt2", "fp32", "clip", name] for name in ("fusedopt", "torch fused"))
    assert "ratio" not in ours and fused["ratio"] == pytest.approx(ours["device_ms"] / fused["device_ms"], rel=1e-3)
    assert fused["ratio_wall"] == pytest.approx(ours["wall_ms"] / fused["wall_ms"], rel=1e-3)
    assert ours["launches"] == 3 and ours["bytes"] == 32 and 0.9 < ours["share"] <= 1
    assert sum(ours["inputs"]["parts_ms"].values()) == pytest.approx(ours["device_ms"], rel=1e-3)


def test_predictions_are_compared_with_measurements(few: Writer) -> None:
    row = next(
        r for r in few.rows if r["kind"] == "predicted" and r["contender"] == "torch fused" and r["work"] == "step"
    )
    machine = {"gpu": "NVIDIA H200", "cuda": "13.0", "torch": "2.13.0+cu130"}
    real = {**row, "machine": machine, "device_ms": 2 * row["device_ms"]}
    rows = [*code_rows(), *host_rows()]
    assert predict.compare(real, rows) == pytest.approx({"device_ms": 0.5, "host_us": 1, "wall_ms": 1}, rel=1e-3)
    older = predict.compare({**real, "machine": {**machine, "torch": "2.11.0"}}, rows)
    assert older is not None and older["device_ms"] > 0.6, "seven launches with tails of their own"
    assert set(predict.compare({**real, "graph": True}, rows) or {}) == {"device_ms"}
    slower = predict.compare({**real, "ceiling_gb_s": 2150.0}, rows)
    assert slower is not None and slower["device_ms"] == pytest.approx(1.0, rel=1e-2)
    for changed in ({"machine": {"gpu": "Imitation"}}, {"device": "cpu"}, {"contender": "nobody"}, {"case": "unknown"}):
        assert predict.compare({**real, **changed}, rows) is None


def test_what_launches_have_room_for_depends_on_cuda_and_torch() -> None:
    def of(cuda: str | None, torch: str) -> Arguments:
        return predict.arguments({"cuda": cuda, "torch": torch})

    assert of("13.0", "2.12.0") == of("13.2", "2.13.0+cu132") == WIDE
    assert of("12.8", "2.13.0") == of("13.0", "2.11.0") == of(None, "2.13.0+cpu") == NARROW


def test_gpus_are_known_by_name() -> None:
    assert hardware.of("NVIDIA H100 80GB HBM3") is hardware.HARDWARE["H100"] and hardware.of("Tesla T4") is None
    assert all(gpu.source for gpu in hardware.HARDWARE.values())
    assert H200.bandwidth == 4.3e12 and H200.issue_rate == pytest.approx(33.45e12, rel=1e-3)
