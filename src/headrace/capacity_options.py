"""The options of `headrace capacity`, and what they become."""

from __future__ import annotations

import argparse
from pathlib import Path

from headrace import options, target_options
from headrace.config import RunConfig
from headrace.search.capacity import SearchConfig
from headrace.search.holds import Bound

IN_FLIGHT = 64  # of a server, and of a design over a queue
# Options of `bench` that say how requests are sent and what is kept: here the search says so.
DECIDED = {
    **dict.fromkeys(("num_iters", "rate", "concurrency", "arrivals", "bound", "exclusive", "reference_cache")),
    **dict.fromkeys(("profile", "keep_answers"), False),
    "load": "burst",
}


def add_capacity_options(parser: argparse.ArgumentParser) -> None:
    add_bound_options(parser.add_argument_group("what is searched for"))
    group = parser.add_argument_group("search")
    group.add_argument(
        "--resolution",
        type=float,
        default=SearchConfig(bound=Bound(p99_s=1)).resolution,
        metavar="SHARE",
        help="end when the highest rate that holds and the lowest that does not are as near (default: 0.05)",
    )
    group.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="runs of a rate, with other arrivals each, until its verdict is clear (default: 3 at most)",
    )
    group.add_argument(
        "--duration", type=options.seconds, default=10.0, metavar="TIME", help="of each run (default: 10s)"
    )
    group.add_argument(
        "--level-duration",
        type=options.seconds,
        metavar="TIME",
        help="of the runs at 50, 70, 80 and 90 %% of the capacity (default: 3 times --duration)",
    )
    add_time_option(group)
    group.add_argument(
        "--in-flight",
        type=int,
        metavar="N",
        help=f"requests at once, to see what can be done at most (default: what a ring holds, else {IN_FLIGHT})",
    )
    group.add_argument("--load-seed", type=int, default=0, metavar="N", help="of the first run's arrivals (default: 0)")
    options.add_design_options(parser)
    options.add_model_options(parser)
    options.add_payload_options(parser.add_argument_group("requests"))
    target_options.add_target_options(parser)
    add_search_output_options(parser)
    usual = {name: parser.get_default(name) for name in ("model", "batch_size")}
    parser.set_defaults(**{**DECIDED, "of_designs": usual, **dict.fromkeys(usual)})  # with --url there is no usual one


def add_bound_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--p99",
        type=options.seconds,
        required=True,
        metavar="TIME",
        help="bound of the 99th percentile of the response time (answer - planned sending), as 20ms",
    )
    group.add_argument(
        "--allow-shed",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of requests that may be refused for want of room (default: 0)",
    )


def add_time_option(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--time",
        type=options.seconds,
        default=600.0,
        metavar="TIME",
        help="in all; what is known by then is the result (default: 10min)",
    )


def add_search_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="for the result and every run's files, under trials/ (default: under results/); what the runs share,"
        " reference answers and compiled code, is in a temporary folder and does not stay",
    )
    group.add_argument("--overwrite", action="store_true", help="replace what an earlier search left in the folder")
    group.add_argument("--json", action="store_true", help="print the result as JSON on standard output")


def run_config(args: argparse.Namespace) -> RunConfig:
    """Return the run whose load the search decides. Raises InvalidOption, DeviceUnavailable."""
    args = argparse.Namespace(**{**vars(args), "duration": None})  # that of a run is the search's
    if args.url is not None:
        return target_options.target_run_config(args)
    for name, usual in args.of_designs.items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    return options.run_config(args)


def search_config(args: argparse.Namespace, run: RunConfig) -> SearchConfig:
    """Return how to search, validated. Raises InvalidOption."""
    over_ring = run.target is None and run.transport.name == "ring"
    usual = run.transport.ring_slots if over_ring else IN_FLIGHT
    most = run.target.connections if run.target is not None else usual
    config = SearchConfig(
        bound=Bound(p99_s=args.p99, allow_shed=args.allow_shed),
        duration_s=args.duration,
        level_duration_s=3 * args.duration if args.level_duration is None else args.level_duration,
        repeats=args.repeats,
        resolution=args.resolution,
        time_s=args.time,
        in_flight=min(usual, most) if args.in_flight is None else args.in_flight,
        seed=args.load_seed,
    )
    config.validate()
    return config
