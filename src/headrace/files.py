"""Files that appear whole or not at all, so that nobody sees half of one, and what is told where none can appear."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from headrace.errors import OutputError

REMEDY = "free space, mend the permissions, or name another place"


@contextmanager
def writing(path: Path, remedy: str = REMEDY) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError about its own file, or about `path` where it names none."""
    try:
        yield
    except OSError as error:
        raise _refused(error.filename or path, error, remedy) from error


@contextmanager
def whole_file(path: Path, remedy: str = REMEDY) -> Iterator[Path]:
    """Give a name beside `path` to write to; at the end that file takes `path`'s place, or goes if the block raises.

    The name keeps the suffix, and is of this process alone. Raises OutputError where something cannot be written.
    """
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        partial.replace(path)
    except OSError as error:
        raise _refused(path, error, remedy) from error
    finally:
        with suppress(OSError):  # the first error is the one to tell
            partial.unlink(missing_ok=True)


def write_whole(path: Path, content: str | bytes, remedy: str = REMEDY) -> None:
    """Replace a file, text as UTF-8. Raises OutputError."""
    with whole_file(path, remedy) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def _refused(path: str | Path, error: OSError, remedy: str) -> OutputError:
    # NumPy and Arrow raise OSErrors that have a text and no number.
    return OutputError(f"{path}: cannot be written ({error.strerror or error}); {remedy}")
