"""The options of `headrace tune`, and what they become."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

from headrace import options
from headrace.capacity_options import DECIDED, add_bound_options, add_search_output_options, add_time_option
from headrace.config import LanesConfig, RunConfig
from headrace.lanes_options import LAUNCH_SWITCHES, add_shape_options
from headrace.search.finals import FinalsConfig
from headrace.search.holds import Bound
from headrace.search.space import KEYS, Choice, restricted, usual_space
from headrace.search.tune import TuneConfig

# Options of `bench` that each set of options says, or that are the lanes' own.
CHOSEN: dict[str, object] = {
    **dict.fromkeys(("num_workers", "max_batch_size", "buckets", "transport", "ring_slots")),
    **dict.fromkeys(("compile_cache", "duration", "gpus")),
    **dict.fromkeys(("limits", "compile"), False),
    **{name: getattr(LanesConfig(), name) for name in LAUNCH_SWITCHES},
    "lane_depth": LanesConfig().depth,
    "engines_per_device": 1,
    "design": "lanes",
    "precision": "tf32",
    "client": "copy",
    "load_seed": 0,
}


def add_tune_options(parser: argparse.ArgumentParser) -> None:
    add_bound_options(parser.add_argument_group("what is searched for"))
    group = parser.add_argument_group("search")
    add_time_option(group)
    group.add_argument(
        "--search",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE,...",
        help=f"values of an option, as workers=1,2,4; keys: {', '.join(KEYS)} (default: what suits the device)",
    )
    group.add_argument(
        "--run-duration", type=options.seconds, default=5.0, metavar="TIME", help="of each run (default: 5s)"
    )
    group.add_argument(
        "--finalists", type=int, default=2, metavar="N", help="best options that are repeated at the end (default: 2)"
    )
    group.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="of each of them, in fresh processes by turns (default: 5)"
    )
    group.add_argument("--search-seed", type=int, default=0, metavar="N", help="of order and arrivals (default: 0)")
    options.add_source_options(parser.add_argument_group("model"))
    requests = parser.add_argument_group("requests")
    requests.add_argument("--batch-size", type=int, default=1, metavar="B", help="rows of a request (default: 1)")
    options.add_payload_options(requests)
    add_shape_options(parser.add_argument_group("lanes, whatever is searched through"))
    add_search_output_options(parser)
    parser.set_defaults(**DECIDED, **CHOSEN)


def tune_config(args: argparse.Namespace) -> TuneConfig:
    """Return how to search, validated. Raises InvalidOption, DeviceUnavailable."""
    kind = options.resolve_device(args.device).partition(":")[0]
    usual = usual_space(kind, len(os.sched_getaffinity(0)), args.batch_size, args.p99)
    config = TuneConfig(
        bound=Bound(p99_s=args.p99, allow_shed=args.allow_shed),
        space=restricted(usual, args.search, args.batch_size),
        time_s=args.time,
        duration_s=args.run_duration,
        seed=args.search_seed,
        finals=FinalsConfig(finalists=args.finalists, repeats=args.repeats),
    )
    config.validate()
    return config


def configurer(args: argparse.Namespace) -> Callable[[Choice], RunConfig]:
    """Return what makes a run of a set of options; it raises InvalidOption where they cannot go together."""

    def configure(choice: Choice) -> RunConfig:
        chosen = {
            "num_workers": choice.workers,
            "max_batch_size": choice.max_batch_size,
            "max_queue_delay_us": choice.max_queue_delay_us,
            "precision": choice.precision,
            "compile": choice.compile,
        }
        return options.run_config(argparse.Namespace(**{**vars(args), **chosen}))

    return configure
