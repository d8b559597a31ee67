"""The report of `fusedopt memory --world N`: what the fullest and the emptiest rank hold."""

from __future__ import annotations

from rich.table import Table

from fusedopt.memory.held import Memory
from fusedopt.memory.ranks import Ranks
from fusedopt.memory.report import Subject, begin, new_table, size, unit_of

SHARDINGS = {
    "fsdp": "fully_shard over all of them",
    "hsdp": "fully_shard over groups of {over}, of which there are {copies}",
    "ddp": "DDP: every rank holds everything",
    "zero1": "ZeroRedundancyOptimizer: each steps whole parameters of its own",
}
NOTES = {
    "fsdp": "fully_shard pads every rank's weights and gradients to the fullest rank's; state is not padded.",
    "ddp": "DDP's buckets take as much as the gradients once more, unless gradient_as_bucket_view=True.",
}
NOTES |= {"hsdp": NOTES["fsdp"], "zero1": NOTES["ddp"]}


def print_ranks(subject: Subject, ranks: Ranks) -> None:
    """For a reader, on stdout."""
    console = begin(subject, ranks.whole)
    sharding = ranks.sharding
    kind = sharding.name.partition(":")[0]
    how = SHARDINGS[kind].format(over=sharding.over, copies=sharding.world // sharding.over)
    console.print(f"{sharding.world:,} rank{'s' * (sharding.world > 1)}, {how}")
    console.print(_table(ranks))
    if ranks.empty:
        console.print(
            f"Of {ranks.empty:,} of {ranks.whole.tensors:,} tensors rank {ranks.emptiest[0]:,} "
            + ("has no element." if sharding.cuts_rows else "keeps no state.")
        )
    console.print(
        f"{NOTES[kind]} Held from step to step. Not counted: activations, gathered parameters, communication buffers, "
        "the model's buffers, the kernels' tables, and what an allocator rounds up.",
        style="dim",
    )


def parts(held: Memory) -> dict[str, int]:
    """What there is by the name that the table gives it: state by slot and format."""
    rows = {"weights": held.weights, "gradients": held.gradients}
    for slot, formats in held.formats.items():
        rows |= {f"state {slot}, {form}": bytes_ for form, bytes_ in formats.items()}
    rest = {"scales": held.scales, "masters": held.masters, "average": held.ema, "counts": held.counters}
    return {**rows, **rest, "total": held.total}


def _table(ranks: Ranks) -> Table:
    """Bytes of the model, and of both ranks; one column for the ranks if all hold the same."""
    columns = {"whole model": ranks.whole, f"rank {ranks.fullest[0]:,}, the fullest": ranks.fullest[1]}
    if ranks.fullest[0] == ranks.emptiest[0]:
        columns = {"whole model": ranks.whole, "each rank": ranks.fullest[1]}
    else:
        columns[f"rank {ranks.emptiest[0]:,}, the emptiest"] = ranks.emptiest[1]
    units = {name: unit_of(held.total) for name, held in columns.items()}
    table = new_table("Bytes of a rank")
    table.add_column("component", no_wrap=True)
    for name, unit in units.items():
        table.add_column(f"{name}, {unit}", justify="right", no_wrap=True)
    for name, bytes_ in parts(ranks.whole).items():
        if name == "total":
            table.add_section()
        if bytes_:
            cells = [size(parts(held).get(name, 0), units[column]) for column, held in columns.items()]
            table.add_row(name, *cells, style="bold" if name == "total" else None)
    return table
