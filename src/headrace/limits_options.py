"""The words of `headrace limits`, and what they become."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from headrace.bench.limits_report import LimitsConfig
from headrace.config import LanesConfig
from headrace.lanes_options import add_shape_options, shaped
from headrace.options import add_model_options, model_config, resolve_device

BATCH_SIZES = (1, 32, 256)
BATCH_SIZES_CPU = (1, 8)


def add_limits_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    group = parser.add_argument_group("what to measure")
    usual, on_cpu = (" ".join(map(str, sizes)) for sizes in (BATCH_SIZES, BATCH_SIZES_CPU))
    group.add_argument(
        "--batch-sizes",
        nargs="+",
        type=int,
        metavar="B",
        help=f"rows of a batch, and of a request (default: {usual}; {on_cpu} on the CPU)",
    )
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model"
    )
    group.add_argument(
        "--wire", default="float32", metavar="TYPE", help="what a row carries: float32 or uint8 (default: float32)"
    )
    group.add_argument("--image-size", type=int, default=250, metavar="PIXELS", help="(default: 250)")
    add_shape_options(parser.add_argument_group("how the lanes run the model"))
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="for limits.json and limits.png (default: under results/)"
    )
    group.add_argument("--overwrite", action="store_true", help="replace an output folder that exists")
    group.add_argument("--json", action="store_true", help="print the numbers as JSON on standard output")


def limits_config(args: argparse.Namespace) -> LimitsConfig:
    """Return what the options ask for, validated. Raises InvalidOption or DeviceUnavailable."""
    device = resolve_device(args.device)
    sizes = args.batch_sizes or (BATCH_SIZES_CPU if device == "cpu" else BATCH_SIZES)
    config = LimitsConfig(
        device=device,
        model=model_config(args, args.model),
        # A lane is measured with one batch at a time, so it needs room for no second one.
        lanes=replace(shaped(LanesConfig(depth=1), args), buckets=tuple(sorted(set(sizes)))),
        wire=args.wire,
        image_size=args.image_size,
    )
    config.validate()
    return config
