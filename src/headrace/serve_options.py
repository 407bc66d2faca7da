"""The words of `headrace serve` and `headrace config`, made from the declared options, and what they describe."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from headrace.deployment import FILE_NAME, Deployment, Surroundings, read_deployment
from headrace.option_fields import Option
from headrace.settings import CONFIG_VARIABLE, MODELS, OPTIONS, SERVER

EPILOG = (
    "Each option is also a variable, named behind it, and a key of the file: the flag's word with underscores, in"
    " [server] or [[models]]. Flags go before variables, variables before the file. A flag for a model holds for every"
    " model of the file; MODEL takes the place of the file's models. `headrace config` shows what comes out."
)


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add_options(parser, (*OPTIONS[SERVER], *OPTIONS[MODELS]))


def add_options(parser: argparse.ArgumentParser, options: Iterable[Option]) -> None:
    """Add --config, and these options of the file under their headings."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"describes the deployment (default: {FILE_NAME} of the current folder, if any; {CONFIG_VARIABLE})",
    )
    groups = {}
    for option in options:
        heading = option.details.get("group", SERVER)
        if heading not in groups:
            groups[heading] = parser.add_argument_group(heading)
        _add(groups[heading], option)


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    """Add an option as text, which its declaration reads, so that a wrong value is told alike from every source."""
    text = f"{option.text} (default: {option.default_words}; {option.variable})".replace("%", "%%")
    if option.field == "source":
        group.add_argument("source", nargs="?", metavar="MODEL", help=f"{option.text} ({option.variable})")
    elif option.kind is bool:
        group.add_argument(
            option.flag, dest=option.field, action=argparse.BooleanOptionalAction, default=None, help=text
        )
    else:
        nargs = "+" if option.is_list else None
        group.add_argument(option.flag, dest=option.field, nargs=nargs, metavar=option.metavar, help=text)


def deployment(args: argparse.Namespace) -> Deployment:
    """Return what the options, the environment and the file describe. Raises InvalidOption."""
    return read_deployment(
        Surroundings(flags=vars(args), config=args.config, environment=os.environ, folder=Path.cwd())
    )
