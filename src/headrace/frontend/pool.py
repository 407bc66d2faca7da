"""All engines of one version that a frontend can send to, as one: a request goes where it is answered first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headrace.clock import now_ns
from headrace.errors import EngineStopped, QueueFull
from headrace.routing import Spread

if TYPE_CHECKING:
    from headrace.control import ServedModel
    from headrace.frontend.link import BackendLink, Call


class Pool:
    """At least one link, once the first has been added. One event loop uses it."""

    def __init__(self) -> None:
        self.links: list[BackendLink] = []
        self._spread = Spread()

    @property
    def model(self) -> ServedModel:
        return self.links[-1].model

    def add(self, link: BackendLink) -> BackendLink | None:
        """Send to this engine too; return the link to its predecessor, which gets nothing more."""
        before = next((each for each in self.links if each.engine == link.engine), None)
        if before is not None:
            self.links.remove(before)
        self.links.append(link)
        return before

    def admit(self, rows: int, deadline_ns: int = 0, priority: int = 0) -> Call:
        """Lease rows at the best engine that has room. Raises as `BackendLink.admit` does, where none has."""
        links = self.links
        order = [0] if len(links) == 1 else self._spread.order([link.load for link in links], rows, now_ns())
        for number in order[:-1]:
            try:
                return links[number].admit(rows, deadline_ns, priority)
            except (QueueFull, EngineStopped):
                continue
        return links[order[-1]].admit(rows, deadline_ns, priority)

    @property
    def in_flight(self) -> int:
        return sum(link.in_flight for link in self.links)

    @property
    def free_rows(self) -> int:
        return sum(link.ring.free_rows for link in self.links)

    @property
    def rows(self) -> int:
        """How many rows the rings have together."""
        return sum(link.ring.layout.rows for link in self.links)

    @property
    def free_share(self) -> float:
        """Which share of the rings' rows is free, of the engine that has most."""
        return max(link.free_share for link in self.links)
