"""The command line: one verb per job. Exit codes: 0 done, 1 our fault, 2 yours, 130 interrupted.

Heavy modules are imported inside the verbs, so that --help, methods and report start without torch.
"""

import os
import signal
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from potstill.cli.app import app, lab
from potstill.errors import PotstillError

# isort: off
from potstill.cli import train, use, look  # in the order of --help
# isort: on

__all__ = ["app", "look", "main", "train", "use"]
app.add_typer(lab, name="lab")


def _interrupt(number: int, frame: object) -> None:
    """Ctrl-C. Were it Python's own handler, asyncio would put its in place, which waits for a pause that never comes."""
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit. The user's mistakes are one message; ours keep their traceback."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for small models on a shared CPU, two threads are slower than one
    try:
        app(arguments, prog_name="potstill")
    except PotstillError as error:
        Console(stderr=True).print(f"[bold red]potstill:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
