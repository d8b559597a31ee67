"""What the bandwidth model says of every case: rows of kind predicted. And how far it is from what was measured."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from perf.cases import CASES, Fitted
from perf.contenders import CONTENDERS, FUSEDOPT, Contender
from perf.predict import hardware
from perf.predict.launches import NARROW, WIDE, Arguments
from perf.predict.model import Model, Prediction, predict
from perf.report.shown import median
from perf.results import RESULTS, Row, Writer, read, rounded
from perf.work import FORMATS, WORKS, Format, Work

KNOWN = RESULTS / "no-gpu.jsonl"
"""Where rows of kinds code and host are looked for when a run has none of its own."""
USABLE = 0.85 / 2
"""Share of the memory that a case may fill, as in a measurement: two contenders at a time."""


class Job(NamedTuple):
    """What is predicted."""

    fitted: Fitted
    form: Format
    work: Work


def rows(writer: Writer, name: str = "H200", contenders: Iterable[Contender] = tuple(CONTENDERS.values())) -> None:
    """Every case, format, work and contender whose traffic is known, on one of `hardware.HARDWARE`."""
    model = Model.of(known(writer.rows), hardware.HARDWARE[name])
    everybody = sorted(contenders, key=lambda contender: contender.name != FUSEDOPT.name)
    for job in jobs(model):
        mine: Prediction | None = None
        for contender in everybody:
            if not takes(contender, job) or (found := predict(model, contender, *job)) is None:
                continue
            mine = found if contender.name == FUSEDOPT.name else mine
            beside = None if contender.name == FUSEDOPT.name else mine
            about = {"device": "cuda", "hardware": name, "predicted": True, "graph": False, "contender": contender.name}
            about |= {"case": job.fitted.case.name, "part": job.fitted.part, "tensors": job.fitted.tensors}
            about |= {"elements": job.fitted.elements, "format": job.form.name, "work": job.work.name}
            moved = contender.traffic(job.form.name, job.work.name)
            writer.add(
                "predicted",
                **about,
                **times(found, beside),
                **rates(model, job, moved, found),
                inputs=inputs(model, found),
            )


def known(rows: Sequence[Row]) -> list[Row]:
    """These rows, and of the last run without a GPU those of kinds code and host that they lack."""
    kinds = {row["kind"] for row in rows}
    before = read(KNOWN) if KNOWN.exists() else []
    return [*rows, *(row for row in before if row["kind"] in {"code", "host"} - kinds)]


def jobs(model: Model) -> Iterator[Job]:
    """Cases that fit, wholly or in part, in every format, for every work."""
    for case, form in product(CASES.values(), FORMATS.values()):
        fitted = case.fitted(USABLE * model.hardware.memory / form.held)
        if fitted is not None:
            yield from (Job(fitted, form, work) for work in WORKS.values())


def takes(contender: Contender, job: Job) -> bool:
    """Whether it would be measured."""
    few = contender.most_tensors is None or job.fitted.tensors <= contender.most_tensors
    return few and contender.takes(job.form, job.work, "cuda")


def times(found: Prediction, ours: Prediction | None) -> Row:
    """Fields of a row that a measurement has too; ours: beside which it stands."""
    fields: Row = {"device_ms": rounded(1e3 * found.device, 4), "launches": found.launches}
    if found.host is not None and found.wall is not None:
        fields |= {"host_us": rounded(1e6 * found.host, 4), "wall_ms": rounded(1e3 * found.wall, 4)}
    if ours is not None:
        fields["ratio"] = rounded(ours.device / found.device, 4)
        if ours.wall is not None and found.wall is not None:
            fields["ratio_wall"] = rounded(ours.wall / found.wall, 4)
    return fields


def rates(model: Model, job: Job, moved: tuple[float, str] | None, found: Prediction) -> Row:
    """Bytes, and how fast they move."""
    assert moved is not None
    rate = moved[0] * job.fitted.elements / found.device
    return {
        "bytes": moved[0], "bytes_from": moved[1], "gb_s": rounded(rate / 1e9, 4),
        "ceiling_gb_s": rounded(model.bandwidth / 1e9, 4), "share": rounded(rate / model.bandwidth, 4),
    }  # fmt: skip


def inputs(model: Model, found: Prediction) -> dict[str, Any]:
    """What a prediction rests on beside the constants of `perf.predict.model`, and the parts of its device time."""
    return {
        "bandwidth": model.bandwidth, "issue_rate": model.hardware.issue_rate, "arguments": model.arguments.name,
        "instructions": found.instructions,
        "parts_ms": {name: rounded(1e3 * getattr(found, name), 4) for name in ("sweeps", "gaps", "idle", "joins")},
    }  # fmt: skip


def compare(row: Row, rows: Sequence[Row] = ()) -> dict[str, float] | None:
    """Predicted over measured, for a measured row's ``"device_ms"``, ``"host_us"`` and ``"wall_ms"``; None if the model
    knows nothing of its GPU or contender. rows: of kinds code and host. The ceiling is the row's own copy.
    """
    machine = row.get("machine") or {}
    gpu, contender = hardware.of(machine.get("gpu") or ""), CONTENDERS.get(row["contender"])
    fitted = CASES[row["case"]].fitted(row["elements"]) if row["case"] in CASES else None
    if row.get("device") != "cuda" or gpu is None or contender is None or fitted is None:
        return None
    ceiling = row.get("ceiling_gb_s")
    model = Model.of(known(rows), gpu, 1e9 * ceiling if ceiling else None, arguments(machine))
    found = predict(model, contender, fitted, FORMATS[row["format"]], WORKS[row["work"]])
    if found is None:
        return None
    guesses = times(found, None)
    names = ("device_ms",) if row.get("graph") else ("device_ms", "host_us", "wall_ms")
    pairs = {name: (guesses.get(name), median(row.get(name))) for name in names}
    return {name: guess / real for name, (guess, real) in pairs.items() if guess and real}


def arguments(machine: Row) -> Arguments:
    """What a launch of this machine's torch has room for."""
    cuda, version = (_version(machine.get(name)) for name in ("cuda", "torch"))
    return WIDE if cuda >= (13,) and version >= (2, 12) else NARROW


def _version(text: str | None) -> tuple[int, ...]:
    digits = (text or "0").partition("+")[0].split(".")[:2]
    return tuple(int(part) for part in digits if part.isdigit())
