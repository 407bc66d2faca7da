"""Brings changes of shared memory regions to all frontends, in one order, and says when all have made them.

The supervisor's part of it: a frontend asks, every frontend makes the change and says so, and the asker hears of it. A
frontend that dies meanwhile is not waited for, and one that is started begins with the regions that there are.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

from headrace.control import ChangeRegions, RegionsChanged, RegionSpec
from headrace.errors import HeadraceError


class Frontend(Hashable, Protocol):
    """One that can be told something. One that has died is told nothing, and that is no error."""

    def send(self, word: object) -> None: ...


@dataclass(slots=True)
class _Change:
    """One that is under way."""

    asker: Frontend
    word: ChangeRegions  # as it was asked for
    everybody: tuple[Frontend, ...]
    missing: set[Frontend]  # that have not said that they have made it
    error: HeadraceError | None = None


@dataclass(slots=True)
class RegionChanges:
    """All changes of one server. Told of what frontends say, and of their deaths."""

    regions: dict[str, RegionSpec] = field(default_factory=dict)  # what a new frontend begins with
    _under_way: dict[int, _Change] = field(default_factory=dict)
    _numbers: count[int] = field(default_factory=count)

    def asked(self, asker: Frontend, word: ChangeRegions, frontends: Iterable[Frontend]) -> None:
        """Begin a change in all frontends that live, among them the asker."""
        everybody = tuple(frontends)
        if word.spec is not None:
            self.regions.setdefault(word.spec.name, word.spec)
        elif word.name is None:
            self.regions.clear()
        else:
            self.regions.pop(word.name, None)
        self._under_way[self._tell(everybody, word)] = _Change(asker, word, everybody, set(everybody))

    def made(self, frontend: Frontend, word: RegionsChanged) -> None:
        """Note that a frontend has made a change, or could not."""
        change = self._under_way.get(word.number)
        if change is not None:  # None: a change was taken back, which nobody waits for
            change.error = change.error or word.error
            self._answered(word.number, change, frontend)

    def gone(self, frontend: Frontend) -> None:
        """Note a frontend's death."""
        for number, change in list(self._under_way.items()):
            self._answered(number, change, frontend)

    def _answered(self, number: int, change: _Change, frontend: Frontend) -> None:
        change.missing.discard(frontend)
        if change.missing:
            return
        del self._under_way[number]
        if change.error is not None:
            self._take_back(change)
        change.asker.send(RegionsChanged(change.word.number, change.error))

    def _take_back(self, change: _Change) -> None:
        """Unregister what only some could register, so that it is registered everywhere or nowhere."""
        spec = change.word.spec
        if spec is not None and self.regions.get(spec.name) is spec:  # it was not there before
            del self.regions[spec.name]
            self._tell(change.everybody, ChangeRegions(change.word.number, spec.name, None))

    def _tell(self, everybody: Iterable[Frontend], word: ChangeRegions) -> int:
        number = next(self._numbers)
        for frontend in everybody:
            frontend.send(ChangeRegions(number, word.name, word.spec))
        return number
