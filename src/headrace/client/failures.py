"""Which error a client raises: the class that the server names, or that an HTTP status stands for."""

from __future__ import annotations

import math

from headrace import errors
from headrace.errors import HeadraceError
from headrace.frontend.link import ModelFailed

AGAIN_AFTER_S = 0.5  # where the server does not say when to come back

_BY_STATUS: dict[int, type[HeadraceError]] = {
    400: errors.InvalidRequest,
    404: errors.UnknownModel,
    408: errors.DeadlineExceeded,
    429: errors.QueueFull,
    503: errors.Unavailable,
    504: errors.DeadlineExceeded,
}


class NotTaken(Exception):
    """The server, or the way to it, has refused a request before anything was done: it may be sent again."""

    def __init__(self, error: HeadraceError, after_s: float = AGAIN_AFTER_S) -> None:
        super().__init__(str(error))
        self.error = error
        self.after_s = after_s


def named(name: str) -> type[HeadraceError] | None:
    """Return the error class of that name, if there is one."""
    if name == ModelFailed.__name__:
        return ModelFailed
    kind = getattr(errors, name, None)
    return kind if isinstance(kind, type) and issubclass(kind, HeadraceError) else None


def of_status(status: int, name: str, text: str) -> HeadraceError:
    """Return what an HTTP answer other than 200 means; `name` is the class that the server named, or empty."""
    kind = named(name) or _BY_STATUS.get(status)
    if kind is None:
        kind = errors.InvalidRequest if 400 <= status < 500 else errors.RunFailed
        text = f"{text} (HTTP status {status})"
    return kind(text)


def retry_after_s(given: str | None) -> float | None:
    """Return Retry-After's seconds; None where it is not there, or is a date, which no server of models sends."""
    try:
        value = float(given or "")
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
