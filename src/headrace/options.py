"""The command line's words, and what they become."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from headrace import nvml
from headrace.config import (
    DESIGN_NAMES,
    INPUT_KINDS,
    LOADS,
    PRECISIONS,
    DesignConfig,
    InputConfig,
    LanesConfig,
    LoadConfig,
    ModelConfig,
    RunConfig,
    TransportConfig,
)
from headrace.errors import DeviceUnavailable, InvalidOption
from headrace.gpus import ChosenGpu, choose_gpus
from headrace.lanes_options import add_lanes_options, lanes_config
from headrace.study.plan import SweepConfig

NUM_ITERS = 100  # as published
# Lanes by the rows of the largest bucket: small batches fill a GPU only together. An H100 does most with 4 streams of 8
# rows (30,051 samples/s of ResNet-18 in bf16, with 8 streams 28,169), and of 1 row with 16 (22,166, with 8 18,946).
LANES: tuple[tuple[int, int], ...] = ((8, 4), (0, 16))
LANES_CPU = 1
LANES_ROWS = 65_536
RING_SLOTS = 16
RING_SPARE_BYTES = 1 << 30  # of requests that wait while the lanes are full
NUM_ITERS_CPU = 20  # a CPU needs minutes for the published number
DURATION_S = 10.0
DISTINCT_IMAGES = 256
DISTINCT_IMAGES_CPU = 64  # each costs one more forward of the eager model before the run
COMPILE = {"off": (False,), "on": (True,), "both": (False, True)}
MODEL_HELP = (
    "a torchvision classification model by name, efficientnet_lite0 (trained weights, no download), or your own:"
    " package.module:callable or path/to/file.py:callable that returns an nn.Module"
)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    add_source_options(group)
    group.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="tf32",
        help="of float32 convolutions: tf32 may round them (PyTorch's default), float32 may not; bf16 and fp16 compute"
        " in 16 bits, int8 and fp8 large linear layers in 8, with --design lanes (default: tf32)",
    )


def add_source_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--model", default="resnet18", metavar="NAME", help=f"{MODEL_HELP} (default: resnet18)")
    group.add_argument(
        "--model-dir", type=Path, default=Path(), metavar="DIR", help="where checkpoints lie (default: .)"
    )
    group.add_argument(
        "--download",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="fetch a missing torchvision checkpoint; without it, or offline, seeded random weights serve",
    )
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def model_config(args: argparse.Namespace, name: str) -> ModelConfig:
    """Return what `add_model_options` and --compile have read of the model called `name`."""
    return ModelConfig(
        name=name,
        model_dir=args.model_dir,
        download=args.download,
        compile=args.compile,
        precision=args.precision,
    )


def add_load_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    group.add_argument(
        "--num-iters",
        type=int,
        metavar="N",
        help=f"measured requests (default: {NUM_ITERS}; {NUM_ITERS_CPU} on the CPU)",
    )
    add_arrival_options(group)
    add_payload_options(group)


def add_payload_options(group: argparse._ArgumentGroup) -> None:
    """Add what is said of requests whatever the load."""
    group.add_argument(
        "--warmup-iters",
        type=int,
        metavar="N",
        help="requests between the first, whose latency is the warm-up, and the measured ones"
        " (default: 2 per worker; the published experiment sent none)",
    )
    group.add_argument("--input", choices=INPUT_KINDS, default="photos", help="(default: photos)")
    group.add_argument(
        "--wire",
        default="float32",
        metavar="TYPE",
        help="float32: images normalised by the client; uint8: as they are, normalised by the lanes (default: float32)",
    )
    group.add_argument("--image-size", type=int, default=250, metavar="PIXELS", help="(default: 250)")
    group.add_argument(
        "--distinct-images",
        type=int,
        metavar="N",
        help=f"images to draw the batches' rows from (default: {DISTINCT_IMAGES}; {DISTINCT_IMAGES_CPU} on the CPU)",
    )
    group.add_argument("--seed", type=int, default=0, help="of images, batches and random weights (default: 0)")
    group.add_argument(
        "--stall-timeout", type=float, default=300.0, metavar="S", help="end after so long without an answer"
    )


def add_arrival_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--load",
        default="burst",
        metavar="KIND",
        help=f"how they are sent: {', '.join(LOADS)} (default: burst, all at once, as published)",
    )
    group.add_argument("--rate", type=float, metavar="R", help="requests/s of --load constant and poisson")
    group.add_argument("--concurrency", type=int, metavar="N", help="requests in flight of --load closed")
    group.add_argument(
        "--duration",
        type=seconds,
        metavar="TIME",
        help=f"send for so long, as 10s or 500ms (default: {DURATION_S:g}s at a rate or in a closed loop without"
        " --num-iters)",
    )
    group.add_argument(
        "--arrivals",
        type=Path,
        metavar="FILE",
        help="of --load replay: seconds, one per line, or the requests.parquet of a run",
    )
    group.add_argument("--load-seed", type=int, default=0, metavar="N", help="of --load poisson (default: 0)")
    group.add_argument(
        "--bound", type=seconds, metavar="TIME", help="count what is answered within it, as 20ms, as goodput"
    )


def seconds(text: str) -> float:
    """Read a time: 20ms, 500us, 10s, 2min, or a number of seconds. Raises what argparse shows as wrong."""
    match = re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(us|ms|s|min|)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write it as 20ms, 500us, 10s or 2min")
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "": 1.0}[match[2]]


def load_config(args: argparse.Namespace, *, num_iters: int, warmup_iters: int) -> LoadConfig:
    """Return the load that the options ask for; `num_iters` where they do not say how many requests or how long."""
    return LoadConfig(
        kind=args.load,
        num_iters=num_iters,
        warmup_iters=warmup_iters,
        rate=args.rate,
        concurrency=args.concurrency,
        duration_s=_duration_s(args),
        arrivals=args.arrivals,
        seed=args.load_seed,
        bound_s=args.bound,
        stall_timeout_s=args.stall_timeout,
        keep_answers=getattr(args, "keep_answers", False),
    )


def _duration_s(args: argparse.Namespace) -> float | None:
    lasting = args.load in ("closed", "constant", "poisson") and args.num_iters is None and args.duration is None
    return DURATION_S if lasting else args.duration


def add_output_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="for all files of the run (default: under results/)"
    )
    group.add_argument("--overwrite", action="store_true", help="replace an output folder that exists")
    group.add_argument("--output-file", type=Path, metavar="CSV", help="append one row, published columns first")
    group.add_argument("--json", action="store_true", help="print the summary as JSON on standard output")
    group.add_argument("--keep-answers", action="store_true", help="write every answer to answers.npy")
    group.add_argument(
        "--profile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write trace.json for Perfetto or chrome://tracing; disturbs the timings",
    )
    group.add_argument(
        "--reference-cache", type=Path, metavar="DIR", help="keep the eager model's answers for other runs"
    )
    group.add_argument(
        "--exclusive",
        type=Path,
        metavar="FILE",
        help="lock file: runs that share it prepare side by side, and measure one at a time",
    )


def add_design_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("design")
    group.add_argument("--design", default="h2d_d2h_threads", metavar="NAME", help=", ".join(DESIGN_NAMES))
    group.add_argument(
        "--num-workers",
        type=int,
        metavar="N",
        help="predict threads, or lanes (default: 1; lanes: 4, or 16 for buckets below 8, 1 on the CPU)",
    )
    add_transport_options(group)
    group.add_argument(
        "--gpus",
        metavar="GPUS",
        help="lanes: all, or numbers with commas: an engine on each, and requests go where they are answered first",
    )
    group.add_argument(
        "--engines-per-device",
        type=int,
        default=1,
        metavar="N",
        help="lanes: processes that serve by themselves, on every GPU or on the CPU (default: 1)",
    )
    group.add_argument("--batch-size", type=int, default=32, metavar="B", help="rows of a request (default: 32)")
    group.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the model"
    )
    group.add_argument(
        "--compile-cache",
        type=Path,
        metavar="DIR",
        help="keep compiled code there for the next run (default: PyTorch's)",
    )
    group.add_argument(
        "--limits",
        action=argparse.BooleanOptionalAction,
        help="measure after serving what no server could exceed, and print the efficiency (default: with lanes)",
    )
    add_lanes_options(parser)


def add_sweep_options(parser: argparse.ArgumentParser) -> None:
    defaults = SweepConfig()
    group = parser.add_argument_group("what to measure: every combination that the designs allow")
    group.add_argument("--designs", nargs="+", default=defaults.designs, metavar="NAME", help=", ".join(DESIGN_NAMES))
    group.add_argument(
        "--workers", nargs="+", type=int, default=defaults.workers, metavar="N", help="(default: 1 to 4)"
    )
    group.add_argument(
        "--batch-sizes",
        nargs="+",
        type=int,
        default=defaults.batch_sizes,
        metavar="B",
        help="(default: as published)",
    )
    group.add_argument(
        "--compile", choices=tuple(COMPILE), default="both", help="measure with torch.compile (default: both)"
    )
    group.add_argument(
        "--repeats",
        type=int,
        default=defaults.repeats,
        metavar="N",
        help="runs of each combination (default: 10)",
    )
    group.add_argument("--order-seed", type=int, default=0, help="of the order within each repeat (default: 0)")
    group.add_argument(
        "--output-dir",
        type=Path,
        default=Path("results/sweep"),
        metavar="DIR",
        help="(default: results/sweep)",
    )
    group.add_argument("--run-timeout", type=float, default=3600.0, metavar="S", help="end a run after so long")
    group.add_argument("--exclusive", type=Path, metavar="FILE", help="lock file: measure while no other run does")
    add_transport_options(group)


def sweep_config(args: argparse.Namespace) -> SweepConfig:
    """Return the sweep that the options ask for. Raises InvalidOption or DeviceUnavailable."""
    device = resolve_device(args.device)
    config = SweepConfig(
        designs=tuple(args.designs),
        workers=tuple(args.workers),
        batch_sizes=tuple(args.batch_sizes),
        compile=COMPILE[args.compile],
        repeats=args.repeats,
        seed=args.order_seed,
        num_iters=_by_device(args.num_iters, device, NUM_ITERS, NUM_ITERS_CPU),
        child_options=child_options(args, device),
    )
    config.validate()
    return config


def child_options(args: argparse.Namespace, device: str) -> tuple[str, ...]:
    """Return the options that every run of a sweep shares, as `headrace bench` takes them."""
    shared = {
        "--device": device,
        "--model": args.model,
        "--model-dir": args.model_dir,
        "--precision": args.precision,
        "--warmup-iters": args.warmup_iters,
        "--input": args.input,
        **({"--wire": args.wire} if args.wire != "float32" else {}),
        "--image-size": args.image_size,
        "--distinct-images": args.distinct_images,
        "--seed": args.seed,
        "--stall-timeout": args.stall_timeout,
        "--exclusive": args.exclusive,
        "--transport": args.transport,
        "--ring-slots": args.ring_slots,
        **({"--client": args.client} if args.client != "copy" else {}),
        **({} if args.load == "burst" else {"--load": args.load, "--load-seed": args.load_seed}),
        "--rate": args.rate,
        "--concurrency": args.concurrency,
        "--duration": _duration_s(args),
        "--arrivals": args.arrivals,
        "--bound": args.bound,
    }
    given = [word for option, value in shared.items() if value is not None for word in (option, str(value))]
    return (*given, "--download" if args.download else "--no-download")


def add_transport_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--transport",
        metavar="NAME",
        help="queue (published) or ring: how batches cross processes (default: queue; lanes: ring)",
    )
    group.add_argument(
        "--ring-slots",
        type=int,
        metavar="N",
        help=f"requests a ring holds (default: {RING_SLOTS}; lanes: as many as keep them busy)",
    )
    group.add_argument(
        "--client",
        default="copy",
        metavar="KIND",
        help="over the ring: copy each batch in, or zero-copy, its data being there already (default: copy)",
    )


def run_config(args: argparse.Namespace) -> RunConfig:
    """Return the run that the options ask for, validated. Raises InvalidOption or DeviceUnavailable."""
    gpus = () if args.gpus is None else resolve_gpus(args.gpus)
    device = f"cuda:{gpus[0].number}" if gpus else resolve_device(args.device)
    engines = max(1, len(gpus)) * args.engines_per_device
    lanes = lanes_config(args)
    workers = _default_workers(args.design, device, lanes) if args.num_workers is None else args.num_workers
    config = RunConfig(
        device=device,
        gpus=tuple(gpu.number for gpu in gpus),
        engines_per_device=args.engines_per_device,
        model=replace(model_config(args, args.model), seed=args.seed, compile_cache=args.compile_cache),
        design=DesignConfig(name=args.design, num_workers=workers),
        inputs=InputConfig(
            kind=args.input,
            wire=args.wire,
            batch_size=args.batch_size,
            image_size=args.image_size,
            distinct_images=_by_device(args.distinct_images, device, DISTINCT_IMAGES, DISTINCT_IMAGES_CPU),
            seed=args.seed,
        ),
        transport=TransportConfig(
            name=args.transport or ("ring" if args.design == "lanes" else "queue"),
            ring_slots=_default_slots(args, workers, lanes) if args.ring_slots is None else args.ring_slots,
            client=args.client,
        ),
        lanes=lanes,
        limits=args.design == "lanes" and engines == 1 if args.limits is None else args.limits,
        load=load_config(
            args,
            num_iters=_by_device(args.num_iters, device, engines * _usual_iters(args), NUM_ITERS_CPU),
            warmup_iters=2 * workers * engines if args.warmup_iters is None else args.warmup_iters,
        ),
        profile=args.profile,
    )
    config.validate()
    return config


def _default_workers(design: str, device: str, lanes: LanesConfig) -> int:
    if design != "lanes":
        return 1
    largest = max(lanes.buckets, default=1)
    for rows, count in LANES:
        if device != "cpu" and largest >= rows:
            return count
    return LANES_CPU


def _default_slots(args: argparse.Namespace, workers: int, lanes: LanesConfig) -> int:
    """Return how many requests a ring should hold: with lanes, twice what they have at once, where memory allows.

    Some must wait while the others are computed, or lanes run empty whenever answers come in bursts. Seen on an H100 at
    batch 1, with a third more than the lanes have: 22,300 samples/s, and for 0.4 s of 3 no more than 12,000.
    """
    if args.design != "lanes":
        return RING_SLOTS
    batch_size = max(1, int(args.batch_size))
    requests = workers * lanes.depth * max(1, max(lanes.buckets, default=1) // batch_size)
    spare = min(requests, RING_SPARE_BYTES // (batch_size * 3 * int(args.image_size) ** 2 * 4))
    return max(RING_SLOTS, args.concurrency or 0, requests + max(spare, workers))


def _usual_iters(args: argparse.Namespace) -> int:
    """Return the published number; with lanes, so many that a fast GPU is busy for a second or more."""
    return max(NUM_ITERS, LANES_ROWS // max(1, int(args.batch_size))) if args.design == "lanes" else NUM_ITERS


def _by_device(given: int | None, device: str, usual: int, on_cpu: int) -> int:
    if given is not None:
        return given
    return on_cpu if device == "cpu" else usual


def resolve_gpus(text: str) -> tuple[ChosenGpu, ...]:
    """Return the GPUs that --gpus means. Raises InvalidOption and DeviceUnavailable."""
    chosen = choose_gpus(text)
    if importlib.metadata.version("torch").endswith("+cpu"):
        raise DeviceUnavailable(f"--gpus {text}: the installed torch is built for the CPU; install one for CUDA")
    return chosen


def resolve_device(name: str) -> str:
    """Turn "auto" into the device to use, and refuse one that is not there. Imports no torch: commands start fast."""
    kind, _, index = name.partition(":")
    if kind not in {"auto", "cpu", "cuda"} or (index and not (kind == "cuda" and index.isdecimal())):
        raise InvalidOption(f"--device {name}: choose auto, cpu, cuda or cuda:N")
    if kind == "cpu":
        return name
    gpu = nvml.open_gpu(int(index or 0))
    built_for_cpu = importlib.metadata.version("torch").endswith("+cpu")
    if kind == "auto":
        return "cpu" if gpu is None or built_for_cpu else "cuda"
    if gpu is None:
        raise DeviceUnavailable(
            f"--device {name}: no such NVIDIA GPU on this machine (or none that CUDA_VISIBLE_DEVICES lets us see);"
            " use --device cpu, or check nvidia-smi"
        )
    return name


def default_output_dir(label: str) -> Path:
    """Return a new folder's name under results/, by time of day."""
    return Path("results") / f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{label}"
