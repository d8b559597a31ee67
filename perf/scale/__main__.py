"""`python -m perf.scale`: bytes, traffic and times of a training step on many GPUs."""

import click

from fusedopt.shapes import MODELS
from perf.report.drawing import save
from perf.results import RESULTS, Writer, read
from perf.scale import page, plot, sharded
from perf.scale.measured import gpu_rows
from perf.scale.page import BLOCKS, PAGE, Plan
from perf.scale.simulate import WORLDS, Simulation

MODEL, GPU = "llama3-70b", "H200"
ROWS = RESULTS / "scale.jsonl"
"""Rows of kind sharded."""
HELP = f"""Write fusedopt/docs/scale.md and its plot: {MODELS[MODEL].title} on 8 to 1,024 GPUs.

Bytes are exact; times come from the bandwidth model of perf/predict, corrected by perf/results/gpu-*.jsonl where they
hold the same step on the same GPU. With a choice of model, GPU or numbers the tables are printed instead.
"""


@click.command("perf.scale", help=HELP)
@click.option("--model", type=click.Choice(tuple(MODELS)), metavar="NAME", help=f"One of {', '.join(MODELS)}.")
@click.option("--gpu", type=click.Choice(["H100", "H200"]), help="Whose bandwidth and memory.")
@click.option("--world", "worlds", type=click.IntRange(min=1), multiple=True, help="A number of GPUs (repeatable).")
@click.option("--tokens", type=click.IntRange(min=1), help="On each GPU in a step.  [default: 8192]")
@click.option("--measure", is_flag=True, help="First measure Python time over DTensors here (a minute).")
def main(model: str | None, gpu: str | None, worlds: tuple[int, ...], tokens: int | None, measure: bool) -> None:
    if measure:
        ROWS.unlink(missing_ok=True)
        name = model or MODEL
        sharded.rows(Writer(ROWS), name, len(MODELS[name].shapes()))
    rows = [*(read(ROWS) if ROWS.exists() else ()), *gpu_rows()]
    simulation = Simulation(model or MODEL, gpu or GPU, rows)
    plan = Plan(simulation, worlds or WORLDS, tokens or Plan._field_defaults["tokens"])
    if model or gpu or worlds or tokens:
        click.echo("\n\n".join(make(plan) for make in BLOCKS.values()))
        return
    page.write(PAGE, plan)
    save(plot.draw(plan), RESULTS / "plots" / "scale.png")
    click.echo(f"written: {PAGE}")


if __name__ == "__main__":
    main()
