"""Shows a search: a line for what was found, and below them, on a terminal, what is being done."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.status import Status

from headrace.bench.lines import Lines
from headrace.study.progress import duration


class SearchProgress:
    """Watches a search and its runs. Use it as a context manager, so that the terminal is given back as it was."""

    def __init__(self, console: Console) -> None:
        self._console, self._lines = console, Lines(console)
        self._status = Status("starting", console=console)
        self._step = self._left = ""
        self._told: set[str] = set()

    def __enter__(self) -> SearchProgress:
        if self._console.is_terminal:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def step(self, text: str, left_s: float) -> None:
        """A run begins."""
        self._step, self._left = text, f"{duration(max(0.0, left_s))} left"
        self._show("")

    def found(self, text: str) -> None:
        """A run, or all at a rate, are done."""
        self._lines.timed(text)

    def tell(self, text: str) -> None:
        """A run's note: once, since all runs of a search have the same to say."""
        if text not in self._told:
            self._told.add(text)
            self._lines.note(text)

    def stage(self, text: str) -> None:
        self._show(text)

    def progress(self, issued: int, answered: int, total: int) -> None:
        """Nothing: a run is short, and a bar for each says little."""

    def watch(self, counters: Any, generators: int, planned: int | None) -> None:  # noqa: ANN401
        """Likewise."""

    def look(self) -> None:
        """Likewise."""

    def _show(self, stage: str) -> None:
        self._status.update(f"{self._step} ({stage or 'starting'}; {self._left})")
