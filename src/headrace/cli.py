"""The command `headrace`: reads options, calls the benchmark, shows what came out. The only place that exits."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from headrace import __version__, options
from headrace.bench import columns, present, run
from headrace.bench.output import CsvLog
from headrace.bench.summary import RunSummary, encode
from headrace.config import ModelConfig, RunConfig
from headrace.errors import HeadraceError

INTERRUPTED = 130  # as shells report SIGINT
TERMINATED = 143

Command = Callable[[argparse.Namespace, "Screen"], None]


class Screen:
    """Results go to standard output, everything else to standard error."""

    def __init__(self) -> None:
        self.out = Console(soft_wrap=False)
        self.err = Console(stderr=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 good, 1 failed, 2 wrong options, 130 interrupted."""
    args = build_parser().parse_args(argv)
    _exit_with(args.command, args)


def main_published(argv: Sequence[str] | None = None) -> None:
    """Run the published command line of `server.py` and exit."""
    _exit_with(_bench, published_arguments(argv))


def _exit_with(command: Command, args: argparse.Namespace) -> None:
    screen = Screen()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command(args, screen)
    except HeadraceError as error:
        screen.err.print(f"headrace: {error}", style="bold red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        screen.err.print("headrace: interrupted; every process was stopped, no result was written", style="bold red")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        sys.exit(1)


def _terminate(signum: int, frame: object) -> None:
    """On SIGTERM leave through the same clean-up as on any error."""
    sys.exit(TERMINATED)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headrace",
        description="Serve PyTorch models from Python, and measure it so that it can be believed.",
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_bench(commands.add_parser("bench", help="measure one design once", description="Measure one design once."))
    _add_checkpoint(
        commands.add_parser("checkpoint", help="make a checkpoint with random weights, for machines without a network")
    )
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    options.add_design_options(parser)
    options.add_model_options(parser)
    options.add_load_options(parser)
    options.add_output_options(parser)
    parser.set_defaults(command=_bench)


def _bench(args: argparse.Namespace, screen: Screen) -> None:
    config = options.run_config(args)
    csv = CsvLog(args.output_file, columns.COLUMNS) if args.output_file else None
    if csv:
        csv.prepare()
    label = f"{config.design.experiment}-b{config.inputs.batch_size}"
    output_dir = args.output_dir or options.default_output_dir(label)
    files = run.RunFiles(output_dir=output_dir, overwrite=args.overwrite, reference_cache=args.reference_cache)
    summary = measure(config, files, screen)
    if csv and summary.error is None:
        csv.append(columns.row(summary))
    show(summary, output_dir, screen, as_json=args.json)
    run.raise_for(summary)


def measure(config: RunConfig, files: run.RunFiles, screen: Screen) -> RunSummary:
    with present.RichWatcher(screen.err) as watcher:
        return run.run_benchmark(config, files, ("headrace", *sys.argv[1:]), watcher)


def show(summary: RunSummary, output_dir: Path, screen: Screen, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(encode(summary).decode())
        return
    screen.out.print(present.summary_table(summary))
    for note in summary.notes:
        screen.out.print(f"note: {note}", style="yellow", highlight=False)
    screen.out.print(f"files: {output_dir}/ (summary.json, requests.parquet, telemetry.parquet)", highlight=False)


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="a torchvision model (default: resnet18)")
    parser.add_argument("--model-dir", type=Path, default=Path(), metavar="DIR", help="where to put it (default: .)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.set_defaults(command=_checkpoint)


def _checkpoint(args: argparse.Namespace, screen: Screen) -> None:
    from headrace.model.checkpoint import ensure_checkpoint  # noqa: PLC0415  torch, which other commands need not load

    config = ModelConfig(name=args.model, model_dir=args.model_dir, seed=args.seed, download=False)
    checkpoint = ensure_checkpoint(config, lambda text: screen.err.print(text, highlight=False))
    if checkpoint is None:
        raise HeadraceError(f"--model {args.model}: brings its own weights and needs no checkpoint")
    screen.out.print(str(checkpoint.path), highlight=False)


def published_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the published options, words with underscores, and fill in the rest of `headrace bench`'s."""
    parser = argparse.ArgumentParser(description="The published benchmark's command line, measured by Headrace.")
    parser.add_argument("--num_iters", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--model_dir", type=Path, default=Path())
    parser.add_argument("--compile", default=True, action=argparse.BooleanOptionalAction)
    parser.add_argument("--output_file", type=Path, default=Path("output.csv"), help="under ./results, as published")
    parser.add_argument("--profile", default=False, action=argparse.BooleanOptionalAction)
    parser.add_argument(
        "--num_workers",
        type=int,
        help="(default: 4 as published; 1 with --compile, which is not safe with several threads)",
    )
    parser.add_argument("--design", default="h2d_d2h_threads", help="the published design to run (default: the last)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    given = parser.parse_args(argv)
    if given.num_workers is None:
        several = given.design == "h2d_d2h_threads" and not given.compile
        given.num_workers = 4 if several else 1
    bench = argparse.ArgumentParser()
    _add_bench(bench)
    args = bench.parse_args([])
    vars(args).update(vars(given), output_file=Path("results") / given.output_file)
    return args


