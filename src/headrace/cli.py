"""The command `headrace`: reads options, calls the benchmark, shows what came out. The only place that exits."""

from __future__ import annotations

import argparse
import difflib
import importlib
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from headrace import __version__
from headrace.errors import HeadraceError
from headrace.screen import Screen

INTERRUPTED = 130  # as shells report SIGINT
TERMINATED = 143

Command = Callable[[argparse.Namespace, Screen], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 good, 1 failed, 2 wrong options, 130 interrupted."""
    words = sys.argv[1:] if argv is None else argv
    args = build_parser(words[:1]).parse_args(words)
    _exit_with(args.command, args)


def main_published(argv: Sequence[str] | None = None) -> None:
    """Run the published command line of `server.py` and exit."""
    args = published_arguments(argv)
    _exit_with(args.command, args)


def _exit_with(command: Command, args: argparse.Namespace) -> None:
    screen = Screen()
    signal.signal(signal.SIGTERM, _terminate)
    try:
        command(args, screen)
    except HeadraceError as error:
        screen.err.print(f"headrace: {error}", style="bold red", highlight=False, markup=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        result = getattr(args, "interrupted", "no result was written")
        screen.err.print(f"headrace: interrupted; every process was stopped, {result}", style="bold red")
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        sys.exit(1)


def _terminate(_signal: int, _frame: object) -> None:
    """On SIGTERM leave through the same clean-up as on any error."""
    sys.exit(TERMINATED)


class _Parser(argparse.ArgumentParser):
    """Names the nearest right option to a wrong one."""

    def parse_known_args(  # type: ignore[override]  # narrower: with the one kind of namespace that we use
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        known, left = super().parse_known_args(args, namespace)
        for word in left:
            near = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions, n=1)
            if word.startswith("--") and near:
                self.error(f"there is no option {word}; did you mean {near[0]}?")
        return known, left


def build_parser(only: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """Return the parser of all commands. Where `only` names some, the others are named but know no options.

    Their modules are then not imported, which would take longer than all else that `headrace serve` does here.
    """
    parser = _Parser(
        prog="headrace",
        description="Serve PyTorch models from Python, and measure it so that it can be believed.",
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (add, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        if only is None or name in only:
            _adder(add)(command)
    return parser


def _adder(place: str) -> Callable[[argparse.ArgumentParser], None]:
    """Return what adds a command's options, from "module:function" of `headrace.commands`."""
    module, _, function = place.partition(":")
    adder: Callable[[argparse.ArgumentParser], None] = getattr(
        importlib.import_module(f"headrace.commands.{module}"), function
    )
    return adder


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
    _adder(COMMANDS["bench"][0])(bench)
    args = bench.parse_args([])
    vars(args).update(vars(given), output_file=Path("results") / given.output_file)
    return args


COMMANDS = {  # what adds its options, and what it does
    "serve": ("serving:add_serve", "serve models over HTTP and gRPC, by the KServe v2 protocol"),
    "deploy": ("serving:add_deploy", "serve a model on a Ray cluster, by Ray Serve; needs the extra ray"),
    "config": (
        "serving:add_config",
        "print the server that file, environment and options describe, and where each value is from",
    ),
    "bench": ("measuring:add_bench", "measure one design, or any server by its URL, once"),
    "capacity": (
        "searching:add_capacity",
        "find the highest rate at which the p99 of a design or a server stays within a bound, and latency below it",
    ),
    "tune": (
        "searching:add_tune",
        "find the options of the lanes that answer most within a latency bound, and write a deployment of them",
    ),
    "calibrate": (
        "measuring:add_calibrate",
        "measure what the harness itself is worth here, against a server of known law",
    ),
    "referee": (
        "searching:add_referee",
        "measure one server under several load generators, and say where they disagree",
    ),
    "null-server": ("measuring:add_null_server", "serve a known law over HTTP, to try load generators against"),
    "sweep": (
        "studying:add_sweep",
        "measure many combinations, each in fresh processes, interleaved; goes on where it stopped",
    ),
    "tables": ("studying:add_tables", "write the published tables, and wider ones, from finished runs"),
    "compare": ("studying:add_compare", "say which of two sets of runs is better, and how sure that is"),
    "findings": ("studying:add_findings", "set each published finding beside what a sweep of yours showed"),
    "report": (
        "studying:add_report",
        "show what finished runs say, as one page with tables and plots, made from their raw files",
    ),
    "limits": (
        "measuring:add_limits",
        "measure what no server of a model can exceed on this machine: copies, forward, messages",
    ),
    "plan": (
        "searching:add_plan",
        "say how many GPUs a rate needs within a bound, from measured runs, and how sure that is",
    ),
    "classify": ("measuring:add_classify", "send photographs through a server and show the labels it gives them"),
    "checkpoint": (
        "measuring:add_checkpoint",
        "make a checkpoint with random weights, for a machine without a network",
    ),
}
