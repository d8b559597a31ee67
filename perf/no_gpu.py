"""What can be known without a GPU: rows of compiled code, of host time, and of what a bandwidth model predicts."""

import time

import click

from perf import code, host, predict
from perf.results import Writer

PARTS = (("compiled code", code.rows), ("host time", host.rows), ("predictions", predict.rows))


def rows(writer: Writer, deadline: float) -> None:
    """One part after the other, none begun after the deadline."""
    for title, part in PARTS:
        if time.monotonic() > deadline:
            click.echo(f"out of time: no {title}")
            continue
        click.echo(title)
        part(writer)
