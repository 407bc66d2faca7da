"""The command `headrace`: reads options, calls the benchmark, shows what came out. The only place that exits."""

from __future__ import annotations

import argparse
import difflib
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TextIO

import numpy as np
from rich.console import Console
from rich.markdown import Markdown

from headrace import (
    __version__,
    capacity_options,
    deployment_text,
    limits_options,
    options,
    plan_options,
    ray_options,
    referee_options,
    serve_options,
    target_options,
    tune_options,
)
from headrace.bench import calibration, columns, limits_run, limits_tables, present, run
from headrace.bench.classify import classify_config, read_labels
from headrace.bench.output import CsvLog
from headrace.bench.summary import RunSummary, encode
from headrace.config import DESIGN_NAMES, DesignConfig, ModelConfig, RunConfig
from headrace.errors import HeadraceError, RunFailed
from headrace.frontend import tracing
from headrace.frontend.auth import require_usable
from headrace.frontend_job import access_settings, tracing_settings
from headrace.gpus import require_free_memory, unlike_note
from headrace.planning import picture
from headrace.planning import tables as plan_tables
from headrace.planning.observe import read_runs
from headrace.planning.plan import CapacityPlan, make_plan
from headrace.referee import report as referee_report
from headrace.referee.run import referee
from headrace.report import markdown as report_markdown
from headrace.report import model as report_model
from headrace.report import page as report_page
from headrace.search import capacity_report, tune_report
from headrace.search.find import find_capacity, find_options
from headrace.search.measure import Place
from headrace.search.progress import SearchProgress
from headrace.study import compare, compare_page, compare_report
from headrace.study.execute import BenchCommand, SubprocessExecutor
from headrace.study.findings import render_findings
from headrace.study.finished import load_runs, missing_runs, write_atomically
from headrace.study.progress import RichSweepProgress
from headrace.study.sweep import run_sweep
from headrace.study.tables import write_tables
from headrace.study.verdict import THRESHOLD
from headrace.supervisor import Supervisor
from headrace.target import calibrate, live, null_server
from headrace.target.law import parse_law
from headrace.target.run import Files, run_target

INTERRUPTED = 130  # as shells report SIGINT
TERMINATED = 143
FILE_WIDTH = 120  # columns

Command = Callable[[argparse.Namespace, "Screen"], None]


class Screen:
    """Results go to standard output, everything else to standard error."""

    def __init__(self) -> None:
        self.out = Console(soft_wrap=False, width=_width(sys.stdout))
        self.err = Console(stderr=True, width=_width(sys.stderr))

    def tell(self, text: str) -> None:
        """Print a sentence for the person who started the command, as it is."""
        self.err.print(text, highlight=False, markup=False, soft_wrap=True)

    def remark(self, summary: RunSummary) -> None:
        """Print what a reader of a run's numbers must know."""
        for mark in summary.marks:
            self.out.print(f"mark: {mark}", style="bold yellow", highlight=False, markup=False)
        for note in summary.notes:
            self.out.print(f"note: {note}", style="yellow", highlight=False, markup=False)


