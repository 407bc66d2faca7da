"""What is done with many runs: `sweep`, `tables`, `compare`, `findings`, `report`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from headrace import (
    options,
)
from headrace.bench import limits_tables
from headrace.errors import RunFailed
from headrace.files import write_whole
from headrace.report import markdown as report_markdown
from headrace.report import model as report_model
from headrace.report import page as report_page
from headrace.screen import Screen, print_page
from headrace.study import compare, compare_page, compare_report
from headrace.study.execute import BenchCommand, SubprocessExecutor
from headrace.study.findings import render_findings
from headrace.study.finished import load_runs, missing_runs
from headrace.study.progress import RichSweepProgress
from headrace.study.sweep import run_sweep
from headrace.study.tables import write_tables
from headrace.study.verdict import THRESHOLD


def add_sweep(parser: argparse.ArgumentParser) -> None:
    options.add_sweep_options(parser)
    options.add_model_options(parser)
    options.add_load_options(parser)
    parser.set_defaults(command=do_sweep, interrupted="finished runs stay, and the same command goes on from here")


def do_sweep(args: argparse.Namespace, screen: Screen) -> None:
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


def add_tables(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of a sweep, of several sweeps, or of runs")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="(default: FOLDER/tables)")
    parser.set_defaults(command=do_tables)


def do_tables(args: argparse.Namespace, screen: Screen) -> None:
    runs = load_runs(args.folder)
    for path in write_tables(runs, args.output_dir or args.folder / "tables", missing_runs(args.folder)):
        screen.out.print(str(path), highlight=False, soft_wrap=True)


def add_compare(parser: argparse.ArgumentParser) -> None:
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
    parser.set_defaults(command=do_compare)


def do_compare(args: argparse.Namespace, screen: Screen) -> None:
    base, candidate = (compare.load_side(compare.parse_selection(text)) for text in (args.base, args.candidate))
    result = compare.compare(
        base, candidate, threshold=args.threshold, bound_s=args.bound, allow_unlike=args.allow_unlike
    )
    if args.json:
        sys.stdout.write(compare_report.render_json(result))
    elif args.changelog:
        sys.stdout.write(compare_page.render_changelog(result))
    else:
        print_page(compare_page.render_markdown(result), screen)


def add_findings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of a sweep of the published designs")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the page there, as Markdown")
    parser.set_defaults(command=do_findings)


def do_findings(args: argparse.Namespace, screen: Screen) -> None:
    page = render_findings(load_runs(args.folder))
    if args.output:
        write_whole(args.output, page)
        screen.out.print(str(args.output), highlight=False, soft_wrap=True)
    else:
        print_page(page, screen)


def add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUNS", help="folders of runs, of sweeps, or of several")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (default: report.html, unless --markdown)"
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write its tables there, as Markdown")
    parser.add_argument("--title", help="(default: the names of the folders)")
    parser.add_argument(
        "--bound", type=options.seconds, metavar="TIME", help="count what was answered within it, as 20ms, as goodput"
    )
    parser.set_defaults(command=do_report)


def do_report(args: argparse.Namespace, screen: Screen) -> None:
    if args.output is None and args.markdown is None:
        args.output = Path("report.html")
    with limits_tables.RichSteps(screen.err) as watcher:
        step = partial(watcher.step, "reading runs") if screen.err.is_terminal else None
        report = report_model.build(args.runs, title=args.title, bound_s=args.bound, step=step)
    for lost in report.unreadable:
        screen.tell(f"left out: {lost.name}: {lost.reason}")
    for path, render in ((args.output, report_page.render), (args.markdown, report_markdown.render)):
        if path is not None:
            write_whole(path, render(report))
            screen.out.print(str(path), highlight=False, soft_wrap=True)
