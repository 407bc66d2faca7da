"""The command line's words for lanes, which several commands share."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import get_args

from headrace.config import LanesConfig, Stem
from headrace.pipeline.batch import powers_of_two

PAYS = "where it pays, in 16 bit on a GPU"
DEPTH_HELP = "batches that a lane has at once, running and queued behind"
LAUNCH_SWITCHES = {
    "prefetch": "copy large batches in on a stream of their own, ahead of the lanes",
    "spin": "wait for the GPU with a busy core, which answers sooner",
}
SHAPE_SWITCHES = {
    "graphs": "CUDA graphs, where the model can be captured",
    "channels_last": "compute convolutions in channels_last layout",
    "fold_batch_norm": "fold batch norms into convolutions",
}
REWRITES = {  # fields of LanesConfig that are on, off, or left to what pays
    "fuse_epilogues": "convolution, bias, addition and ReLU in one cuDNN call",
    "pointwise_as_matmul": "strided 1x1 convolutions as matrix products",
}
STEM_HELP = "a first convolution of few channels: kept, its channels padded, or space to depth; auto: what pays"
SWITCHES = LAUNCH_SWITCHES | SHAPE_SWITCHES  # fields of LanesConfig that are on or off


def add_lanes_options(parser: argparse.ArgumentParser) -> None:
    defaults = LanesConfig()
    group = parser.add_argument_group("lanes")
    group.add_argument(
        "--max-batch-size",
        type=int,
        metavar="ROWS",
        help="gather requests into batches of up to so many rows (default: --batch-size, which gathers nothing)",
    )
    group.add_argument(
        "--buckets",
        type=int,
        nargs="+",
        metavar="ROWS",
        help="batch sizes to prepare for (default: with --max-batch-size its powers of two, else --batch-size)",
    )
    group.add_argument(
        "--max-queue-delay-us",
        type=int,
        default=defaults.max_queue_delay_us,
        metavar="US",
        help="let a batch wait so long to grow, even for a free lane (default: 0: no lane idles while requests wait)",
    )
    group.add_argument(
        "--lane-depth",
        type=int,
        default=defaults.depth,
        metavar="N",
        help=f"{DEPTH_HELP} (default: {defaults.depth})",
    )
    _add_switches(group, LAUNCH_SWITCHES)
    add_shape_options(group)


def add_shape_options(group: argparse._ArgumentGroup) -> None:
    """Add what changes the model that the lanes run, and how it is launched."""
    _add_switches(group, SHAPE_SWITCHES)
    _add_switches(group, {name: f"{text} (default: {PAYS})" for name, text in REWRITES.items()})
    group.add_argument("--stem", choices=get_args(Stem), default=LanesConfig().stem, help=STEM_HELP)


def _add_switches(group: argparse._ArgumentGroup, switches: dict[str, str]) -> None:
    for name, text in switches.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            action=argparse.BooleanOptionalAction,
            default=getattr(LanesConfig(), name),
            help=text,
        )


def shaped(config: LanesConfig, args: argparse.Namespace) -> LanesConfig:
    """Return the configuration with what `add_shape_options` has read."""
    return replace(
        config,
        graphs=args.graphs,
        channels_last=args.channels_last,
        fold_batch_norm=args.fold_batch_norm,
        fuse_epilogues=args.fuse_epilogues,
        stem=args.stem,
        pointwise_as_matmul=args.pointwise_as_matmul,
    )


def _buckets(args: argparse.Namespace) -> tuple[int, ...]:
    if args.buckets:
        return tuple(args.buckets)
    return (args.batch_size,) if args.max_batch_size is None else powers_of_two(args.max_batch_size)


def lanes_config(args: argparse.Namespace) -> LanesConfig:
    config = LanesConfig(
        buckets=_buckets(args),
        max_queue_delay_us=args.max_queue_delay_us,
        depth=args.lane_depth,
        prefetch=args.prefetch,
        spin=args.spin,
    )
    return shaped(config, args)
