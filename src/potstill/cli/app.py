"""What all commands share."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="On-policy distillation: a small student learns on what it writes itself, corrected by a teacher.",
)
lab = typer.Typer(no_args_is_help=True, help="The bundled models.")
out = Console()

Recipe = Annotated[str, typer.Argument(help="A TOML file, or a recipe that comes with potstill.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, such as learner.lr=1e-4", show_default=False)]
Variant = Annotated[str | None, typer.Option(help="An entry of the recipe's [variants].", show_default=False)]
Root = Annotated[Path, typer.Option(help="Folder of the runs.")]
