"""Where commands write: results to standard output, everything else to standard error."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from rich.console import Console
from rich.markdown import Markdown

from headrace.bench.summary import RunSummary

FILE_WIDTH = 120  # columns


class Screen:
    """Results go to standard output, everything else to standard error."""

    def __init__(self) -> None:
        self.out = Console(soft_wrap=False, width=_width(sys.stdout))
        self.err = Console(stderr=True, width=_width(sys.stderr))

    def tell(self, text: str) -> None:
        """Print a sentence for the person who started the command, as it is."""
        self.err.print(text, highlight=False, markup=False, soft_wrap=True)

    def remark(self, summary: RunSummary) -> None:
        """Print what a reader of a run's numbers must know."""
        for mark in summary.marks:
            self.out.print(f"mark: {mark}", style="bold yellow", highlight=False, markup=False)
        for note in summary.notes:
            self.out.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def print_page(page: str, screen: Screen) -> None:
    """Show Markdown as tables on a terminal, and as it is to a file or a pipe."""
    if screen.out.is_terminal:
        screen.out.print(Markdown(page))
    else:
        sys.stdout.write(page)


def _width(stream: TextIO) -> int | None:
    """Return how wide tables are in a file or a pipe; None leaves it to the terminal, or to COLUMNS."""
    return None if stream.isatty() or "COLUMNS" in os.environ else FILE_WIDTH
