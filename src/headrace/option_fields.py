"""Options declared as fields of a dataclass: flag, environment variable, key of a file, help and limits from one place.

    http_port: int = option(8000, "0 takes any that is free", metavar="PORT", limits=(0, 65535))

is `--http-port PORT`, `HEADRACE_HTTP_PORT` and the key `http_port`. Types are bool, int, float, str, Path, a Literal of
words, or a tuple of these; each of them may be None where the default is found out later (`computed` says how). Every
value is printed, so a secret is never one: let an option name the file that holds it.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict, TypeVar, Union, Unpack, get_args, get_origin, get_type_hints

import msgspec

from headrace.errors import InvalidOption

T = TypeVar("T")
PREFIX = "HEADRACE_"
_METADATA = "headrace.option"
_WORDS: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}
_METAVARS: dict[object, str] = {int: "N", float: "S", Path: "PATH"}


class Details(TypedDict, total=False):
    """What else can be said of an option."""

    key: str  # in files (default: the field's name)
    word: str  # of flag and variable (default: the key)
    metavar: str
    limits: tuple[float, float]  # the smallest and the largest value; math.inf: no largest
    computed: str  # what None stands for
    group: str  # heading in the help


def option(default: T, text: str, **details: Unpack[Details]) -> T:
    """Declare a field that is an option. `text` is its help."""
    return dataclasses.field(default=default, metadata={_METADATA: (text, details)})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Option:
    """One declared option."""

    field: str
    kind: Any  # its type, without None
    default: object
    text: str
    details: Details

    @property
    def key(self) -> str:
        return self.details.get("key", self.field)

    @property
    def word(self) -> str:
        return self.details.get("word", self.key)

    @property
    def flag(self) -> str:
        return "--" + self.word.replace("_", "-")

    @property
    def variable(self) -> str:
        return PREFIX + self.word.upper()

    @property
    def metavar(self) -> str | None:
        if get_origin(self.kind) is Literal:
            return "{" + ",".join(map(str, get_args(self.kind))) + "}"
        return self.details.get("metavar", _METAVARS.get(self.item_kind))

    @property
    def is_list(self) -> bool:
        return get_origin(self.kind) is tuple

    @property
    def item_kind(self) -> object:
        return get_args(self.kind)[0] if self.is_list else self.kind

    @property
    def default_words(self) -> str:
        """The default, for people."""
        if self.default is None:
            return self.details.get("computed", "none")
        if isinstance(self.default, bool):
            return str(self.default).lower()
        return f"{self.default:g}" if isinstance(self.default, float) else str(self.default)

    @property
    def limit_words(self) -> str:
        """What a value must be, for people."""
        kind = self.item_kind
        words = f"one of {', '.join(map(str, get_args(kind)))}" if get_origin(kind) is Literal else _WORDS[kind]
        words = ", ".join(filter(None, (words, self.range_words)))
        return f"a list of one or more, each {words}" if self.is_list else words

    @property
    def range_words(self) -> str:
        """The smallest and the largest number, for people; "" where there is no limit."""
        if "limits" not in self.details:
            return ""
        least, most = self.details["limits"]
        return f"at least {least}" if most == math.inf else f"{least} to {most}"

    def read(self, value: object, named: str) -> object:
        """Return what a file or a program gave, as the field's type.

        Raises InvalidOption, which begins with `named`: the value as its writer knows it.
        """
        return self._convert(value, named, strict=True)

    def read_text(self, text: str | list[str], named: str) -> object:
        """Return what a flag or a variable says; lists have commas, or are lists already. Raises InvalidOption."""
        if not self.is_list:
            return self._convert(text, named, strict=False)
        words = [text] if isinstance(text, str) else text
        return self._convert([part.strip() for word in words for part in word.split(",")], named, strict=False)

    def check(self, value: object) -> None:
        """Refuse a field that was set by a program, as `read` would. Raises InvalidOption."""
        if value is not None:
            self._convert(value, f"{self.flag} {value}", strict=True)

    def _convert(self, value: object, named: str, *, strict: bool) -> object:
        try:
            converted: Any = msgspec.convert(value, self.kind, strict=strict, dec_hook=_path)
        except msgspec.ValidationError as error:
            raise InvalidOption(f"{named}: must be {self.limit_words}") from error
        items = converted if self.is_list else (converted,)
        if not items or not all(map(self._within, items)):
            words = self.limit_words if self.is_list else self.range_words or self.limit_words
            raise InvalidOption(f"{named}: must be {words}")
        return converted

    def _within(self, value: object) -> bool:
        if isinstance(value, bool):
            return True
        if isinstance(value, (int, float)):
            least, most = self.details.get("limits", (-math.inf, math.inf))
            return math.isfinite(value) and least <= value <= most
        # Empty, of control characters, or of bytes that are no text: never meant, and no file could hold it.
        text = str(value)
        return bool(text) and not any(unicodedata.category(letter) in {"Cc", "Cs"} for letter in text)


def options_of(declared: type) -> tuple[Option, ...]:
    """Return the options that a dataclass declares, in order; its other fields are left out."""
    hints = get_type_hints(declared)
    return tuple(
        Option(
            field=field.name,
            kind=_without_none(hints[field.name]),
            default=field.default,
            text=field.metadata[_METADATA][0],
            details=field.metadata[_METADATA][1],
        )
        for field in dataclasses.fields(declared)
        if _METADATA in field.metadata
    )


def check_options(declared: object) -> None:
    """Refuse what is beyond a declared limit in an instance. Raises InvalidOption."""
    for each in options_of(type(declared)):
        each.check(getattr(declared, each.field))


def placed(path: str | Path, folder: Path) -> Path:
    """Return the path as seen from anywhere, not only from `folder`; `~` is somebody's home."""
    return folder / os.path.expanduser(path)  # noqa: PTH111  Path's own raises where there is no such user


def _without_none(hint: object) -> object:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint
    (kind,) = (part for part in get_args(hint) if part is not types.NoneType)
    return kind


def _path(kind: Callable[[object], object], value: object) -> object:
    """Make what msgspec does not know: a path."""
    if isinstance(value, (str, Path)) and kind is Path:
        return Path(value)
    raise TypeError(f"{value!r} is no {kind}")
