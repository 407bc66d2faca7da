"""A deployment: what `headrace.toml`, the environment and the command line say together, and who said what.

Flags go before variables, variables before the file, the file before defaults. A flag or a variable for a model holds
for every model of the file; a MODEL in either takes the place of the file's models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headrace.config import require
from headrace.errors import HeadraceError, InvalidOption
from headrace.model_options import ModelOptions, repository, served_model
from headrace.option_fields import PREFIX
from headrace.serve_config import RepositoryConfig, ServeConfig, ServedModelConfig
from headrace.settings import (
    CONFIG_VARIABLE,
    MODELS,
    OPTIONS,
    SERVER,
    DeploymentFile,
    Setting,
    Settings,
    from_environment,
    from_flags,
    refuse_unknown_variables,
)

FILE_NAME = "headrace.toml"
DEFAULT = "default"
OWN_TO_EACH = ("name", "version")  # of a model: several cannot share them
_FLAG = re.compile(r"(--[a-z0-9-]+)\b.*?: (.*)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """All options of the server, or of one model. `place` begins errors about it; "": nothing need be said."""

    settings: Settings
    place: str

    def values(self) -> dict[str, Any]:
        return {field: setting.value for field, setting in self.settings.items()}

    def in_its_words(self, error: HeadraceError) -> HeadraceError:
        """Return an error that names a flag as one that names what was written in the flag's place."""
        match = _FLAG.match(str(error))
        for setting in self.settings.values():
            if match and match[1] == setting.option.flag and setting.origin != DEFAULT:
                return type(error)(f"{setting.named}: {match[2]}")
        return type(error)(f"{self.place}: {error}") if self.place else error


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """One server as it was described."""

    file: Path | None
    notes: tuple[str, ...]  # what the person who starts it may not expect
    server: Section
    models: tuple[Section, ...]

    def completed_models(self) -> tuple[ModelOptions, ...]:
        """Return each model with what was left open filled in. Raises InvalidOption or DeviceUnavailable."""
        return tuple(_completed(section) for section in self.models)

    def config(self) -> ServeConfig:
        """Return the server, validated. Raises InvalidOption or DeviceUnavailable, in the words of who wrote it."""
        models: list[ServedModelConfig] = []
        folder: RepositoryConfig | None = None
        for section, given in zip(self.models, self.completed_models(), strict=True):
            try:
                found = repository(given)
                require(found is None or folder is None, f"{given.source}: a second folder of models; serve one")
                folder = found or folder
                models += [served_model(given)] if found is None else []
            except HeadraceError as error:
                raise section.in_its_words(error) from error
        config = ServeConfig(models=tuple(models), repository=folder, **self.server.values())
        try:
            config.validate()
        except HeadraceError as error:
            raise self.server.in_its_words(error) from error
        return config


def _completed(section: Section) -> ModelOptions:
    try:
        return ModelOptions(**section.values()).completed()
    except HeadraceError as error:
        raise section.in_its_words(error) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a command finds: its flags by field (absent or None: not given), --config, variables, folder."""

    flags: Mapping[str, object]
    config: str | None
    environment: Mapping[str, str]
    folder: Path


def read_deployment(given: Surroundings) -> Deployment:
    """Return the deployment that file, environment and flags describe together.

    Raises InvalidOption: no such key, section or variable, with the nearest; a value that is not the option's; no
    model; a file that cannot be read.
    """
    refuse_unknown_variables(given.environment)
    file, notes = _file(given)
    server = (file.server() if file else {}) | _outside(SERVER, given)
    outside = _outside(MODELS, given)
    tables = file.models() if file else []
    places = [file.model_place(number) for number in range(len(tables))] if file else []
    if "source" in outside:
        if file and tables:
            notes += (f"{file.name}: its models are not served, since {outside['source'].named} is",)
        tables, places = [{}], [""]
    _refuse_shared(outside, len(tables))
    return Deployment(
        file=file.path if file else None,
        notes=notes,
        server=Section(settings=_with_defaults(SERVER, server), place=file.name if file else ""),
        models=tuple(_model(table | outside, place) for table, place in zip(tables, places, strict=True)),
    )


def _file(given: Surroundings) -> tuple[DeploymentFile | None, tuple[str, ...]]:
    named = given.environment.get(CONFIG_VARIABLE) if given.config is None else given.config
    if named is not None:
        return DeploymentFile(given.folder / named, named), ()
    path = given.folder / FILE_NAME
    if not path.is_file():
        return None, ()
    return DeploymentFile(path, FILE_NAME), (f"{FILE_NAME} is used, which lies in the current folder",)


def _outside(section: str, given: Surroundings) -> Settings:
    variables = from_environment(OPTIONS[section], given.environment, given.folder)
    return variables | from_flags(OPTIONS[section], given.flags, given.folder)


def _refuse_shared(outside: Settings, models: int) -> None:
    if not models:
        raise InvalidOption(
            f"no model to serve: name one, as in `headrace serve resnet18`, set {PREFIX}MODEL, or write [[models]] with"
            f" a source into {FILE_NAME}"
        )
    for field in OWN_TO_EACH:
        if models > 1 and field in outside:
            raise InvalidOption(f"{outside[field].named}: {models} models cannot share it; write it into [[models]]")


def _model(given: Settings, place: str) -> Section:
    if "source" not in given:
        raise InvalidOption(f"{place}: source is missing, which says what to serve, as MODEL on the command line")
    return Section(settings=_with_defaults(MODELS, given), place=place)


def _with_defaults(section: str, given: Settings) -> Settings:
    return {
        option.field: given.get(option.field)
        or Setting(option=option, value=option.default, origin=DEFAULT, named=option.flag)
        for option in OPTIONS[section]
    }
