"""What rows of a GPU, where there are any, make of predictions: factors, and where they come from."""

from collections.abc import Iterable, Sequence
from math import log
from typing import NamedTuple

from perf.predict import compare, hardware
from perf.report.shown import place
from perf.results import RESULTS, Row, read


class Factor(NamedTuple):
    """Measured over predicted. source: machine and case; empty: nothing was measured, and it is 1."""

    value: float = 1.0
    source: str = ""


def gpu_rows() -> list[Row]:
    """Everything measured on GPUs, in ``perf/results``."""
    return [row for path in sorted(RESULTS.glob("gpu-*.jsonl")) for row in read(path)]


def factor(rows: Sequence[Row], job: tuple[str, str, str], gpu: str, near: tuple[str, float], time: str) -> Factor:
    """Of a time of a job, (contender, format, work), on a GPU, by the measured row that is nearest in size.

    near: the field that sizes are told by, and the size. time: ``"device_ms"`` or ``"host_us"``.
    """
    field, size = near
    found: list[tuple[float, Factor]] = []
    for row in _of(rows, job, gpu):
        ratio = (compare(row, rows) or {}).get(time)
        if ratio and row.get(field):
            found.append((abs(log(row[field] / size)), Factor(1 / ratio, f"{place(row)}, {row['case']}")))
    return min(found, key=lambda each: each[0])[1] if found else Factor()


def _of(rows: Iterable[Row], job: tuple[str, str, str], gpu: str) -> Iterable[Row]:
    for row in rows:
        same = (row.get("contender"), row.get("format"), row.get("work")) == job and row["kind"] == "measured"
        name = (row.get("machine") or {}).get("gpu") or ""
        if (
            same
            and row.get("device") == "cuda"
            and not row.get("graph")
            and hardware.of(name) is hardware.HARDWARE[gpu]
        ):
            yield row
