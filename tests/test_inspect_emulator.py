"""The emulator of `fusedopt inspect` on programs written by hand."""

import re
from collections.abc import Sequence

import pytest
import torch
from sass_text import code

from fusedopt.inspect import emulator
from fusedopt.inspect.errors import BadAccess, CannotFollow
from fusedopt.inspect.memory import TABLE, Region


def walk(lines: Sequence[str], arguments: Sequence[int] = (), regions: Sequence[Region] = ()) -> emulator.Walk:
    return emulator.walk(code(*lines), arguments, regions, program=0, warps=2)


def data(elements: int = 64) -> tuple[torch.Tensor, Region]:
    tensor = torch.zeros(elements)
    return tensor, Region.of("param", 0, tensor)


ADDRESS = (
    "S2R R0, SR_TID.X",
    "LDC.64 R2, c[0x0][0x210]",
    "IMAD.WIDE.U32 R2, R0, 0x4, R2",
)
"""R2: the address of the thread's element of an fp32 tensor; R0: the thread."""


def test_straight_code_is_counted_per_warp_and_bytes_per_thread() -> None:
    tensor, region = data()
    walked = walk([*ADDRESS, "LDG.E R4, [R2.64]", "STG.E [R2.64], R4", "EXIT"], [tensor.data_ptr()], [region])
    assert walked.instructions == 2 * 6
    assert walked.traffic.bytes == {("param", "load"): 64 * 4, ("param", "store"): 64 * 4}
    assert walked.traffic.widths["param", "load"] == {4: 64}
    assert walked.traffic.sectors["param", "load"] == 64 * 4 // 32


def test_loops_are_executed() -> None:
    tensor, region = data(8 * 64)
    lines = [
        *ADDRESS,
        "MOV R5, 0x0",
        "LDG.E R4, [R2.64]",  # 0x40: eight times
        "IADD3 R5, R5, 0x1, RZ",
        "IADD3 R2, P1, R2, 0x100, RZ",
        "IADD3.X R3, RZ, R3, RZ, P1, !PT",
        "ISETP.GE.U32.AND P0, PT, R5, 0x8, PT",
        "@!P0 BRA 0x40",
        "EXIT",
    ]
    walked = walk(lines, [tensor.data_ptr()], [region])
    assert walked.traffic.bytes["param", "load"] == 8 * 64 * 4
    assert walked.instructions == 2 * (4 + 8 * 6 + 1)


def test_masks_take_effect_per_thread() -> None:
    tensor, region = data()
    lines = [*ADDRESS, "ISETP.LT.U32.AND P0, PT, R0, 0x5, PT", "@P0 STG.E [R2.64], R4", "EXIT"]
    assert walk(lines, [tensor.data_ptr()], [region]).traffic.bytes == {("param", "store"): 5 * 4}


def test_threads_that_part_meet_again() -> None:
    tensor, region = data()
    lines = [
        *ADDRESS,
        "ISETP.LT.U32.AND P0, PT, R0, 0x5, PT",
        "@P0 BRA 0x70",
        "LDG.E R4, [R2.64]",  # 59 threads
        "BRA 0x80",
        "STG.E [R2.64], R4",  # 0x70: 5 threads
        "NOP",  # 0x80: all
        "EXIT",
    ]
    walked = walk(lines, [tensor.data_ptr()], [region])
    assert walked.traffic.bytes == {("param", "load"): 59 * 4, ("param", "store"): 5 * 4}
    assert walked.instructions == 2 * 5 + 2 * 2 + 1 + 2 * 2  # the first warp executes both sides


def test_tables_are_known_and_counted_apart() -> None:
    tensor, region = data()
    table = torch.tensor([tensor.data_ptr()])
    lines = ["LDC.64 R2, c[0x0][0x210]", "LDG.E.64 R4, [R2.64]", "LDG.E.128 R8, [R4.64]", "EXIT"]
    walked = walk(lines, [table.data_ptr()], [region, Region.of(TABLE, -1, table)])
    assert walked.traffic.bytes == {("param", "load"): 64 * 16}
    assert (walked.traffic.table["load"], walked.traffic.table_requests["load"]) == (8, 2)


def test_spills_shared_memory_and_barriers_are_counted() -> None:
    stack = ["MOV R1, c[0x0][0x28]", "STL [R1], R0", "LDL R0, [R1]"]
    lines = [*stack, "STS [R4], R0", "BAR.SYNC.DEFER_BLOCKING 0x0", "LDS R0, [R4]", "EXIT"]
    walked = walk(lines)
    assert (walked.spills, walked.shared, walked.barriers) == (2 * 2, 2 * 2, 2)
    assert code(*lines).count("LDL", "STL") == 2


