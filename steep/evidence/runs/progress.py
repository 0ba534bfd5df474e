"""The progress of a study: one bar over all its training runs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class StudyProgress(Progress):
    """A progress bar over the dry runs, then over the training runs that have been planned."""

    def __init__(self, console: Console):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=console, disable=not console.is_terminal or console.quiet)
        self.bar = self.add_task("", total=None)

    def begin(self, what: str, announcement: str, runs: int) -> None:
        """Print what comes next, and start the bar again with that many runs."""
        self.console.print(announcement, markup=False, highlight=False)
        self.reset(self.bar, description=what, total=runs)

    def done(self) -> None:
        """One more run is in the store."""
        self.advance(self.bar)
