"""The report of `fusedopt inspect`: tables for people, JSON for programs."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fusedopt.inspect.counts import RAGGED, Case, Inspection, of_full_chunks
from fusedopt.inspect.roofline import Roofline

WIDTH = 110
"""Columns of the tables at their widest."""

MANY_WIDTHS = 2
"""More widths than these have lines of their own below the table."""

CASE_TITLES = {"full": "full, aligned", "unaligned": "full, unaligned", "tail": "tail", RAGGED: "ragged rows"}


def as_json(
    request: dict[str, Any], inspection: Inspection, roofline: Roofline | None, differences: list[str] | None
) -> dict[str, Any]:
    """Everything that was counted. differences: None where nothing was checked."""
    data = {"configuration": request["configuration"], **inspection.as_json()}
    for kernel, written in zip(inspection.kernels, data["kernels"], strict=True):
        for name, case in kernel.cases.items():
            written["cases"][name].update(
                loaded_per_param=case.total("load") / case.elements,
                stored_per_param=case.total("store") / case.elements,
                bytes_per_param=case.bytes_per_param,
                instructions_per_element=case.instructions_per_element,
            )
    data["roofline"] = None if roofline is None else roofline.as_json()
    data["check"] = None if differences is None else {"agrees": not differences, "differences": differences}
    return data


def print_report(
    request: dict[str, Any], inspection: Inspection, roofline: Roofline | None, differences: list[str] | None
) -> None:
    """The same for a reader, on stdout."""
    console = Console(highlight=False)
    if console.width < WIDTH or not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    configuration = request["configuration"]
    options = "".join(f", {name}={value}" for name, value in configuration["arguments"].items())
    console.print(
        f"{configuration['rule']}{options}: {configuration['param_dtype']} parameters, "
        f"{configuration['grad_dtype']} gradients{', as under fusedopt.GradScaler' if configuration['amp'] else ''}; "
        f"{inspection.arch}, Triton {inspection.triton}; nothing was run"
    )
    console.print(launches_line(inspection))
    if roofline is not None:
        console.print(bytes_line(inspection))
    if inspection.resident:
        console.print(resident_line(inspection))
    console.print(_code_table(inspection))
    if any(kernel.cases for kernel in inspection.kernels):
        console.print(_path_table(inspection))
        console.print(
            "For ordinary operands (none subnormal, infinite or NaN). Instructions count once per lane of a warp. "
            "Sectors: used share of the 32-byte sectors that each access touches.",
            style="dim",
        )
        console.print("\n".join([*_width_lines(inspection), *_table_lines(inspection)]), style="dim")
    else:
        console.print("Bytes and instructions per element are counted for NVIDIA GPUs only.", style="dim")
    if roofline is not None:
        console.print("\n".join(roofline_lines(roofline)))
    if differences is not None:
        console.print("\n".join(check_lines(differences)), style="bold red" if differences else "green")


def launches_line(inspection: Inspection) -> str:
    """How many launches a step takes, and whether that depends on the number of tensors."""
    ragged = sum(kernel.name.endswith(RAGGED) for kernel in inspection.kernels)
    names = ", ".join(kernel.name for kernel in inspection.kernels if not kernel.name.endswith(RAGGED))
    more = f"; {ragged} more for parameters whose rows are no whole groups" if ragged else ""
    counts = " and ".join(f"{n} for {tensors} tensors" for tensors, n in inspection.launches.items())
    constant = len(set(inspection.launches.values())) == 1
    return f"launches per step: {counts} ({names}){more}" + ("" if constant else "; THE NUMBER DEPENDS ON THE TENSORS")


def bytes_line(inspection: Inspection) -> str:
    """What a step moves per parameter, kernel by kernel, in aligned full chunks."""
    moved = [(name, case.bytes_per_param) for name, case in of_full_chunks(inspection)]
    parts = " + ".join(f"{n:.2f} {name}" for name, n in moved)
    return f"bytes per parameter: {sum(n for _, n in moved):.2f}" + (f" ({parts})" if len(moved) > 1 else "")


def resident_line(inspection: Inspection) -> str:
    """What a parameter keeps in memory, its gradient included."""
    parts = ", ".join(f"{role} {n:.4g}" for role, n in inspection.resident.items())
    return f"resident bytes per parameter: {sum(inspection.resident.values()):.2f} ({parts})"


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)


def _code_table(inspection: Inspection) -> Table:
    table = _table("Code, executed or not")
    table.add_column("kernel", no_wrap=True)
    for heading in ("warps", "registers", "stack B", "spills", "shared B", "barriers", "instructions"):
        table.add_column(heading, justify="right")
    amd = any(kernel.static_widths for kernel in inspection.kernels)
    if amd:
        table.add_column("accesses, bits")
    for k in inspection.kernels:
        numbers = (k.warps, k.registers, k.stack, k.spill_instructions, k.shared_bytes, k.barrier_instructions)
        cells = [str(n) for n in (*numbers, k.instructions)]
        accesses = ", ".join(f"{n} × {access}" for access, n in k.static_widths.items())
        table.add_row(k.name, *cells, *([accesses] if amd else []))
    return table


def _path_table(inspection: Inspection) -> Table:
    table = _table("Executed by one program on one chunk; bytes and instructions per parameter")
    table.add_column("kernel", no_wrap=True)
    table.add_column("chunk", no_wrap=True)
    for heading in ("loaded", "stored", "sum B", "load bits", "store bits", "instr.", "spills", "barr.", "sectors"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kernel in inspection.kernels:
        for name, case in kernel.cases.items():
            size = f" ({case.elements})" if name in ("tail", RAGGED) else ""
            table.add_row(kernel.name, CASE_TITLES[name] + size, *_path_cells(case))
    return table


def _path_cells(case: Case) -> list[str]:
    loaded, stored = case.total("load") / case.elements, case.total("store") / case.elements
    return [
        f"{loaded:.2f}",
        f"{stored:.2f}",
        f"{case.bytes_per_param:.2f}",
        widths(case, "load"),
        widths(case, "store"),
        f"{case.instructions_per_element:.1f}",
        str(case.spills),
        str(case.barriers),
        f"{case.sector_use:.0%}",
    ]


def widths(case: Case, what: str) -> str:
    """Bits of one thread's accesses: the most frequent width, then who uses another one; many are only numbers."""
    by_bits = _by_bits(case, what)
    if not by_bits:
        return "-"
    if len(by_bits) > MANY_WIDTHS:
        return "/".join(map(str, by_bits))
    usual = max(by_bits, key=lambda bits: (len(by_bits[bits]), bits))
    others = [f"{role} {bits}" for bits, roles in by_bits.items() if bits != usual for role in roles]
    return ", ".join([str(usual), *others])