def _width(stream: TextIO) -> int | None:
    """Return how wide tables are in a file or a pipe; None leaves it to the terminal, or to COLUMNS."""
    return None if stream.isatty() or "COLUMNS" in os.environ else FILE_WIDTH


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


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="headrace",
        description="Serve PyTorch models from Python, and measure it so that it can be believed.",
    )
    parser.add_argument("--version", action="version", version=f"headrace {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (add, text) in COMMANDS.items():
        add(commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}."))
    return parser


def _add_bench(parser: argparse.ArgumentParser) -> None:
    options.add_design_options(parser)
    options.add_model_options(parser)
    options.add_load_options(parser)
    options.add_output_options(parser)
    target_options.add_target_options(parser)
    usual = {name: parser.get_default(name) for name in ("model", "batch_size")}
    parser.set_defaults(command=_bench, of_designs=usual, **dict.fromkeys(usual))  # with --url there is no usual one


def _bench(args: argparse.Namespace, screen: Screen) -> None:
    if args.url is not None:
        _bench_target(args, screen)
        return
    for name, usual in args.of_designs.items():
        if getattr(args, name) is None:
            setattr(args, name, usual)
    config = options.run_config(args)
    csv = CsvLog(args.output_file, columns.COLUMNS) if args.output_file else None
    if csv:
        csv.prepare()
    label = f"{config.experiment}-b{config.inputs.batch_size}"
    output_dir = args.output_dir or options.default_output_dir(label)
    files = run.RunFiles(
        output_dir=output_dir,
        overwrite=args.overwrite,
        reference_cache=args.reference_cache,
        exclusive=args.exclusive,
    )
    summary = measure(config, files, screen)
    if csv and summary.error is None:
        csv.append(columns.row(summary))
    show(summary, output_dir, screen, as_json=args.json)
    run.raise_for(summary)


def _bench_target(args: argparse.Namespace, screen: Screen) -> None:
    config = target_options.target_run_config(args)
    output_dir = args.output_dir or options.default_output_dir(config.experiment.replace("/", "-"))
    files = Files(output_dir=output_dir, overwrite=args.overwrite, calibration=args.calibration)
    csv = CsvLog(args.output_file, columns.COLUMNS) if args.output_file else None
    if csv:
        csv.prepare()
    with live.LiveWatcher(screen.err) as watcher:
        summary = run_target(config, files, ("headrace", *sys.argv[1:]), watcher).summary
    if csv and summary.error is None:
        csv.append(columns.row(summary))
    if args.json:
        sys.stdout.write(encode(summary).decode())
    else:
        screen.out.print(live.target_table(summary))
        screen.remark(summary)
        screen.out.print(f"files: {output_dir}/ (summary.json, requests.parquet)", highlight=False, markup=False)
    run.raise_for(summary)


def _add_null_server(parser: argparse.ArgumentParser) -> None:
    target_options.add_null_server_options(parser)
    parser.set_defaults(command=_null_server)


def _null_server(args: argparse.Namespace, screen: Screen) -> None:
    law = parse_law(args.law)
    listener = null_server.listen(args.host, args.port)
    host, port = listener.getsockname()[:2]
    screen.tell(f"ready: http://{host}:{port}/, model null, law {args.law}; log at {null_server.LOG_PATH}")
    null_server.NullServer(law, listener).serve()


def _add_calibrate(parser: argparse.ArgumentParser) -> None:
    target_options.add_calibrate_options(parser)
    parser.set_defaults(command=_calibrate)


def _calibrate(args: argparse.Namespace, screen: Screen) -> None:
    with live.LiveWatcher(screen.err) as watcher:
        made = calibrate.calibrate(args.generators, args.duration, watcher)
    path = args.output or calibration.default_path(made.machine)
    calibration.save(made, path)
    if made.warning is not None:
        screen.tell(f"note: {made.warning}")
    if args.json:
        sys.stdout.write(encode(made).decode())
        return
    for table in live.calibration_tables(made):
        screen.out.print(table)
    screen.out.print(f"file: {path}", highlight=False, markup=False, soft_wrap=True)


def _add_referee(parser: argparse.ArgumentParser) -> None:
    referee_options.add_referee_options(parser)
    parser.set_defaults(command=_referee)


def _referee(args: argparse.Namespace, screen: Screen) -> None:
    asking = referee_options.asking(args)
    output_dir = args.output_dir or options.default_output_dir("referee")
    with live.LiveWatcher(screen.err) as watcher:
        made = referee(asking, output_dir, ("headrace", *sys.argv[1:]), watcher, overwrite=args.overwrite)
    if args.json:
        sys.stdout.write(encode(made).decode())
        return
    for judged, table in zip(made.cases, referee_report.tables(made), strict=True):
        screen.out.print(table)
        for sentence in judged.disagreements:
            screen.out.print(f"disagreement: {sentence}", style="yellow", highlight=False, markup=False)
    for note in made.notes:
        screen.out.print(f"note: {note}", style="yellow", highlight=False, markup=False)
    files = f"{referee_report.JSON_NAME}, {referee_report.PAGE_NAME}"
    screen.out.print(f"files: {output_dir}/ ({files}, and a folder for each load)", highlight=False, soft_wrap=True)


def _add_capacity(parser: argparse.ArgumentParser) -> None:
    capacity_options.add_capacity_options(parser)
    parser.set_defaults(command=_capacity, interrupted="the runs that ended stay in the folder")


def _capacity(args: argparse.Namespace, screen: Screen) -> None:
    config = capacity_options.run_config(args)
    how = capacity_options.search_config(args, config)
    folder = args.output_dir or options.default_output_dir("capacity-" + config.experiment.replace("/", "-"))
    place = Place(folder=folder, command=("headrace", *sys.argv[1:]), calibration=args.calibration)
    with SearchProgress(screen.err) as progress:
        report = find_capacity(config, how, place, progress, overwrite=args.overwrite)
    if args.json:
        sys.stdout.write(encode(report).decode())
    else:
        _print_page(capacity_report.page(report), screen)
        screen.tell(f"files: {folder}/ ({capacity_report.FILE_NAME}, {capacity_report.PAGE_NAME}, trials/)")


def _add_tune(parser: argparse.ArgumentParser) -> None:
    tune_options.add_tune_options(parser)
    parser.set_defaults(command=_tune, interrupted="the runs that ended stay in the folder")


def _tune(args: argparse.Namespace, screen: Screen) -> None:
    config, configure = tune_options.tune_config(args), tune_options.configurer(args)
    configure(next(config.space.choices()))  # refused here, before anything is written
    folder = args.output_dir or options.default_output_dir("tune")
    place = Place(folder=folder, command=("headrace", *sys.argv[1:]))
    with SearchProgress(screen.err) as progress:
        report = find_options(configure, config, place, progress, overwrite=args.overwrite)
    if args.json:
        sys.stdout.write(encode(report).decode())
    else:
        _print_page(tune_report.page(report), screen)
        deployment = folder / tune_report.DEPLOYMENT_NAME
        screen.tell(f"files: {folder}/; serve the winner with: headrace serve --config {deployment}")


def measure(config: RunConfig, files: run.RunFiles, screen: Screen) -> RunSummary:
    with present.RichWatcher(screen.err) as watcher:
        return run.run_benchmark(config, files, ("headrace", *sys.argv[1:]), watcher)


def show(summary: RunSummary, output_dir: Path, screen: Screen, *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(encode(summary).decode())
        return
    screen.out.print(present.summary_table(summary))
    screen.remark(summary)
    screen.out.print(f"files: {output_dir}/ (summary.json, requests.parquet, telemetry.parquet)", highlight=False)


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    options.add_sweep_options(parser)
    options.add_model_options(parser)
    options.add_load_options(parser)
    parser.set_defaults(command=_sweep, interrupted="finished runs stay, and the same command goes on from here")


def _sweep(args: argparse.Namespace, screen: Screen) -> None:
    config = options.sweep_config(args)
    execute = SubprocessExecutor(command=BenchCommand(config), time_limit_s=args.run_timeout)
    with RichSweepProgress(screen.err) as progress:
        outcome = run_sweep(config, args.output_dir, execute, progress)
    for left in outcome.left_out:
        compiled = "compiled" if left.compile else "not compiled"
        what = f"{left.design} with {left.num_workers} workers, {compiled}"
        screen.err.print(f"left out: {what}: {left.reason}", highlight=False, markup=False, soft_wrap=True)
    screen.out.print(f"{outcome.succeeded} runs are good; tables: {args.output_dir}/tables/all.md", highlight=False)
    if outcome.failures:
        raise RunFailed(
            f"{len(outcome.failures)} runs failed, the first with: {outcome.failures[0].error};"
            " the same command tries them again"
        )


def _add_tables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of a sweep, of several sweeps, or of runs")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="(default: FOLDER/tables)")
    parser.set_defaults(command=_tables)


def _tables(args: argparse.Namespace, screen: Screen) -> None:
    runs = load_runs(args.folder)
    for path in write_tables(runs, args.output_dir or args.folder / "tables", missing_runs(args.folder)):
        screen.out.print(str(path), highlight=False, soft_wrap=True)


def _add_compare(parser: argparse.ArgumentParser) -> None:
    kinds = "folder of a run or a sweep; FOLDER:EXPERIMENT takes one experiment, as results/sweep:2_predict_workers"
    parser.add_argument("base", metavar="BASE", help=kinds)
    parser.add_argument("candidate", metavar="CANDIDATE", help="likewise")
    parser.add_argument(
        "--threshold",
        type=float,
        default=THRESHOLD,
        help="smallest ratio that matters (default: 0.02)",
    )
    parser.add_argument(
        "--bound",
        type=options.seconds,
        metavar="TIME",
        help="compare goodput too: samples answered within it, as 20ms, per second (default: the runs' own, if any)",
    )
    parser.add_argument("--allow-unlike", action="store_true", help="compare although more than the design differs")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--changelog", action="store_true", help="print an entry for a changelog (Keep a Changelog)")
    parser.set_defaults(command=_compare)


def _compare(args: argparse.Namespace, screen: Screen) -> None:
    base, candidate = (compare.load_side(compare.parse_selection(text)) for text in (args.base, args.candidate))
    result = compare.compare(
        base, candidate, threshold=args.threshold, bound_s=args.bound, allow_unlike=args.allow_unlike
    )
    if args.json:
        sys.stdout.write(compare_report.render_json(result))
    elif args.changelog:
        sys.stdout.write(compare_page.render_changelog(result))
    else:
        _print_page(compare_page.render_markdown(result), screen)


def _add_findings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of a sweep of the published designs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page there, as Markdown")
    parser.set_defaults(command=_findings)


def _findings(args: argparse.Namespace, screen: Screen) -> None:
    page = render_findings(load_runs(args.folder))
    if args.output:
        write_atomically(args.output, page)
        screen.out.print(str(args.output), highlight=False, soft_wrap=True)
    else:
        _print_page(page, screen)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, of sweeps, or of several")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: report.html, unless --markdown)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write its tables there, as Markdown")
    parser.add_argument("--title", help="(default: the names of the folders)")
    parser.add_argument(
        "--bound", type=options.seconds, metavar="TIME", help="count what was answered within it, as 20ms, as goodput"
    )
    parser.set_defaults(command=_report)


def _report(args: argparse.Namespace, screen: Screen) -> None:
    if args.output is None and args.markdown is None:
        args.output = Path("report.html")
    with limits_tables.RichSteps(screen.err) as watcher:
        step = partial(watcher.step, "reading runs") if screen.err.is_terminal else None
        report = report_model.build(args.runs, title=args.title, bound_s=args.bound, step=step)
    for lost in report.unreadable:
        screen.tell(f"left out: {lost.name}: {lost.reason}")
    for path, render in ((args.output, report_page.render), (args.markdown, report_markdown.render)):
        if path is not None:
            write_atomically(path, render(report))
            screen.out.print(str(path), highlight=False, soft_wrap=True)


def _print_page(page: str, screen: Screen) -> None:
    """Show Markdown as tables on a terminal, and as it is to a file or a pipe."""
    if screen.out.is_terminal:
        screen.out.print(Markdown(page))
    else:
        sys.stdout.write(page)


def _add_serve(parser: argparse.ArgumentParser) -> None:
    serve_options.add_serve_options(parser)
    parser.set_defaults(command=_serve)


def _serve(args: argparse.Namespace, screen: Screen) -> None:
    deployment = serve_options.deployment(args)
    for note in deployment.notes:
        screen.tell(note)
    config = deployment.config()
    require_usable(access_settings(config))
    traced = tracing_settings(config)
    if traced is not None:
        tracing.require_usable(traced)
    require_free_memory(config.gpus)
    unlike = unlike_note(config.gpus)
    if unlike is not None:
        screen.tell(unlike)
    Supervisor(config, screen.tell).run()


def _add_deploy(parser: argparse.ArgumentParser) -> None:
    ray_options.add_ray_options(parser)
    parser.set_defaults(command=_deploy, interrupted="what Ray was told stays")


def _deploy(args: argparse.Namespace, screen: Screen) -> None:
    deployment = ray_options.ray_deployment(args)
    from headrace.ray_serve.launch import deploy  # noqa: PLC0415  Ray, an extra, and torch

    deploy(deployment, screen.tell)


def _add_config(parser: argparse.ArgumentParser) -> None:
    serve_options.add_serve_options(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, with what is found out at the start filled in")
    parser.set_defaults(command=_config)


def _config(args: argparse.Namespace, screen: Screen) -> None:
    deployment = serve_options.deployment(args)
    for note in deployment.notes:
        screen.tell(note)
    deployment.config()  # refused here as it would be by `serve`
    sys.stdout.write(deployment_text.as_json(deployment) if args.json else deployment_text.as_toml(deployment))


def _add_classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photographs", nargs="*", type=Path, help="image files (default: some that scikit-image ships)")
    parser.add_argument("--design", default="h2d_d2h_threads", metavar="NAME", help=", ".join(DESIGN_NAMES))
    parser.add_argument("--num-workers", type=int, default=1, metavar="N", help="predict threads (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="for all files of the run (default: none kept)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that exists")
    parser.set_defaults(command=_classify)


def _classify(args: argparse.Namespace, screen: Screen) -> None:
    from headrace.bench.inputs import photograph_files  # noqa: PLC0415  torch, which other commands need not load
    from headrace.model.efficientnet_lite0 import category_names  # noqa: PLC0415

    photographs = args.photographs or list(photograph_files().values())
    design = DesignConfig(name=args.design, num_workers=args.num_workers)
    config = classify_config(photographs, options.resolve_device(args.device), design)
    with tempfile.TemporaryDirectory(prefix="headrace-") as folder:
        output_dir = args.output_dir or Path(folder) / "run"
        summary = measure(config, run.RunFiles(output_dir=output_dir, overwrite=args.overwrite), screen)
        run.raise_for(summary)
        labelled = read_labels(photographs, np.load(output_dir / "answers.npy"), category_names())
    screen.out.print(present.label_table(labelled, summary))


def _add_limits(parser: argparse.ArgumentParser) -> None:
    limits_options.add_limits_options(parser)
    parser.set_defaults(command=_limits)


def _limits(args: argparse.Namespace, screen: Screen) -> None:
    config = limits_options.limits_config(args)
    output_dir = args.output_dir or options.default_output_dir("limits")
    command = ("headrace", *sys.argv[1:])
    with limits_tables.RichSteps(screen.err) as watcher:
        outcome = limits_run.run_limits(config, output_dir, command, watcher, overwrite=args.overwrite)
    if args.json:
        sys.stdout.write(encode(outcome.report).decode())
    else:
        for table in limits_tables.tables(outcome.report):
            screen.out.print(table)
    for note in (*outcome.report.notes, *outcome.missing):
        (screen.err if args.json else screen.out).print(f"note: {note}", style="yellow", highlight=False, markup=False)
    if not args.json:
        screen.out.print(f"files: {output_dir}/ ({', '.join(outcome.files)})", highlight=False, soft_wrap=True)


def _add_plan(parser: argparse.ArgumentParser) -> None:
    plan_options.add_plan_options(parser)
    parser.set_defaults(command=_plan)


def _plan(args: argparse.Namespace, screen: Screen) -> None:
    ask = plan_options.ask(args)
    plan = make_plan(read_runs(args.runs), ask, args.rows, args.lanes or (), pauses=args.pauses)
    if args.output_dir is not None:
        _write_plan(plan, args.output_dir, screen)
    if args.json:
        sys.stdout.write(encode(plan).decode())
        return
    for words in plan_tables.all_tables(plan):
        screen.out.print(plan_tables.for_terminal(words))
    for note in (*plan.notes, *plan_tables.pause_notes(plan)):
        screen.out.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _write_plan(plan: CapacityPlan, folder: Path, screen: Screen) -> None:
    write_atomically(folder / "capacity.json", encode(plan).decode())
    write_atomically(folder / "capacity.md", plan_tables.as_markdown(plan, ("headrace", *sys.argv[1:])))
    if not picture.draw(plan, folder / "capacity.png"):
        screen.tell("capacity.png was not drawn: matplotlib is missing; install headrace[plots]")
    screen.tell(f"files: {folder}/ (capacity.md, capacity.json, capacity.png)")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="a torchvision model (default: resnet18)")
    parser.add_argument("--model-dir", type=Path, default=Path(), metavar="DIR", help="where to put it (default: .)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.set_defaults(command=_checkpoint)


def _checkpoint(args: argparse.Namespace, screen: Screen) -> None:
    from headrace.model.checkpoint import make_random_checkpoint, random_checkpoint_path  # noqa: PLC0415  torch

    path = random_checkpoint_path(ModelConfig(name=args.model, model_dir=args.model_dir, seed=args.seed))
    make_random_checkpoint(args.model, path, args.seed)
    screen.out.print(f"{path}: random weights (seed {args.seed}) for {args.model}; labels mean nothing", soft_wrap=True)


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


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "serve": (_add_serve, "serve models over HTTP and gRPC, by the KServe v2 protocol"),
    "deploy": (_add_deploy, "serve a model on a Ray cluster, by Ray Serve; needs the extra ray"),
    "config": (
        _add_config,
        "print the server that file, environment and options describe, and where each value is from",
    ),
    "bench": (_add_bench, "measure one design, or any server by its URL, once"),
    "capacity": (
        _add_capacity,
        "find the highest rate at which the p99 of a design or a server stays within a bound, and latency below it",
    ),
    "tune": (
        _add_tune,
        "find the options of the lanes that answer most within a latency bound, and write a deployment of them",
    ),
    "calibrate": (_add_calibrate, "measure what the harness itself is worth here, against a server of known law"),
    "referee": (_add_referee, "measure one server under several load generators, and say where they disagree"),
    "null-server": (_add_null_server, "serve a known law over HTTP, to try load generators against"),
    "sweep": (
        _add_sweep,
        "measure many combinations, each in fresh processes, interleaved; goes on where it stopped",
    ),
    "tables": (_add_tables, "write the published tables, and wider ones, from finished runs"),
    "compare": (_add_compare, "say which of two sets of runs is better, and how sure that is"),
    "findings": (_add_findings, "set each published finding beside what a sweep of yours showed"),
    "report": (
        _add_report,
        "show what finished runs say, as one page with tables and plots, made from their raw files",
    ),
    "limits": (_add_limits, "measure what no server of a model can exceed on this machine: copies, forward, messages"),
    "plan": (_add_plan, "say how many GPUs a rate needs within a bound, from measured runs, and how sure that is"),
    "classify": (_add_classify, "send photographs through a server and show the labels it gives them"),
    "checkpoint": (_add_checkpoint, "make a checkpoint with random weights, for a machine without a network"),
}
