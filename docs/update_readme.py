"""Put the tables of finished comparisons into the README: ``python docs/update_readme.py out/digits out/photo``."""

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from steep.evidence.report import table
from steep.evidence.runs.store import open_store

README = Path(__file__).parent.parent / "README.md"


def shown(directory: str) -> str:
    """A study as the terminal shows it, 100 columns wide, under the command that made it."""
    study = open_store(directory).study()
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(table.render(study))
    return f"$ {study.command}\n" + "\n".join(line.rstrip() for line in console.export_text().splitlines())


def main() -> None:
    block = "```text\n" + "\n\n".join(map(shown, sys.argv[1:])) + "\n```"
    place = re.compile(r"(<!-- demo -->\n).*?(\n<!-- end -->)", re.DOTALL)
    README.write_text(place.sub(lambda m: m[1] + block + m[2], README.read_text()))


if __name__ == "__main__":
    main()
