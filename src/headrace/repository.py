"""Which models and versions there are to serve: those of the command line, and those of a folder, looked at anew.

    FOLDER/NAME/VERSION/model.py     with a function `build`, and perhaps `example_inputs`; weights may lie beside it
    FOLDER/NAME/VERSION/model.pt2    an exported program (torch.export.save)

A name from outside is looked up among what is there, and is never made part of a path before. Whoever may write into
the folder may run code in the server: a model file is a program, and so, in effect, is an exported one.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from headrace.errors import ModelError, UnknownModel
from headrace.processes import without_paths
from headrace.serve_config import MODEL_NAME, MODEL_VERSION, RepositoryConfig, ServeConfig, ServedModelConfig

FILES = {"model.py": "{}:build", "model.pt2": "{}"}  # the first that is there, and the source it becomes


@dataclass(frozen=True, slots=True)
class FileState:
    """Enough of a file to see that it has been replaced."""

    path: str
    size_bytes: int
    modified_ns: int


@dataclass(frozen=True, slots=True)
class Found:
    """A version of a model that could be served. Two are equal if they would serve the same."""

    served: ServedModelConfig
    files: tuple[FileState, ...] = ()

    @property
    def name(self) -> str:
        return self.served.name

    @property
    def version(self) -> str:
        return self.served.version

    def public(self, text: str) -> str:
        """Return a message about this version as clients may read it, without where our files lie."""
        source = self.served.model.name
        places = [source, source.rpartition(":")[0], str(Path(source.removesuffix(":build")).parent)]
        for place in places:
            if "/" in place.strip("/"):
                text = text.replace(place, "(path)")
        return without_paths(text)


@dataclass(frozen=True, slots=True)
class Versions:
    """All versions of a model, oldest first, and which of them are to be served."""

    found: tuple[Found, ...]
    wanted: tuple[Found, ...]


class Repository:
    """What a server may serve."""

    def __init__(self, config: ServeConfig) -> None:
        self._given = config.models
        self._folder = config.repository

    def names(self) -> tuple[str, ...]:
        """Return the names of all models that are there now."""
        given = dict.fromkeys(served.name for served in self._given)
        return tuple(given | dict.fromkeys(sorted(self._folders())))

    def look(self, name: str) -> Versions:
        """Return what there is of a model now. Raises UnknownModel, or ModelError if nothing of it can be served."""
        given = [_given(served) for served in self._given if served.name == name]
        if given:
            ordered = tuple(sorted(given, key=_number))
            return Versions(ordered, ordered)
        folder = self._folders().get(name)
        if folder is None or self._folder is None:
            raise UnknownModel(f"there is no model {name[:128]!r} in the repository; its index says which there are")
        found = tuple(sorted(_versions(name, folder, self._folder), key=_number))
        if not found:
            raise ModelError(
                f"model {name} has no version: it needs a folder named by a number, with {' or '.join(FILES)} in it"
            )
        return Versions(found, _wanted(found, self._folder.versions))

    def _folders(self) -> dict[str, Path]:
        if self._folder is None:
            return {}
        return {each.name: each for each in _subfolders(self._folder.folder, MODEL_NAME)}


def _wanted(found: tuple[Found, ...], policy: tuple[str, ...]) -> tuple[Found, ...]:
    if policy == ("all",):
        return found
    if policy == ("latest",):
        return found[-1:]
    wanted = tuple(each for each in found if each.version in policy)
    if not wanted:
        there = ", ".join(each.version for each in found)
        raise ModelError(f"model {found[0].name} has versions {there}, and --versions asks for {', '.join(policy)}")
    return wanted


def _versions(name: str, folder: Path, config: RepositoryConfig) -> Iterator[Found]:
    for each in _subfolders(folder, MODEL_VERSION):
        for file, form in FILES.items():
            if (each / file).is_file():
                model = replace(config.defaults.model, name=form.format(each / file))
                served = replace(config.defaults, name=name, version=each.name, model=model)
                yield Found(served, _states(each))
                break


def _given(served: ServedModelConfig) -> Found:
    file = Path(served.model.name.rpartition(":")[0] or served.model.name)
    return Found(served, (_state(file),) if file.is_file() else ())


def _subfolders(folder: Path, pattern: str) -> Iterator[Path]:
    try:
        entries = list(folder.iterdir())
    except OSError:  # removed meanwhile: there is nothing in it
        return
    for each in entries:
        if re.fullmatch(pattern, each.name) and each.is_dir():
            yield each


def _states(folder: Path) -> tuple[FileState, ...]:
    """Return the files of a version, but for what Python leaves there."""
    states = []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(set(folders) - {"__pycache__"})
        states += [_state(Path(parent) / file) for file in sorted(files)]
    return tuple(states)


def _state(path: Path) -> FileState:
    try:
        status = path.stat()
    except OSError:  # removed meanwhile
        return FileState(str(path), 0, 0)
    return FileState(str(path), status.st_size, status.st_mtime_ns)


def _number(found: Found) -> int:
    return int(found.version)
