"""The `fusedopt` command: finds the subcommand, keeps every user error to one line and exit status 2.

Importing this file imports neither torch nor a rule: the subcommand decides whether the kernels run compiled or
interpreted (`require_interpreter`), and that choice is fixed once the first rule has been imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from fusedopt import __version__

EXTRAS = {
    **dict.fromkeys(("click", "rich", "matplotlib"), "cli"),
    **dict.fromkeys(("optuna", "sqlalchemy", "scipy", "cmaes", "pymoo", "greenlet"), "tune"),
    **dict.fromkeys(("babel", "sacrebleu", "tokenizers"), "translate"),
}
"""Module → the extra of the package that installs it."""
COMMANDS = {
    "train": "Train a small language model or translator on real text with a fused optimizer.",
    "compare": "Train one task with many optimizers, schedules, seeds, batch sizes; tabulate and plot the results.",
    "tune": "Search for good hyper-parameters.",
    "runs": "List past runs, show what differs between them, start a new one from an old one.",
    "schedules": "List and draw the learning-rate schedules.",
    "verify": "Check every rule, dtype, format and backend of this machine against a float64 oracle.",
    "inspect": "Compile a rule's kernels and count launches, bytes and instructions, without a GPU.",
    "memory": "Count the memory that training a model holds, beside other packages' formats.",
}


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 a check failed, 2 bad input (one line on stderr), 130 interrupted."""
    try:
        status = _run(list(sys.argv[1:] if args is None else args))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        status = _fail(f"this command needs {error.name}: pip install 'fusedopt[{extra}]'")
    except KeyboardInterrupt:
        status = _fail("interrupted", status=130)
    except BrokenPipeError:  # `fusedopt … | head`: the reader has gone, nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    sys.exit(status)


def require_interpreter() -> None:
    """Make the kernels run in Triton's interpreter, replacing this process by one with TRITON_INTERPRET=1 if needed.

    Triton reads the variable when a kernel is decorated, so it must stand before a rule is imported. The new
    process gets exactly the command line of this one.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "TRITON_INTERPRET": "1"})


def _run(args: list[str]) -> int:
    import click

    class Commands(click.Group):
        """Imports a subcommand when it is used, so that `fusedopt --help` needs only click."""

        def list_commands(self, ctx: click.Context) -> list[str]:
            return list(COMMANDS)

        def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
            if cmd_name not in COMMANDS:
                return None
            return importlib.import_module(f"fusedopt.{cmd_name}.command").command

        def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
            with formatter.section("Commands"):
                formatter.write_dl(list(COMMANDS.items()))

    cli = Commands("fusedopt", help="Fused optimizers for PyTorch: the programs that come with the library.")
    cli = click.version_option(__version__, message="%(prog)s %(version)s")(cli)
    try:
        status = cli.main(args or ["--help"], prog_name="fusedopt", standalone_mode=False)
    except click.Abort:
        return _fail("interrupted", status=130)
    except click.ClickException as error:
        return _fail(error.format_message(), status=error.exit_code)
    return status if isinstance(status, int) else 0


def _fail(message: str, status: int = 2) -> int:
    print("fusedopt: " + " ".join(message.split()), file=sys.stderr)
    return status


if __name__ == "__main__":
    main()
