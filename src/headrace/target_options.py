"""The options that name a server to measure, and what they become."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import get_args

from headrace import options
from headrace.config import AccessConfig, InputConfig, ModelConfig, RunConfig, TargetConfig
from headrace.errors import InvalidOption
from headrace.target.access import read_access
from headrace.target.law import Transport

NUM_ITERS = 100
OF_DESIGNS = ("profile", "keep_answers", "exclusive", "reference_cache", "num_workers", "transport", "compile")


def add_target_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `headrace bench --url`; the options about the design then say nothing."""
    group = parser.add_argument_group("a server by its URL, in place of a design")
    group.add_argument(
        "--url",
        metavar="URL",
        help="http://HOST:PORT or grpc://HOST:PORT of any server of the v2 protocol, https or grpcs over TLS, with"
        " --model; or null://LAW, a server of known law that is started for the run, as null://fixed?service=2ms",
    )
    group.add_argument("--model-version", metavar="N", help="(default: which the server chooses)")
    group.add_argument("--generators", type=int, default=1, metavar="G", help="processes that send (default: 1)")
    group.add_argument("--label", default="", metavar="NAME", help="of the run in tables (default: SCHEME-MODEL)")
    group.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=1,3,224,224",
        help="of an input whose shape the server leaves open; --batch-size sets the first size alone (default: 1)",
    )
    group.add_argument(
        "--distinct", type=int, default=16, metavar="N", help="different payloads, sent in turn (default: 16)"
    )
    group.add_argument(
        "--same-input",
        action="store_true",
        help="send one payload only; beside a run of different ones it shows a cache",
    )
    group.add_argument(
        "--int-range",
        nargs=2,
        type=int,
        default=(0, 99),
        metavar=("LEAST", "MOST"),
        help="of random whole numbers (default: 0 99)",
    )
    group.add_argument(
        "--input-file",
        type=Path,
        metavar="FILE.npz",
        help="arrays [payloads, *shape] by input, in place of random ones",
    )
    group.add_argument(
        "--reference", type=Path, metavar="FILE.npz", help="right answers: arrays [payloads, *shape] by output"
    )
    group.add_argument(
        "--check-model", metavar="FILE.py:CALLABLE", help="right answers: this eager model's, in a process of its own"
    )
    group.add_argument(
        "--tolerance", type=float, metavar="E", help="largest relative L2 error of a right row (default: by datatype)"
    )
    group.add_argument(
        "--connections", type=int, default=1024, metavar="N", help="at most, of all generators (default: 1024)"
    )
    group.add_argument(
        "--request-timeout",
        type=options.seconds,
        default=60.0,
        metavar="TIME",
        help="a request that takes longer is unanswered (default: 60s)",
    )
    group.add_argument(
        "--calibration", type=Path, metavar="FILE", help="of headrace calibrate (default: this machine's own)"
    )
    _add_access_options(parser)


def _add_access_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what such a server asks of its clients; results hold these names and no secret")
    group.add_argument(
        "--ca-file",
        type=Path,
        metavar="FILE",
        help="PEM certificates of who vouches for the server (default: those that this system trusts)",
    )
    group.add_argument("--client-cert", type=Path, metavar="FILE", help="PEM chain to show to a server that asks")
    group.add_argument("--client-key", type=Path, metavar="FILE", help="its private key, PEM, without a password")
    group.add_argument("--token-file", type=Path, metavar="FILE", help="holds a bearer token; closed to other users")
    group.add_argument("--token-env", metavar="NAME", help="an environment variable that holds a bearer token")


def target_run_config(args: argparse.Namespace) -> RunConfig:
    """Return the run against a server that the options ask for, validated. Raises InvalidOption."""
    for name in OF_DESIGNS:
        if getattr(args, name):
            raise InvalidOption(f"--{name.replace('_', '-')}: is about a design of ours; leave it out with --url")
    config = RunConfig(
        model=ModelConfig(name=args.model or "null"),
        inputs=InputConfig(kind="random", batch_size=args.batch_size or 1, seed=args.seed),
        load=replace(
            options.load_config(args, num_iters=args.num_iters or NUM_ITERS, warmup_iters=0), keep_answers=False
        ),
        target=TargetConfig(
            url=args.url,
            model=args.model or "",
            version=args.model_version,
            generators=args.generators,
            label=args.label,
            shapes=dict(map(parse_shape, args.shape)),
            int_range=(args.int_range[0], args.int_range[1]),
            distinct=args.distinct,
            same_input=args.same_input,
            input_file=args.input_file,
            reference=args.reference,
            check_model=args.check_model,
            tolerance=args.tolerance,
            connections=args.connections,
            request_timeout_s=args.request_timeout,
            access=AccessConfig(
                ca_file=args.ca_file,
                client_cert=args.client_cert,
                client_key=args.client_key,
                token_file=args.token_file,
                token_env=args.token_env,
            ),
        ),
    )
    config.validate()
    assert config.target is not None
    read_access(config.target)  # refused here, before anything is written
    return config


def parse_shape(text: str) -> tuple[str, tuple[int, ...]]:
    """Read NAME=1,3,224,224. Raises InvalidOption."""
    name, _, sizes = text.partition("=")
    numbers = sizes.split(",")
    if not name or not all(number.isdecimal() and int(number) > 0 for number in numbers):
        raise InvalidOption(f"--shape {text}: write it as NAME=1,3,224,224, every size above 0")
    return name, tuple(map(int, numbers))


def add_calibrate_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `headrace calibrate`."""
    parser.add_argument("--transport", choices=get_args(Transport), default="http", help="(default: http)")
    parser.add_argument("--generators", type=int, default=1, metavar="G", help="processes that send (default: 1)")
    parser.add_argument(
        "--duration", type=options.seconds, default=5.0, metavar="TIME", help="of each measurement (default: 5s)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="(default: where later runs against a URL look for it, under $XDG_STATE_HOME/headrace)",
    )
    parser.add_argument("--json", action="store_true", help="print the calibration as JSON on standard output")


def add_null_server_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `headrace null-server`."""
    parser.add_argument(
        "--law",
        default="null://fixed?service=1ms",
        metavar="URL",
        help="null://fixed?service=2ms&servers=1 or null://exponential?mean=2ms&seed=1; and stall=2s&stall_at=1s,"
        " shed=0.02, wrong=0.01, drop=0.001, cached=1, bytes=1024 (of an input row),"
        " transport=grpc",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free (default: 8000)")
