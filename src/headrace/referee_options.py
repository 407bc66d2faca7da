"""The options of `headrace referee`, and what they become."""

from __future__ import annotations

import argparse
from pathlib import Path

from headrace import options
from headrace.config import TargetConfig
from headrace.errors import InvalidOption
from headrace.referee.cases import Settings, cases
from headrace.referee.run import TOOLS, Asking, find_tools
from headrace.target.law import parse_law
from headrace.target_options import parse_shape

LAW = "null://fixed?service=2ms"


def add_referee_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `headrace referee`."""
    usual = Settings()
    parser.add_argument(
        "--url",
        default=LAW,
        metavar="URL",
        help="http://HOST:PORT or grpc://HOST:PORT of any server of the v2 protocol, with --model; or null://LAW, a"
        f" server of known law that is started here, with the truth as first column (default: {LAW})",
    )
    parser.add_argument("--model", metavar="NAME", help="its name there")
    parser.add_argument("--model-version", metavar="N", help="(default: which the server chooses)")
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1,3,224,224",
        help="of an input whose shape the server leaves open; the first size is left as it is in loads of one row",
    )
    parser.add_argument(
        "--rate", type=float, default=usual.rate, metavar="R", help=f"requests/s of Server (default: {usual.rate:g})"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        default=usual.concurrency,
        metavar="N",
        help=f"in flight in the closed loop (default: {usual.concurrency})",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=usual.samples,
        metavar="N",
        help=f"rows of a request of MultiStream (default: {usual.samples})",
    )
    parser.add_argument(
        "--duration",
        type=options.seconds,
        default=usual.duration_s,
        metavar="TIME",
        help=f"of each measurement (default: {usual.duration_s:g}s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and inputs (default: 0)")
    names = ", ".join(case.name for case in cases(usual))
    parser.add_argument("--case", action="append", metavar="NAME", help=f"only this load: {names} (default: all)")
    parser.add_argument(
        "--tool",
        action="append",
        choices=TOOLS,
        help="only this tool beside ours (default: those that are installed)",
    )
    parser.add_argument(
        "--perf-analyzer", type=Path, metavar="FILE", help="its binary (default: on PATH, or where make puts it)"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=usual.threshold,
        metavar="RATIO",
        help=f"smallest difference that is a disagreement (default: {usual.threshold:g})",
    )
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="(default: a new folder under results/)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that exists")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")


def asking(args: argparse.Namespace) -> Asking:
    """Return what the options ask for, validated. Raises InvalidOption."""
    settings = Settings(
        rate=args.rate,
        concurrency=args.concurrency,
        samples=args.samples,
        duration_s=args.duration,
        seed=args.seed,
        threshold=args.threshold,
    )
    settings.validate()
    names = {case.name.lower(): case.name for case in cases(settings)}
    unknown = [each for each in args.case or () if each.lower() not in names]
    if unknown:
        raise InvalidOption(f"--case {unknown[0]}: there is none; choose from {', '.join(names.values())}")
    target = TargetConfig(
        url=args.url, model=args.model or "", version=args.model_version, shapes=dict(map(parse_shape, args.shape))
    )
    target.validate()
    if target.encrypted:
        raise InvalidOption(
            f"--url {target.url}: perf_analyzer is not told of certificates here; give http:// or grpc://, or measure"
            " with headrace bench"
        )
    if target.scheme == "null" and parse_law(target.url).transport != "http":
        raise InvalidOption(f"--url {target.url}: the null server of the referee speaks HTTP; leave transport out")
    return Asking(
        target=target,
        tools=find_tools(args.tool, args.perf_analyzer),
        settings=settings,
        only=tuple(names[each.lower()] for each in args.case or ()),
    )
