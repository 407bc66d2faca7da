"""Where a run's files go: a folder that appears whole or not at all, and a CSV that grows by whole rows."""

from __future__ import annotations

import csv
import io
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headrace.errors import OutputError
from headrace.files import writing

PARTIAL = ".partial"


@contextmanager
def output_folder(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a folder to write into, and rename it to `path` at the end; remove it if the block raises.

    Raises OutputError where `path` exists (and `overwrite` is off) or cannot be written.
    """
    path = path.absolute()
    if path.exists() and any(path.iterdir() if path.is_dir() else [path]) and not overwrite:
        raise OutputError(f"{path}: exists already; choose another --output-dir, or add --overwrite")
    partial = path.with_name(path.name + PARTIAL)
    try:
        with writing(path, "free space, mend the permissions, or choose another --output-dir"):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            yield partial
            _replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(partial: Path, path: Path) -> None:
    if path.exists():
        old = path.with_name(path.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        partial.rename(path)
        shutil.rmtree(old)
    else:
        partial.rename(path)


class CsvLog:
    """Appends rows to a CSV file whose columns never change. Call `prepare` before the work, not after it."""

    def __init__(self, path: Path, columns: tuple[str, ...]) -> None:
        self._path = path
        self._columns = columns

    def prepare(self) -> None:
        """Raise OutputError if a row could not be appended: no permission, or a file with other columns."""
        with self._opened() as descriptor:
            header = self._header(descriptor)
        expected = ",".join(self._columns)
        if header and header != expected:
            raise OutputError(
                f"{self._path}: has other columns ({_shorten(header)}) than this version writes"
                f" ({_shorten(expected)}); move it away or name another file"
            )

    def append(self, row: dict[str, object]) -> None:
        """Append one row, and the header to an empty file, whole or not at all. None becomes an empty field."""
        with self._opened() as descriptor:
            size = os.fstat(descriptor).st_size
            try:
                _write_all(descriptor, self._encoded(row, with_header=size == 0))
            except OSError as error:
                _truncate(descriptor, size)
                raise OutputError(
                    f"{self._path}: the row could not be written ({error.strerror}) and nothing was added; free"
                    " space or name another file"
                ) from error

    def _encoded(self, row: dict[str, object], *, with_header: bool) -> bytes:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if with_header:
            writer.writeheader()
        writer.writerow({name: row.get(name) for name in self._columns})
        return text.getvalue().encode()

    def _header(self, descriptor: int) -> str:
        if not _is_regular(descriptor):
            return ""
        return os.pread(descriptor, 1 << 16, 0).decode(errors="replace").split("\n", 1)[0].rstrip("\r")

    @contextmanager
    def _opened(self) -> Iterator[int]:
        with writing(self._path, "mend the permissions or name another file"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _truncate(descriptor: int, size: int) -> None:
    if _is_regular(descriptor):
        os.ftruncate(descriptor, size)


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)


def _shorten(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
