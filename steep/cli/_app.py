"""What all commands share: the application, errors as one sentence, tables and JSON."""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer
from rich.console import Console
from rich.table import Table

import steep
from steep.tasks import tasks
from steep.utils.places import sentence

P = ParamSpec("P")

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Published training methods, and whether they help on your model.",
)
out = Console()
TRACEBACK = "--traceback"

LogOption = Annotated[str | None, typer.Option(help="tensorboard, wandb, mlflow or another of Accelerate's trackers")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON, with all fields and digits")]
RECIPE = "a task (see `steep list tasks`), file.py:recipe or package.module:recipe"


def complete_tasks(incomplete: str) -> list[str]:
    return [name for task in tasks().values() for name in task.names if name.startswith(incomplete)]


def complete_methods(incomplete: str) -> list[str]:
    return [id for id in steep.methods() if id.startswith(incomplete)]


RecipeArgument = Annotated[str, typer.Argument(help=RECIPE, autocompletion=complete_tasks)]


def _version(wanted: bool) -> None:
    if wanted:
        print(f"steep {steep.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option(TRACEBACK, help="show the whole traceback of an error")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="show the version", is_eager=True, callback=_version)
    ] = False,
) -> None:
    """What stands before or after any command."""


def main() -> None:
    """Entry point of the command ``steep``."""
    app(args=[argument for argument in sys.argv[1:] if argument != TRACEBACK])


def command(name: str | None = None) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Register a command, whose errors end it with one sentence and exit code 2, and Ctrl-C with 130."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            try:
                function(*args, **kwargs)
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except steep.Interrupted as stop:
                _end(str(stop), 130)
            except KeyboardInterrupt:
                _end("Stopped. Finished runs are kept; rerun the same command to resume.", 130)
            except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
                sys.stderr.close()
                sys.exit(1)
            except Exception as error:
                if TRACEBACK in sys.argv:
                    traceback.print_exc()
                _end(f"steep: {sentence(error)}", 2)

        return app.command(name)(run)

    return register


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


def show_table(rows: Sequence[dict[str, Any]], as_json: bool, *wide: str) -> None:
    """Print rows, given by heading, as a table or as a JSON array.

    Args:
        rows: cells are texts or numbers; in JSON they may be anything.
        wide: headings of the columns that are wrapped where the table is wider than the terminal.
    """
    if as_json:
        print(json.dumps(rows, indent=1, default=str))
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for heading in rows[0] if rows else ():
        table.add_column(heading, no_wrap=heading not in wide, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row.values()))
    out.print(table if rows else "nothing found", markup=False, highlight=False)


def writable(path: Path, option: str) -> Path:
    """A file that a command will write at its end, refused at its beginning where that cannot be.

    Raises:
        ValueError: a folder, or a file in a folder that does not exist.
    """
    if path.is_dir():
        raise ValueError(f"{option} {path} is a folder: give a file in it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: there is no folder {path.absolute().parent}; create it first")
    return path
