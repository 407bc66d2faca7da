"""What a watcher of runs prints as lines: notes, and where there is no terminal to draw on (a log, CI) the stages."""

from __future__ import annotations

from rich.console import Console

from headrace.clock import Clock, now_ns, seconds


class Lines:
    """Prints to one console. Where it is no terminal, a line stays one line, however long."""

    def __init__(self, console: Console, clock: Clock = now_ns) -> None:
        self._console, self._clock = console, clock
        self._began_ns = clock()

    def timed(self, text: str) -> None:
        """Print what is happening, and in front of it the seconds since these lines were begun."""
        self._print(f"[{seconds(self._clock() - self._began_ns):6.1f} s] {text}")

    def note(self, text: str) -> None:
        """Print a sentence worth reading."""
        self._print(f"note: {text}", style="yellow")

    def _print(self, text: str, style: str | None = None) -> None:
        whole = not self._console.is_terminal
        self._console.print(text, style=style, highlight=False, markup=False, soft_wrap=whole)
