"""What is said of a request beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.clock import NS_PER_S, now_ns, seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A request's options, from the moment when it was made."""

    version: str | None = None
    timeout_s: float | None = None  # None: however long it takes
    deadline_ns: int | None = None
    priority: int = 0
    request_id: str | None = None

    @classmethod
    def now(
        cls, version: str | None, timeout_s: float | None, priority: int = 0, request_id: str | None = None
    ) -> Sent:
        deadline_ns = None if timeout_s is None else now_ns() + int(timeout_s * NS_PER_S)
        return cls(
            version=version, timeout_s=timeout_s, deadline_ns=deadline_ns, priority=priority, request_id=request_id
        )

    def left_s(self) -> float | None:
        """Return how long it may still take."""
        return None if self.deadline_ns is None else max(0.0, seconds(self.deadline_ns - now_ns()))