def test_what_was_spilled_is_known_again() -> None:
    tensor, region = data()
    spill = ["LDC R1, c[0x0][0x37c]", "IADD3 R1, R1, -0x10, RZ", "STL.64 [R1+0x8], R2", "CS2R R2, SRZ"]
    reload = ["LDL.64 R6, [R1+0x8]", "ISETP.LT.U32.AND P0, PT, R0, 0x5, PT", "@P0 STL [R1+0x8], R4", "LDL R8, [R1+0x8]"]
    walked = walk([*ADDRESS, *spill, *reload, "LDG.E R4, [R6.64]", "EXIT"], [tensor.data_ptr()], [region])
    assert walked.traffic.bytes == {("param", "load"): 64 * 4}
    with pytest.raises(CannotFollow, match="address of"):  # the low word was overwritten by one that is unknown
        walk([*ADDRESS, *spill, *reload, "MOV R9, R7", "LDG.E R4, [R8.64]", "EXIT"], [tensor.data_ptr()], [region])
    with pytest.raises(CannotFollow, match="form of address"):
        walk(["STL [R4], R0", "EXIT"])


def test_the_slow_path_of_a_division_is_not_taken() -> None:
    """Both layouts that the compiler writes: a branch around the call, and a branch to it."""
    around = ["FCHK P0, R4, R5", "@!P0 BRA 0x30", "CALL.REL.NOINC 0x50", "NOP", "EXIT", "RET.REL.NODEC R36 0x0"]
    to_it = ["FCHK P0, R4, R5", "@P0 BRA 0x40", "NOP", "EXIT", "CALL.REL.NOINC 0x50", "RET.REL.NODEC R36 0x0"]
    assert walk(around).instructions == 2 * 4
    assert walk(to_it).instructions == 2 * 4


def test_a_conditional_call_is_a_far_branch() -> None:
    walked = walk(["ISETP.EQ.U32.AND P0, PT, RZ, RZ, PT", "@P0 CALL.REL.NOINC 0x30", "BRA 0x20", "EXIT"])
    assert walked.instructions == 2 * 3


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        (["LDG.E R4, [R2.64]", "ISETP.EQ.AND P0, PT, R4, RZ, PT", "@P0 EXIT", "EXIT"], "depends on data"),
        (["LDG.E R4, [R2.64]", "ISETP.EQ.AND P0, PT, R4, RZ, PT", "@P0 BRA 0x70", "NOP", "EXIT"], "depends on data"),
        (["LDG.E R4, [R2.64]", "ISETP.EQ.AND P0, PT, R4, RZ, PT", "@P0 STG.E [R2.64], R4", "EXIT"], "whether"),
        (["LDG.E R4, [R2.64]", "LDG.E R6, [R4.64]", "EXIT"], "address of"),
        (["LDG.E R4, [R2.64+UR4]", "EXIT"], "form of address"),
        (["FROBNICATE R4, R5", "EXIT"], "unknown instruction"),
        (["IADD3.64 R4, R6, R8, RZ", "EXIT"], "unknown instruction"),
        (["CALL.REL.NOINC 0x0", "EXIT"], "ordinary path"),
    ],
)
def test_what_cannot_be_decided_is_an_error(lines: list[str], why: str) -> None:
    tensor, region = data()
    with pytest.raises(CannotFollow, match=re.escape(why)):
        walk([*ADDRESS, *lines], [tensor.data_ptr()], [region])


def test_an_endless_loop_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulator, "LIMIT", 100)
    with pytest.raises(CannotFollow, match="no end"):
        walk(["BRA 0x0"])


def test_bad_accesses_are_errors() -> None:
    tensor, region = data(63)
    with pytest.raises(BadAccess, match="outside"):
        walk([*ADDRESS, "LDG.E R4, [R2.64]", "EXIT"], [tensor.data_ptr()], [region])
    with pytest.raises(BadAccess, match="outside"):
        walk([*ADDRESS, "LDG.E R4, [R2.64]", "EXIT"], [tensor.data_ptr() - 4], [region])
    with pytest.raises(BadAccess, match="not aligned"):
        walk([*ADDRESS, "LDG.E.64 R4, [R2.64]", "EXIT"], [tensor.data_ptr()], [region])