def _by_bits(case: Case, what: str) -> dict[int, list[str]]:
    """Who is accessed by how many bits, the widest first."""
    by_bits: dict[int, list[str]] = {}
    for role, accesses in case.widths.items():
        for width in accesses.get(what, {}):
            by_bits.setdefault(8 * int(width), []).append(role)
    return dict(sorted(by_bits.items(), reverse=True))


def _width_lines(inspection: Inspection) -> list[str]:
    """Who has which of many widths in aligned full chunks."""
    lines = []
    for name, case in of_full_chunks(inspection):
        for what in ("load", "store"):
            by_bits = _by_bits(case, what)
            if len(by_bits) > MANY_WIDTHS:
                parts = "; ".join(f"{bits} {', '.join(roles)}" for bits, roles in by_bits.items())
                lines.append(f"{what.capitalize()} bits, {name}: {parts}.")
    return lines


def _table_lines(inspection: Inspection) -> list[str]:
    """What is read from tables, apart from the parameters' bytes."""
    return [f"Tables, {name}: {_table_line(case)}" for name, case in of_full_chunks(inspection)]


def _table_line(case: Case) -> str:
    written = f"; {case.table_stored} written" if case.table_stored else ""
    return (
        f"{case.table_bytes} bytes read per full chunk ({case.table_bytes / case.elements:.4f} per parameter), "
        f"by {case.table_loads} loads of warps{written}."
    )


def roofline_lines(roofline: Roofline) -> list[str]:
    """The prediction, with what it rests on."""
    lines = [
        f"predicted, not measured: {roofline.bytes_per_param:.2f} B × {roofline.params:.4g} parameters at "
        f"{roofline.bandwidth:.4g} B/s = {roofline.memory_seconds * 1e3:.4g} ms per step"
    ]
    if roofline.issue_seconds is not None:
        hidden = "hidden behind memory" if roofline.issue_seconds <= roofline.memory_seconds else "THE LIMIT"
        lines.append(
            f"issuing {roofline.instructions_per_param:.1f} instructions per parameter takes an H200 "
            f"{roofline.issue_seconds * 1e3:.4g} ms: {hidden}"
        )
    return lines


def check_lines(differences: list[str]) -> list[str]:
    """The verdict of the second method."""
    if not differences:
        return ["check: the interpreter loads and stores exactly these bytes"]
    return ["check: THE INTERPRETER COUNTS OTHER BYTES", *differences]
