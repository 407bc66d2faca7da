"""The words of `headrace plan`, and what they become."""

from __future__ import annotations

import argparse
import math
import re
from pathlib import Path

from headrace.bench.summary import FILE_NAME, load_summary
from headrace.errors import InvalidOption, RunFailed
from headrace.options import seconds
from headrace.planning.fleet import Ask

LARGER_RATES = (1e6, 1e7, 1e8)  # rows of the table, beside the asked one


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is wanted")
    group.add_argument("--rate", type=float, required=True, metavar="R", help="requests/s of all GPUs together")
    group.add_argument("--p99", type=seconds, required=True, metavar="TIME", help="bound, as 25ms")
    group.add_argument(
        "--rates", type=float, nargs="+", metavar="R", help="further rows of the table (default: 1e6 1e7 1e8 above R)"
    )
    group.add_argument("--rows", type=int, metavar="N", help="of a request (default: as in the runs; 1 if they differ)")
    group = parser.add_argument_group("what it is planned from")
    group.add_argument(
        "--runs", type=Path, nargs="+", required=True, metavar="DIR", help="folders of runs of `headrace bench`"
    )
    group.add_argument(
        "--lanes", type=int, nargs="+", metavar="N", help="numbers of lanes to try (default: those of the runs)"
    )
    group.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="that fail together (default: 8)")
    group.add_argument("--gpu-hour-cost", type=float, metavar="PRICE", help="then costs are told beside GPU-hours")
    group.add_argument(
        "--network", type=bits_per_s, metavar="RATE", help="of a node, as 25Gbps (default: it is left out)"
    )
    group.add_argument(
        "--proxy-rate",
        metavar="R",
        help="requests/s of one proxy, or the folder of a run through one at its limit (default: proxies are left out)",
    )
    group.add_argument(
        "--pauses",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let hosts pause as they did in the runs (default: they do)",
    )
    group.add_argument("--seed", type=int, default=0, help="of the simulation (default: 0)")
    group = parser.add_argument_group("results")
    group.add_argument("--output-dir", type=Path, metavar="DIR", help="for plan.md, plan.json, plan.png")
    group.add_argument("--json", action="store_true", help="print the plan as JSON on standard output")


def bits_per_s(text: str) -> float:
    """Read 25Gbps, 800Mbps. Raises what argparse shows as wrong."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*)([GMT])bps", text)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no network rate; write it as 25Gbps or 800Mbps")
    return float(match[1]) * {"M": 1e6, "G": 1e9, "T": 1e12}[match[2]]


def ask(args: argparse.Namespace) -> Ask:
    """Return what is asked for. Raises InvalidOption."""
    larger = tuple(rate for rate in LARGER_RATES if rate > args.rate)
    rates = larger if args.rates is None else tuple(args.rates)
    for name, value in (
        *(("--rate", rate) for rate in (args.rate, *rates)),
        ("--p99", args.p99),
        ("--gpu-hour-cost", args.gpu_hour_cost),
    ):
        if value is not None and not 0 < value < math.inf:
            raise InvalidOption(f"{name} {value:g}: must be above 0, and finite")
    counts = [
        ("--gpus-per-node", args.gpus_per_node),
        ("--rows", args.rows),
        *(("--lanes", n) for n in args.lanes or ()),
    ]
    for name, value in counts:
        if value is not None and value < 1:
            raise InvalidOption(f"{name} {value}: must be at least 1")
    return Ask(
        rate=args.rate,
        bound_s=args.p99,
        rates=rates,
        gpus_per_node=args.gpus_per_node,
        gpu_hour_cost=args.gpu_hour_cost,
        network_bits_per_s=args.network,
        proxy_rate=None if args.proxy_rate is None else _proxy_rate(args.proxy_rate),
        seed=args.seed,
    )


def _proxy_rate(text: str) -> float:
    """Read a number, or the requests/s of a run through a proxy."""
    if (Path(text) / FILE_NAME).is_file():
        metrics = load_summary(Path(text)).metrics
        if not metrics.window_s or metrics.throughput_samples_per_s is None:
            raise RunFailed(f"--proxy-rate {text}: the run has no throughput; name one that counts, or a number")
        return metrics.requests / metrics.window_s
    try:
        rate = float(text)
    except ValueError:
        raise InvalidOption(f"--proxy-rate {text}: neither a number of requests/s nor the folder of a run") from None
    if not 0 < rate < math.inf:
        raise InvalidOption(f"--proxy-rate {text}: must be above 0, and finite")
    return rate
