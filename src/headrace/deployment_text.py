"""A deployment written out: as TOML that gives the same server again, with the origin of each value, or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from headrace.deployment import DEFAULT, Deployment, Section
from headrace.settings import HEADINGS, MODELS, SERVER, Setting


def as_toml(deployment: Deployment) -> str:
    """Return a file for --config. What is found out at the start stays open in it, and stands in comments."""
    parts = [_table(SERVER, deployment.server, {})]
    for section, completed in zip(deployment.models, deployment.completed_models(), strict=True):
        parts.append(_table(MODELS, section, asdict(completed)))
    return "\n".join(parts)


def as_json(deployment: Deployment) -> str:
    """Return every value, those found out at the start too, and beside them their origins."""
    models = [
        _plain(section, asdict(completed))
        for section, completed in zip(deployment.models, deployment.completed_models(), strict=True)
    ]
    content = {
        "file": deployment.file,
        SERVER: _plain(deployment.server, {}),
        MODELS: models,
        "origins": {SERVER: _origins(deployment.server), MODELS: [_origins(section) for section in deployment.models]},
    }
    return msgspec.json.format(msgspec.json.encode(content, enc_hook=str), indent=2).decode() + "\n"


def _table(heading: str, section: Section, completed: Mapping[str, Any]) -> str:
    return "".join(f"{line}\n" for line in (HEADINGS[heading], *_lines(section, completed)))


def _lines(section: Section, completed: Mapping[str, Any]) -> Iterator[str]:
    for field, setting in section.settings.items():
        key = setting.option.key
        found = completed.get(field, setting.value)
        if setting.value is None:
            value = "" if found is None else f" {_literal(found)}"
            yield f"# {key} ={value}  # {DEFAULT}: {setting.option.default_words}"
        else:
            yield f"{key} = {_literal(setting.value)}  # {_origin(setting, found)}"


def _origin(setting: Setting, found: object) -> str:
    return setting.origin if found == setting.value else f"{setting.origin}; here {_literal(found)}"


def _literal(value: object) -> str:
    """Return a TOML value on one line."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(_literal, value))}]"
    plain = str(value) if isinstance(value, Path) else value
    return tomli_w.dumps({"value": plain}).removeprefix("value = ").removesuffix("\n")


def _plain(section: Section, completed: Mapping[str, Any]) -> dict[str, Any]:
    settings = section.settings
    return {setting.option.key: completed.get(field, setting.value) for field, setting in settings.items()}


def _origins(section: Section) -> dict[str, str]:
    return {setting.option.key: setting.origin for setting in section.settings.values()}
