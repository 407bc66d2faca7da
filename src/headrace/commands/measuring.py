"""What measures once: `bench`, `null-server`, `calibrate`, `limits`, `classify`, `checkpoint`."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from headrace import (
    limits_options,
    options,
    target_options,
)
from headrace.bench import calibration, columns, limits_run, limits_tables, present, run
from headrace.bench.classify import classify_config, read_labels
from headrace.bench.output import CsvLog
from headrace.bench.summary import RunSummary, encode
from headrace.config import DESIGN_NAMES, DesignConfig, ModelConfig, RunConfig
from headrace.screen import Screen
from headrace.target import calibrate, live, null_grpc, null_server
from headrace.target.law import parse_law
from headrace.target.run import Files, run_target


def add_bench(parser: argparse.ArgumentParser) -> None:
    options.add_design_options(parser)
    options.add_model_options(parser)
    options.add_load_options(parser)
    options.add_output_options(parser)
    target_options.add_target_options(parser)
    usual = {name: parser.get_default(name) for name in ("model", "batch_size")}
    parser.set_defaults(command=do_bench, of_designs=usual, **dict.fromkeys(usual))  # with --url there is no usual one


def do_bench(args: argparse.Namespace, screen: Screen) -> None:
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


def add_null_server(parser: argparse.ArgumentParser) -> None:
    target_options.add_null_server_options(parser)
    parser.set_defaults(command=do_null_server)


def do_null_server(args: argparse.Namespace, screen: Screen) -> None:
    law = parse_law(args.law)
    if law.transport == "grpc":
        over_grpc = null_grpc.NullGrpcServer(law)
        port = over_grpc.start(args.host, args.port)
        screen.tell(f"ready: grpc://{args.host}:{port}, model null, law {args.law}; log at {null_grpc.LOG}")
        over_grpc.wait()
        return
    listener = null_server.listen(args.host, args.port)
    host, port = listener.getsockname()[:2]
    screen.tell(f"ready: http://{host}:{port}/, model null, law {args.law}; log at {null_server.LOG_PATH}")
    null_server.NullServer(law, listener).serve()


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    target_options.add_calibrate_options(parser)
    parser.set_defaults(command=do_calibrate)


def do_calibrate(args: argparse.Namespace, screen: Screen) -> None:
    with live.LiveWatcher(screen.err) as watcher:
        made = calibrate.calibrate(args.generators, args.duration, watcher, args.transport)
    path = args.output or calibration.default_path(made.machine, transport=made.transport)
    calibration.save(made, path)
    if made.warning is not None:
        screen.tell(f"note: {made.warning}")
    if args.json:
        sys.stdout.write(encode(made).decode())
        return
    for table in live.calibration_tables(made):
        screen.out.print(table)
    screen.out.print(f"file: {path}", highlight=False, markup=False, soft_wrap=True)


def add_limits(parser: argparse.ArgumentParser) -> None:
    limits_options.add_limits_options(parser)
    parser.set_defaults(command=do_limits)


def do_limits(args: argparse.Namespace, screen: Screen) -> None:
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


def add_classify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("photographs", nargs="*", type=Path, help="image files (default: some that scikit-image ships)")
    parser.add_argument("--design", default="h2d_d2h_threads", metavar="NAME", help=", ".join(DESIGN_NAMES))
    parser.add_argument("--num-workers", type=int, default=1, metavar="N", help="predict threads (default: 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="for all files of the run (default: none kept)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output folder that exists")
    parser.set_defaults(command=do_classify)


def do_classify(args: argparse.Namespace, screen: Screen) -> None:
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


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="resnet18", metavar="NAME", help="a torchvision model (default: resnet18)")
    parser.add_argument("--model-dir", type=Path, default=Path(), metavar="DIR", help="where to put it (default: .)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")
    parser.set_defaults(command=do_checkpoint)


def do_checkpoint(args: argparse.Namespace, screen: Screen) -> None:
    from headrace.model.checkpoint import make_random_checkpoint, random_checkpoint_path  # noqa: PLC0415  torch

    path = random_checkpoint_path(ModelConfig(name=args.model, model_dir=args.model_dir, seed=args.seed))
    make_random_checkpoint(args.model, path, args.seed)
    screen.out.print(f"{path}: random weights (seed {args.seed}) for {args.model}; labels mean nothing", soft_wrap=True)
