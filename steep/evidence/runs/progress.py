"""How far a study is: one bar over all its trainings."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class StudyProgress(Progress):
    """A progress bar whose total becomes known when the study has been planned."""

    def __init__(self, console: Console):
        columns = (
            TextColumn("trainings"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        super().__init__(*columns, console=console, disable=not console.is_terminal or console.quiet)
        self.bar = self.add_task("trainings", total=None)

    def expect(self, runs: int) -> None:
        self.update(self.bar, total=runs)

    def done(self) -> None:
        """One training more is in the store."""
        self.advance(self.bar)
