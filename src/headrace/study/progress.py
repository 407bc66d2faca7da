"""Shows a sweep's progress: a bar on a terminal, one line per finished run elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from headrace.study.sweep import RunOutcome, SweepStep


class RichSweepProgress:
    """A SweepProgress. Use it as a context manager, so that the terminal is given back as it was."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, left="")
        self._told: RunOutcome | None = None

    def __enter__(self) -> RichSweepProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, step: SweepStep) -> None:
        if step.last is not None and step.last is not self._told:
            self._told = step.last
            self._console.print(_line(step, step.last, with_left=not self._console.is_terminal), highlight=False)
        self._bar.update(
            self._task,
            description=escape(step.name or "done"),
            completed=step.done,
            total=step.total,
            left=_left(step),
        )


def _line(step: SweepStep, outcome: RunOutcome, *, with_left: bool) -> str:
    how = f"[red]failed: {escape(outcome.error)}[/red]" if outcome.error else "ok"
    left = f", {_left(step)}" if with_left and _left(step) else ""
    return f"{step.done}/{step.total} {escape(outcome.planned.name)}: {how} ({outcome.duration_s:.1f} s{left})"


def _left(step: SweepStep) -> str:
    if step.time_left_s is None or step.name is None:
        return ""
    return f"about {duration(step.time_left_s)} left"


def duration(seconds: float) -> str:
    """Say a time as a person would: seconds below two minutes, then minutes, then hours and minutes."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
