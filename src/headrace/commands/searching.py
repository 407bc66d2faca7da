"""What measures until it knows an answer, and what plans from it: `capacity`, `tune`, `referee`, `plan`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from headrace import (
    capacity_options,
    options,
    plan_options,
    referee_options,
    tune_options,
)
from headrace.bench.summary import encode
from headrace.files import write_whole
from headrace.planning import picture
from headrace.planning import tables as plan_tables
from headrace.planning.observe import read_runs
from headrace.planning.plan import CapacityPlan, make_plan
from headrace.referee import report as referee_report
from headrace.referee.run import referee
from headrace.screen import Screen, print_page
from headrace.search import capacity_report, tune_report
from headrace.search.find import find_capacity, find_options
from headrace.search.measure import Place
from headrace.search.progress import SearchProgress
from headrace.target import live


def add_capacity(parser: argparse.ArgumentParser) -> None:
    capacity_options.add_capacity_options(parser)
    parser.set_defaults(command=do_capacity, interrupted="the runs that ended stay in the folder")


def do_capacity(args: argparse.Namespace, screen: Screen) -> None:
    config = capacity_options.run_config(args)
    how = capacity_options.search_config(args, config)
    folder = args.output_dir or options.default_output_dir("capacity-" + config.experiment.replace("/", "-"))
    place = Place(folder=folder, command=("headrace", *sys.argv[1:]), calibration=args.calibration)
    with SearchProgress(screen.err) as progress:
        report = find_capacity(config, how, place, progress, overwrite=args.overwrite)
    if args.json:
        sys.stdout.write(encode(report).decode())
    else:
        print_page(capacity_report.page(report), screen)
        screen.tell(f"files: {folder}/ ({capacity_report.FILE_NAME}, {capacity_report.PAGE_NAME}, trials/)")


def add_tune(parser: argparse.ArgumentParser) -> None:
    tune_options.add_tune_options(parser)
    parser.set_defaults(command=do_tune, interrupted="the runs that ended stay in the folder")


def do_tune(args: argparse.Namespace, screen: Screen) -> None:
    config, configure = tune_options.tune_config(args), tune_options.configurer(args)
    configure(next(config.space.choices()))  # refused here, before anything is written
    folder = args.output_dir or options.default_output_dir("tune")
    place = Place(folder=folder, command=("headrace", *sys.argv[1:]))
    with SearchProgress(screen.err) as progress:
        report = find_options(configure, config, place, progress, overwrite=args.overwrite)
    if args.json:
        sys.stdout.write(encode(report).decode())
    else:
        print_page(tune_report.page(report), screen)
        deployment = folder / tune_report.DEPLOYMENT_NAME
        screen.tell(f"files: {folder}/; serve the winner with: headrace serve --config {deployment}")


def add_referee(parser: argparse.ArgumentParser) -> None:
    referee_options.add_referee_options(parser)
    parser.set_defaults(command=do_referee)


def do_referee(args: argparse.Namespace, screen: Screen) -> None:
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


def add_plan(parser: argparse.ArgumentParser) -> None:
    plan_options.add_plan_options(parser)
    parser.set_defaults(command=do_plan)


def do_plan(args: argparse.Namespace, screen: Screen) -> None:
    ask = plan_options.ask(args)
    plan = make_plan(read_runs(args.runs), ask, args.rows, args.lanes or (), pauses=args.pauses)
    if args.output_dir is not None:
        _write_plan(plan, args.output_dir, screen)
    if args.json:
        sys.stdout.write(encode(plan).decode())
        return
    for words in plan_tables.screen_tables(plan):
        screen.out.print(plan_tables.for_terminal(words))
    for note in (*plan.notes, *plan_tables.pause_notes(plan)):
        screen.out.print(f"note: {note}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def _write_plan(plan: CapacityPlan, folder: Path, screen: Screen) -> None:
    write_whole(folder / "plan.json", encode(plan))
    write_whole(folder / "plan.md", plan_tables.as_markdown(plan, ("headrace", *sys.argv[1:])))
    if not picture.draw(plan, folder / "plan.png"):
        screen.tell("plan.png was not drawn: matplotlib is missing; install headrace[plots]")
    screen.tell(f"files: {folder}/ (plan.md, plan.json, plan.png)")
