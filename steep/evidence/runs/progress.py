"""The progress of a study: one bar over all its training runs."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class StudyProgress(Progress):
    """A progress bar whose total is known once the study has been planned."""

    def __init__(self, console: Console):
        columns = (
            TextColumn("training runs"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=console, disable=not console.is_terminal or console.quiet)
        self.bar = self.add_task("training runs", total=None)

    def begin(self, announcement: str, runs: int) -> None:
        """Print what is planned, and set the total."""
        self.console.print(announcement)
        self.update(self.bar, total=runs)

    def done(self) -> None:
        """One more run is in the store."""
        self.advance(self.bar)
