"""What one source says of a deployment: a file, the environment, or the command line, checked and with its origin.

Nothing is taken that is no option: a wrong key, section or variable is refused with the nearest right one.
"""

from __future__ import annotations

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.errors import InvalidOption
from headrace.model_options import ModelOptions, located
from headrace.option_fields import PREFIX, Option, options_of, placed
from headrace.serve_config import ServeConfig

SERVER, MODELS = "server", "models"
HEADINGS = {SERVER: "[server]", MODELS: "[[models]]"}
OPTIONS = {SERVER: options_of(ServeConfig), MODELS: options_of(ModelOptions)}
CONFIG_VARIABLE = PREFIX + "CONFIG"
# Read elsewhere: by the benchmark's record of the revision, and where it shows a traceback.
OTHER_VARIABLES = (PREFIX + "GIT_REVISION", PREFIX + "DEBUG")
# What Kubernetes puts into every container for a Service called headrace, or headrace-anything.
# Source: its documentation, "Service", "Discovering services", environment variables.
_SERVICE_LINKS = re.compile(
    PREFIX + r"(\w+_)?(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_SERVICE_ADDRESS = re.compile(r"(tcp|udp|sctp)://")
_SHOWN = 80  # letters of a value in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The value of an option, and where it came from."""

    option: Option
    value: Any
    origin: str  # "default", "file", the variable, or the flag
    named: str  # the value as its writer knows it, for errors


Settings = dict[str, Setting]  # by field


def from_flags(options: Iterable[Option], flags: Mapping[str, object], folder: Path) -> Settings:
    """Return what the command line says: texts, lists of texts, or bool, by field. Raises InvalidOption."""
    settings = {}
    for option in options:
        given = flags.get(option.field)
        if given is None:
            continue
        flag = "MODEL" if option.field == "source" else option.flag
        if isinstance(given, bool):
            value: object = given
            named = flag if given else f"--no-{flag[2:]}"
        else:
            assert isinstance(given, (str, list))
            named = f"{flag} {_shortened(given if isinstance(given, str) else ' '.join(given))}"
            value = option.read_text(given, named)
        settings[option.field] = Setting(
            option=option, value=_placed(option, value, folder), origin=named.partition(" ")[0], named=named
        )
    return settings


def from_environment(options: Iterable[Option], environment: Mapping[str, str], folder: Path) -> Settings:
    """Return what the variables say. Raises InvalidOption."""
    settings = {}
    for option in options:
        text = environment.get(option.variable)
        if text is None:
            continue
        named = f"{option.variable}={_shortened(text)}"
        try:
            value = option.read_text(text, named)
        except InvalidOption as error:
            if not _SERVICE_ADDRESS.match(text):
                raise
            raise InvalidOption(
                f"{error}; Kubernetes sets this for a Service of such a name: set enableServiceLinks: false in the pod"
            ) from error
        settings[option.field] = Setting(
            option=option, value=_placed(option, value, folder), origin=option.variable, named=named
        )
    return settings


def refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    """Raise InvalidOption for a variable HEADRACE_... that nothing reads."""
    known = [option.variable for options in OPTIONS.values() for option in options]
    known += [CONFIG_VARIABLE, *OTHER_VARIABLES]
    words = {name.removeprefix(PREFIX): name for name in known}  # the prefix alone makes no two names alike
    for name, text in environment.items():
        linked = _SERVICE_LINKS.fullmatch(name) or _SERVICE_ADDRESS.match(text)
        if name.startswith(PREFIX) and name not in known and not linked:
            raise InvalidOption(f"{name}: nothing reads this variable; {_near(name.removeprefix(PREFIX), words)}")


class DeploymentFile:
    """A file `headrace.toml`. Its relative paths are relative to its folder."""

    def __init__(self, path: Path, name: str) -> None:
        """Read it; `name` is for messages. Raises InvalidOption: unreadable, not TOML, a section that is none."""
        self.path = path
        self.name = _shortened(name)
        self._content = self._load()
        for key, value in self._content.items():
            self._check_section(key, value)

    def server(self) -> Settings:
        """Return what it says of the server. Raises InvalidOption."""
        return self._settings(SERVER, self._content.get(SERVER, {}), f"{self.name}: {HEADINGS[SERVER]}")

    def models(self) -> list[Settings]:
        """Return what it says of each model. Raises InvalidOption."""
        tables = self._content.get(MODELS, [])
        return [self._settings(MODELS, table, self.model_place(number)) for number, table in enumerate(tables)]

    def model_place(self, number: int) -> str:
        """Return how messages name a table of `[[models]]`, counted from 0."""
        several = len(self._content.get(MODELS, [])) > 1
        return f"{self.name}: {HEADINGS[MODELS]}" + (f" number {number + 1}" if several else "")

    def _load(self) -> dict[str, Any]:
        try:
            return tomllib.loads(self.path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidOption(
                f"{self.name}: cannot be read ({error.strerror}); name a file with --config or {CONFIG_VARIABLE}"
            ) from error
        except (ValueError, RecursionError) as error:  # wrong TOML, which says the line, or no UTF-8
            raise InvalidOption(f"{self.name}: is not a TOML file: {error}") from error

    def _check_section(self, key: str, value: object) -> None:
        if key not in HEADINGS:
            homes = [HEADINGS[section] for section, options in OPTIONS.items() if key in _keys(options)]
            hint = f"it belongs in {homes[0]}" if homes else _near(key, HEADINGS)
            raise InvalidOption(f"{self.name}: {_shortened(key)}: there is no such section; {hint}")
        tables = value if key == MODELS else [value]
        if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
            raise InvalidOption(f"{self.name}: {key}: write it as {HEADINGS[key]}")

    def _settings(self, section: str, table: Mapping[str, object], place: str) -> Settings:
        options = {option.key: option for option in OPTIONS[section]}
        settings = {}
        for key, value in table.items():
            if key not in options:
                other = SERVER if section == MODELS else MODELS
                belongs = key in _keys(OPTIONS[other])
                hint = f"it belongs in {HEADINGS[other]}" if belongs else _near(key, {name: name for name in options})
                raise InvalidOption(f"{place} {_shortened(key)}: there is no such key; {hint}")
            option = options[key]
            named = f"{place} {key} = {_shortened(json.dumps(value, ensure_ascii=False, default=str))}"
            read = _placed(option, option.read(value, named), self.path.absolute().parent)
            settings[option.field] = Setting(option=option, value=read, origin="file", named=named)
        return settings


def _keys(options: Sequence[Option]) -> list[str]:
    return [option.key for option in options]


def _near(wrong: str, right: Mapping[str, str]) -> str:
    """Return the hint behind a wrong word: what it may have meant, or all that there is, as `right` names them."""
    matches = difflib.get_close_matches(wrong, right, n=1)
    return f"did you mean {right[matches[0]]}?" if matches else f"there are: {', '.join(sorted(right.values()))}"


def _placed(option: Option, value: object, folder: Path) -> object:
    """Return the value with its paths as seen from anywhere, not only from `folder`."""
    if option.field == "source":
        return located(str(value), folder)
    if isinstance(value, tuple):
        return tuple(_placed(option, item, folder) for item in value)
    return placed(value, folder) if isinstance(value, Path) else value


def _shortened(text: str) -> str:
    """Return a text for a message of one line."""
    line = text if text.isprintable() else ascii(text)
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."
