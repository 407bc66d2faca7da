"""Where a torchvision model's weights come from: the model folder, the network, or a seeded random stand-in.

Every file appears by an atomic rename, so a file that is there is whole, also with several processes at work.
"""

from __future__ import annotations

import hashlib
import re
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor, nn

from headrace.config import ModelConfig
from headrace.errors import ModelError
from headrace.files import whole_file
from headrace.model.source import build_torchvision, resolve, torchvision_models

_REMEDY = "choose another --model-dir or make room"
_TIMEOUT_S = 10.0
_CHUNK_BYTES = 1 << 20
_CALIBRATION_BATCHES = 3
_CALIBRATION_PIXELS = 128  # height and width
_CALIBRATION_BATCH_PIXELS = 1 << 18  # 16 images of that size


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A file of weights; `random` ones give answers without meaning."""

    path: Path
    random: bool


class DownloadError(Exception):
    """The network gave no whole and right file; the message says why."""


class Fetch(Protocol):
    """Writes what a URL holds to a file. Raises DownloadError."""

    def __call__(self, url: str, target: BinaryIO) -> None: ...


def fetch(url: str, target: BinaryIO) -> None:
    """Download `url`; the network may be silent for 10 s at most."""
    try:
        response = urllib.request.urlopen(url, timeout=_TIMEOUT_S)  # noqa: S310  # torchvision's own https addresses
    except (OSError, ValueError, HTTPException) as error:
        raise DownloadError(f"download failed ({error})") from error
    with response:
        while chunk := _read_chunk(response):
            target.write(chunk)


def ensure_checkpoint(config: ModelConfig, tell: Callable[[str], None], *, fetch: Fetch = fetch) -> Checkpoint | None:
    """Return the model's checkpoint, made available if need be; None for models that bring their own weights.

    `tell` gets one sentence if random weights stand in for the published ones. Raises ModelError for an
    unknown model, OutputError if a file must be written and cannot be.
    """
    if resolve(config.name).kind != "torchvision":
        return None
    url = published_url(config.name)
    published = config.model_dir / url.rpartition("/")[2]
    if published.is_file():
        return Checkpoint(path=published, random=False)
    reason = _try_download(url, published, fetch) if config.download else "downloads are off"
    if reason is None:
        return Checkpoint(path=published, random=False)
    stand_in = random_checkpoint_path(config)
    if not stand_in.is_file():
        make_random_checkpoint(config.name, stand_in, config.seed)
    tell(
        f"{stand_in} holds random weights (seed {config.seed}), since {published.name} is not beside it"
        f" and {reason}; the labels of its answers mean nothing"
    )
    return Checkpoint(path=stand_in, random=True)


def published_url(name: str) -> str:
    """Return the address of torchvision's published weights: the first ImageNet version, else its default."""
    versions = torchvision_models().get_model_weights(name)
    by_name = {version.name: version for version in versions}
    chosen = by_name.get("IMAGENET1K_V1", versions.DEFAULT)
    return str(chosen.url)


def random_checkpoint_path(config: ModelConfig) -> Path:
    return config.model_dir / f"{config.name}-random-seed{config.seed}.pth"


def make_random_checkpoint(name: str, path: Path, seed: int) -> None:
    """Write seeded random weights under torchvision's own keys, such that unlike inputs get unlike answers.

    The same seed gives the same weights on the same machine and PyTorch; elsewhere batch-norm statistics may
    differ in the last bits. Raises ModelError if `name` is no torchvision model, OutputError if `path` cannot
    be written.
    """
    if resolve(name).kind != "torchvision":
        raise ModelError(f"--model {name} brings its own weights; a checkpoint is made for torchvision models only")
    model = _random_model(name, seed)
    with whole_file(path, _REMEDY) as partial, partial.open("wb") as file:
        try:
            torch.save(model.state_dict(), file)
        except RuntimeError as error:  # it reports a full disk so
            raise OSError(str(error)) from error


def _try_download(url: str, path: Path, fetch: Fetch) -> str | None:
    """Return None if the file is there now, else why not."""
    try:
        with whole_file(path, _REMEDY) as partial:
            with partial.open("wb") as file:
                fetch(url, file)
            _verify(partial, path.name)
    except DownloadError as failure:
        return str(failure)
    return None


def _read_chunk(response: BinaryIO) -> bytes:
    try:
        return response.read(_CHUNK_BYTES)
    except (OSError, HTTPException) as error:
        raise DownloadError(f"download broke off ({error})") from error


def _verify(path: Path, published_name: str) -> None:
    """Compare with the start of the SHA-256 that PyTorch's published file names carry."""
    expected = re.search(r"-([0-9a-f]{8,})\.pth$", published_name)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if expected and not digest.startswith(expected[1]):
        raise DownloadError(f"the download is damaged (SHA-256 begins {digest[:8]}, not {expected[1]})")


def _random_model(name: str, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = build_torchvision(name).eval()
        for parameter in model.parameters():
            _enliven(parameter)
        for block in model.modules():
            _calm(block)
        _calibrate(model, _calibration_pixels(name))
    return model


def _enliven(parameter: Tensor) -> None:
    """Give a matrix of zeros (so begin ViTs' heads) small random values: else every answer is 0."""
    if parameter.ndim >= 2 and not parameter.any():
        nn.init.normal_(parameter, std=0.02)


def _calm(block: nn.Module) -> None:
    """Let a bottleneck add little to what it is given, as trained ones do.

    Left at weight 1, fifty random bottlenecks blow rounding errors up a hundredfold: ResNet-152's float32
    answers were wrong by 1.5e-4, and are by 2e-6 with this.
    """
    if isinstance(block, torchvision_models().resnet.Bottleneck):
        nn.init.constant_(block.bn3.weight, 0.2)


def _calibrate(model: nn.Module, pixels: int) -> None:
    """Set batch norms' running statistics to those of random images.

    Left at mean 0 and variance 1, activations of a deep untrained network grow or fade by orders of
    magnitude, and what is left of the input in its answers drowns in rounding (seen: ShuffleNet's answers to
    different photographs agree to 5e-6, Inception's have a norm of 4e12).
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = None  # a plain average over the batches
    for _ in range(_CALIBRATION_BATCHES):
        model(_random_images(pixels))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


def _calibration_pixels(name: str) -> int:
    smallest = torchvision_models().get_model_weights(name).DEFAULT.meta["min_size"]
    return int(max(_CALIBRATION_PIXELS, *smallest))


def _random_images(pixels: int) -> Tensor:
    """Return [rows, 3, pixels, pixels]: noise at all scales, in colour and brightness, as photographs vary.

    With images of 64 pixels and less variety, the statistics fit photographs so badly that the errors of
    EfficientNet-b0's float32 answers to those rose from 2e-6 to 5e-4.
    """
    rows = max(4, _CALIBRATION_BATCH_PIXELS // pixels**2)
    images = torch.zeros(rows, 3, pixels, pixels)
    cells = 1
    while cells <= pixels:
        noise = torch.randn(rows, 1, cells, cells) + 0.5 * torch.randn(rows, 3, cells, cells)
        amplitude = 1.0 if cells == 1 else 0.5
        images += amplitude * nn.functional.interpolate(noise, (pixels, pixels), mode="bilinear")
        cells *= 2
    return images
