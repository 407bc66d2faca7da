"""The words of `headrace serve`, and the configuration they become."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from headrace import lanes_options, options
from headrace.config import ServeConfig

MAX_BATCH_SIZE = 32
QUEUE_BATCHES = 8  # largest batches that a frontend holds at once


def add_serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("served", metavar="MODEL", help=options.MODEL_HELP)
    group = parser.add_argument_group("server")
    group.add_argument("--name", help="by which clients ask for the model (default: MODEL, or the callable's name)")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    group.add_argument("--http-port", type=int, default=8000, metavar="PORT", help="0 takes any (default: 8000)")
    group.add_argument(
        "--frontends", type=int, default=1, metavar="N", help="processes that share the port (default: 1)"
    )
    group.add_argument("--num-workers", type=int, metavar="N", help="lanes (default: 4 on a GPU, 1 on the CPU)")
    group.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="of torchvision's (default: 224)")
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model"
    )
    group.add_argument("--compile-cache", type=Path, metavar="DIR", help="keep compiled code there for the next start")
    group.add_argument("--seed", type=int, default=0, help="of random weights, where no checkpoint is to be had")
    group.add_argument(
        "--queue-rows", type=int, metavar="N", help="rows that a frontend holds (default: 8 largest batches)"
    )
    group.add_argument(
        "--ring-socket",
        default="auto",
        metavar="PATH",
        help="where programs of this user on this host get shared memory: auto (no file), a path, off",
    )
    group.add_argument(
        "--ring-bytes", type=int, default=4 << 30, metavar="N", help="of shared memory for them all (default: 4 GiB)"
    )
    group.add_argument("--max-body-bytes", type=int, default=256 << 20, metavar="N", help="(default: 256 MiB)")
    group.add_argument(
        "--body-timeout", type=float, default=30.0, metavar="S", help="for a request's body to come (default: 30)"
    )
    group.add_argument("--drain-timeout", type=float, default=30.0, metavar="S", help="at the end (default: 30)")
    options.add_model_options(parser)
    lanes_options.add_lanes_options(parser)
    parser.set_defaults(batch_size=MAX_BATCH_SIZE, max_batch_size=MAX_BATCH_SIZE)


def serve_config(args: argparse.Namespace) -> ServeConfig:
    """Return the server that the options ask for, validated. Raises InvalidOption or DeviceUnavailable."""
    device = options.resolve_device(args.device)
    lanes = lanes_options.lanes_config(args)
    config = ServeConfig(
        name=args.name or args.served.rpartition(":")[2],
        model=replace(options.model_config(args, args.served), seed=args.seed, compile_cache=args.compile_cache),
        device=device,
        num_lanes=(1 if device == "cpu" else 4) if args.num_workers is None else args.num_workers,
        lanes=lanes,
        image_size=args.image_size,
        host=args.host,
        http_port=args.http_port,
        frontends=args.frontends,
        queue_rows=args.queue_rows or QUEUE_BATCHES * max(lanes.buckets, default=1),
        ring_socket=args.ring_socket,
        ring_bytes=args.ring_bytes,
        max_body_bytes=args.max_body_bytes,
        body_timeout_s=args.body_timeout,
        drain_timeout_s=args.drain_timeout,
    )
    config.validate()
    return config
