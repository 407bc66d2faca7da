"""Deployments described by a test's own file, environment and flags."""

import argparse
import shlex

from headrace import serve_options
from headrace.deployment import Surroundings, read_deployment
from headrace.settings import MODELS, OPTIONS, SERVER

ALL = (*OPTIONS[SERVER], *OPTIONS[MODELS])
TWO = """
[[models]]
source = "resnet18"
version = 2
precision = "bf16"

[[models]]
source = "resnet50"
name = "fifty"
max_batch_size = 4
num_workers = 2
"""


def parser():
    made = argparse.ArgumentParser()
    serve_options.add_serve_options(made)
    return made


def read(folder, flags=(), environment=None, toml=None):
    """Return what the three sources describe in a folder, where `toml` is its headrace.toml."""
    if toml is not None:
        (folder / "headrace.toml").write_text(toml)
    args = parser().parse_args(shlex.split(flags) if isinstance(flags, str) else flags)
    return read_deployment(
        Surroundings(flags=vars(args), config=args.config, environment=environment or {}, folder=folder)
    )
