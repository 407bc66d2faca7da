"""What can be said of a served model, on the command line or in a file, and the configuration that it becomes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from headrace import lanes_options, options
from headrace.config import MOST_ENGINES, LanesConfig, ModelConfig, Precision, Stem, require
from headrace.gpus import choose_gpus
from headrace.option_fields import option, placed
from headrace.pipeline.batch import powers_of_two
from headrace.serve_config import RepositoryConfig, ServedModelConfig

MAX_BATCH_SIZE = 32
LANES_GPU = 4
LANES_CPU = 1
MOST_ROWS = 65536
MOST_PREPROCESS_THREADS = 16  # if nobody says how many
_MOST = (1 << 63) - 1  # of a TOML integer
_LANES = LanesConfig()
_SWITCHES = lanes_options.SWITCHES


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """A model as it is written down. Each field with `option` is a flag, a variable and a key of `[[models]]`."""

    source: str = option("", options.MODEL_HELP, word="model", group="model")
    name: str | None = option(
        None,
        "by which clients ask for the model",
        metavar="NAME",
        computed="MODEL, or the callable's name, or the file's",
        group="model",
    )
    version: int = option(1, "of the model", word="model_version", limits=(1, 10**18 - 1), group="model")
    versions: tuple[str, ...] = option(
        ("latest",),
        "which versions of a folder's models are served: latest, all, or numbers",
        metavar="VERSION",
        group="model",
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N", metavar="DEVICE", group="model")
    gpus: str | None = option(
        None,
        "all, or numbers with commas: an engine on each of these GPUs, and requests go where they are answered first;"
        " takes the place of the device",
        metavar="GPUS",
        computed="the device alone",
        group="model",
    )
    engines_per_device: int = option(
        1,
        "processes that each serve the model by themselves, on every GPU or on the CPU",
        limits=(1, MOST_ENGINES),
        group="model",
    )
    precision: Precision = option(
        "tf32",
        "of float32 convolutions: tf32 may round them (PyTorch's default), float32 may not; bf16 and fp16 compute in"
        " 16 bits, int8 and fp8 large linear layers in 8",
        group="model",
    )
    compile: bool = option(False, "torch.compile the model", group="model")
    compile_cache: Path | None = option(
        None,
        "keep compiled code there for the next start",
        metavar="DIR",
        computed="the user's cache folder",
        group="model",
    )
    model_dir: Path | None = option(
        None, "where checkpoints lie", metavar="DIR", computed="the current folder", group="model"
    )
    download: bool = option(
        True,
        "fetch a missing torchvision checkpoint; without it, or offline, seeded random weights serve",
        group="model",
    )
    seed: int = option(0, "of random weights, where no checkpoint is to be had", limits=(0, _MOST), group="model")
    image_size: int = option(
        224, "pixels, height and width, of torchvision's models", metavar="PIXELS", limits=(1, 4096), group="model"
    )
    num_workers: int | None = option(
        None,
        "lanes",
        limits=(1, math.inf),
        computed=f"{LANES_GPU} on a GPU, {LANES_CPU} on the CPU",
        group="lanes",
    )
    max_batch_size: int | None = option(
        None,
        "gather requests into batches of up to so many rows",
        metavar="ROWS",
        limits=(1, MOST_ROWS),
        computed=f"the largest of the buckets, or {MAX_BATCH_SIZE}",
        group="lanes",
    )
    buckets: tuple[int, ...] | None = option(
        None,
        "batch sizes to prepare for, ascending",
        metavar="ROWS",
        limits=(1, MOST_ROWS),
        computed="the powers of two up to max_batch_size",
        group="lanes",
    )
    max_queue_delay_us: int = option(
        _LANES.max_queue_delay_us,
        "let a batch wait so long to grow, even for a free lane; 0: no lane idles while requests wait",
        metavar="US",
        limits=(0, 3_600_000_000),
        group="lanes",
    )
    preprocess_threads: int | None = option(
        None,
        "threads for a model's own steps on the CPU, before and after it",
        limits=(1, 256),
        computed=f"one per CPU, at most {MOST_PREPROCESS_THREADS}",
        group="lanes",
    )
    lane_depth: int = option(_LANES.depth, lanes_options.DEPTH_HELP, limits=(1, 64), group="lanes")
    prefetch: bool = option(_LANES.prefetch, _SWITCHES["prefetch"], group="lanes")
    spin: bool = option(_LANES.spin, _SWITCHES["spin"], group="lanes")
    graphs: bool = option(_LANES.graphs, _SWITCHES["graphs"], group="lanes")
    channels_last: bool = option(_LANES.channels_last, _SWITCHES["channels_last"], group="lanes")
    fold_batch_norm: bool = option(_LANES.fold_batch_norm, _SWITCHES["fold_batch_norm"], group="lanes")
    fuse_epilogues: bool | None = option(
        None, lanes_options.REWRITES["fuse_epilogues"], computed=lanes_options.PAYS, group="lanes"
    )
    pointwise_as_matmul: bool | None = option(
        None, lanes_options.REWRITES["pointwise_as_matmul"], computed=lanes_options.PAYS, group="lanes"
    )
    stem: Stem = option(_LANES.stem, lanes_options.STEM_HELP, group="lanes")
    batching_is_open: bool = False  # no option: whether `completed` has made up the buckets

    def completed(self) -> ModelOptions:
        """Return the same with everything that was left open filled in, for this machine.

        Raises InvalidOption or DeviceUnavailable.
        """
        gpus = None if self.gpus is None else options.resolve_gpus(self.gpus)
        device = options.resolve_device(self.device) if gpus is None else "cuda"
        buckets = self.buckets or powers_of_two(self.max_batch_size or MAX_BATCH_SIZE)
        require(
            self.max_batch_size in (None, max(buckets)),
            f"--max-batch-size {self.max_batch_size}: the largest of the buckets that are given is {max(buckets)};"
            " give one of the two, or let them agree",
        )
        return replace(
            self,
            name=self.name or default_name(self.source),
            device=device,
            gpus=None if gpus is None else ",".join(str(gpu.number) for gpu in gpus),
            num_workers=self.num_workers or (LANES_CPU if device == "cpu" else LANES_GPU),
            model_dir=self.model_dir or Path(),
            compile_cache=self.compile_cache or user_cache(),
            buckets=buckets,
            max_batch_size=max(buckets),
            preprocess_threads=self.preprocess_threads or min(os.cpu_count() or 1, MOST_PREPROCESS_THREADS),
            batching_is_open=self.batching_is_open or (self.buckets is None and self.max_batch_size is None),
        )


def repository(given: ModelOptions) -> RepositoryConfig | None:
    """Return the folder of models that completed options name; None if it is one model. Raises InvalidOption."""
    folder = Path(given.source)
    if not is_path(given.source) or not folder.is_dir():
        return None
    defaults = served_model(replace(given, name="model"))  # its models have names of their own
    config = RepositoryConfig(folder=folder, defaults=defaults, versions=given.versions)
    config.validate()
    return config


def served_model(given: ModelOptions) -> ServedModelConfig:
    """Return what completed options mean, validated. Raises InvalidOption."""
    assert given.name and given.num_workers and given.buckets  # noqa: PT018  what `completed` has filled in
    assert given.model_dir is not None
    config = ServedModelConfig(
        name=given.name,
        version=str(given.version),
        model=ModelConfig(
            name=given.source,
            model_dir=given.model_dir,
            download=given.download,
            seed=given.seed,
            compile=given.compile,
            compile_cache=given.compile_cache,
            precision=given.precision,
        ),
        device=given.device,
        gpus=() if given.gpus is None else choose_gpus(given.gpus),
        engines_per_device=given.engines_per_device,
        num_lanes=given.num_workers,
        lanes=LanesConfig(
            buckets=given.buckets,
            max_queue_delay_us=given.max_queue_delay_us,
            depth=given.lane_depth,
            **{name: getattr(given, name) for name in (*_SWITCHES, *lanes_options.REWRITES, "stem")},
        ),
        image_size=given.image_size,
        preprocess_threads=given.preprocess_threads or 1,
        batching_is_open=given.batching_is_open,
    )
    config.validate()
    return config


def user_cache() -> Path:
    """Return where a user's programs keep what they can make again. Source: XDG Base Directory Specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headrace"


def default_name(source: str) -> str:
    """Return what clients call a model that was given no name."""
    place, colon, attribute = source.rpartition(":")
    if colon:
        return attribute or place
    return PurePath(source).stem if is_path(source) else source


def is_path(source: str) -> bool:
    """Tell whether a model is a file or a folder, rather than a name: it has a slash, or a suffix."""
    place, colon, _ = source.rpartition(":")
    if colon:
        return "/" in place or place.endswith(".py")
    return "/" in source or bool(PurePath(source).suffix) or source in (".", "..")


def located(source: str, folder: Path) -> str:
    """Return the model with its path, if it is one, as seen from anywhere, not only from `folder`."""
    return str(placed(source, folder)) if is_path(source) else source
