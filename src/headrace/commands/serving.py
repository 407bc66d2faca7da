"""What serves: `serve`, `config`, `deploy`."""

from __future__ import annotations

import argparse
import sys

from headrace import (
    deployment_text,
    ray_options,
    serve_options,
)
from headrace.frontend import tracing
from headrace.frontend.auth import require_usable
from headrace.frontend_job import access_settings, tracing_settings
from headrace.gpus import require_free_memory, unlike_note
from headrace.screen import Screen
from headrace.supervisor import Supervisor


def add_serve(parser: argparse.ArgumentParser) -> None:
    serve_options.add_serve_options(parser)
    parser.set_defaults(command=do_serve)


def do_serve(args: argparse.Namespace, screen: Screen) -> None:
    deployment = serve_options.deployment(args)
    for note in deployment.notes:
        screen.tell(note)
    config = deployment.config()
    require_usable(access_settings(config))
    traced = tracing_settings(config)
    if traced is not None:
        tracing.require_usable(traced)
    require_free_memory(config.gpus)
    unlike = unlike_note(config.gpus)
    if unlike is not None:
        screen.tell(unlike)
    Supervisor(config, screen.tell).run()


def add_config(parser: argparse.ArgumentParser) -> None:
    serve_options.add_serve_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, with what is found out at the start filled in")
    parser.set_defaults(command=do_config)


def do_config(args: argparse.Namespace, screen: Screen) -> None:
    deployment = serve_options.deployment(args)
    for note in deployment.notes:
        screen.tell(note)
    deployment.config()  # refused here as it would be by `serve`
    sys.stdout.write(deployment_text.as_json(deployment) if args.json else deployment_text.as_toml(deployment))


def add_deploy(parser: argparse.ArgumentParser) -> None:
    ray_options.add_ray_options(parser)
    parser.set_defaults(command=do_deploy, interrupted="what Ray was told stays")


def do_deploy(args: argparse.Namespace, screen: Screen) -> None:
    deployment = ray_options.ray_deployment(args)
    from headrace.ray_serve.launch import deploy  # noqa: PLC0415  Ray, an extra, and torch

    deploy(deployment, screen.tell)
