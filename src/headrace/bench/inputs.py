"""What the requests carry: batches of photographs or noise, all made before the clock starts.

Everything follows from the configuration and its seed, so another process can make the same rows again.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import torch
from PIL import Image, ImageOps
from torch import Tensor

from headrace.config import InputConfig
from headrace.errors import InputError
from headrace.model.efficientnet_lite0 import PREPROCESSING
from headrace.model.optimise import IMAGENET_MEAN, IMAGENET_STD
from headrace.tensors import DTYPE_BYTES

CLASSIFIED = ("chelsea", "coffee", "rocket", "motorcycle_left", "camera")
# Without the stereo pair's other half and the starry sky, all parts of which get almost the same answers.
PAYLOAD = (*CLASSIFIED, "astronaut", "retina", "coins")

_SMALLEST_CROP = 0.4  # of a photograph's height and width
_GB = 1e9

Index = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Prepared payloads. `row_index[b, r]` is the row that row r of batch b is a copy of."""

    rows: Tensor  # [distinct, *features], as requests carry them
    batches: list[Tensor]  # each [batch_size, *features], private memory, contiguous, touched
    row_index: Index  # [len(batches), batch_size]
    note: str | None  # if requests must share batches: why


def make_inputs(config: InputConfig, num_batches: int) -> Inputs:
    """Make payloads for `num_batches` requests; beyond the memory limit, fewer batches that take turns.

    Batches differ from each other, and rows within a batch, for as long as the distinct rows allow. Raises
    InputError if memory is too small (nothing is allocated then), photographs are missing, or a file is no
    image.
    """
    distinct = config.distinct_rows(num_batches)
    count = _batch_count(config, num_batches)
    require_memory((distinct + count * config.batch_size) * _row_bytes(config), psutil.virtual_memory().available)
    rows = make_pixels(config, distinct) if config.wire == "uint8" else make_rows(config, distinct)
    row_index = _order(config, distinct, count)
    batches = [rows[torch.from_numpy(order)] for order in row_index]
    return Inputs(rows=rows, batches=batches, row_index=row_index, note=_note(config, count, num_batches))


def make_rows(config: InputConfig, distinct: int) -> Tensor:
    """Return the rows as the model takes them: float32 [distinct, 3, image_size, image_size], normalised.

    Raises InputError: photographs are missing, or a file is no image.
    """
    if config.wire == "uint8":
        return _normalised(make_pixels(config, distinct).numpy(), IMAGENET_MEAN, IMAGENET_STD)
    if config.files:
        return _file_rows(config.files, config.image_size)
    if config.kind == "random":
        generator = torch.Generator().manual_seed(config.seed)
        return torch.randn(distinct, 3, config.image_size, config.image_size, generator=generator)
    return torch.stack(
        [_normalised(np.asarray(picture), IMAGENET_MEAN, IMAGENET_STD) for picture in _pictures(config, distinct)]
    )


def make_pixels(config: InputConfig, distinct: int) -> Tensor:
    """Return the rows as uint8 [distinct, image_size, image_size, 3]. Raises InputError."""
    if config.kind == "random":
        generator = torch.Generator().manual_seed(config.seed)
        shape = (distinct, config.image_size, config.image_size, 3)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in _pictures(config, distinct)]))


def photograph_files(names: Sequence[str] = CLASSIFIED, folder: Path | None = None) -> dict[str, Path]:
    """Return photographs that scikit-image ships, by name. Raises InputError if it is not installed."""
    folder = photograph_folder() if folder is None else folder
    found = {name: path for name in names for path in sorted(folder.glob(f"{name}.*"))}
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(
            f"{folder}: no photograph {', '.join(missing)} there;"
            " pip install --force-reinstall 'headrace[photos]', or use --input random"
        )
    return found


def photograph_folder(package: str = "skimage") -> Path:
    """Return the folder of the package's photographs, importing nothing. Raises InputError without it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(
            "--input photos takes its photographs from scikit-image, which is not installed;"
            " pip install 'headrace[photos]', or use --input random"
        )
    return Path(spec.origin).parent / "data"


def require_memory(needed_bytes: int, available_bytes: int) -> None:
    """Raise InputError if the payloads do not fit into the memory that is free."""
    if needed_bytes > available_bytes:
        raise InputError(
            f"the payloads need {needed_bytes / _GB:.1f} GB of memory and {available_bytes / _GB:.1f} GB are"
            " free; lower --batch-size, --image-size or --distinct-images"
        )


def _batch_count(config: InputConfig, num_batches: int) -> int:
    """Return how many batches to make. Raises InputError if files do not fill whole batches."""
    batch_bytes = config.batch_size * _row_bytes(config)
    count = max(1, min(num_batches, config.memory_limit_bytes // batch_bytes))
    if not config.files:
        return count
    batches, rest = divmod(len(config.files), config.batch_size)
    if rest:
        raise InputError(
            f"{len(config.files)} files do not fill batches of {config.batch_size}: give a multiple of"
            f" {config.batch_size} files, or --batch-size 1"
        )
    return min(count, batches)


def _note(config: InputConfig, count: int, num_batches: int) -> str | None:
    if count == num_batches:
        return None
    if count * config.batch_size == len(config.files):
        return f"{num_batches} requests take turns with the {count} batches that the files make"
    limit = f"{config.memory_limit_bytes / (1 << 20):.0f} MiB"
    return f"{num_batches} requests take turns with {count} distinct batches, since more would exceed {limit}"


def _order(config: InputConfig, distinct: int, count: int) -> Index:
    """Return which rows make up each batch, [count, batch_size]: files in their order, all else shuffled."""
    if config.files:
        return np.arange(count * config.batch_size, dtype=np.int64).reshape(count, config.batch_size)
    return shuffled(distinct, count, config.batch_size, config.seed)


def shuffled(distinct: int, count: int, batch_size: int, seed: int) -> Index:
    """Cut seeded permutations of the rows into `count` batches of `batch_size` <= `distinct` rows.

    No two batches are equal before every ordered choice of rows has been used once.
    """
    generator = np.random.default_rng(seed)
    choices = math.perm(distinct, batch_size)
    used: set[bytes] = set()
    batches: list[Index] = []
    while len(batches) < count:
        pieces = generator.permutation(distinct)[: distinct - distinct % batch_size].reshape(-1, batch_size)
        for piece in pieces:
            if len(used) == choices:
                used.clear()
            if piece.tobytes() not in used:
                used.add(piece.tobytes())
                batches.append(piece)
    return np.stack(batches[:count]).astype(np.int64)


def _row_bytes(config: InputConfig) -> int:
    return 3 * config.image_size**2 * DTYPE_BYTES[config.wire]


def _pictures(config: InputConfig, distinct: int) -> Iterator[Image.Image]:
    """Yield each photograph whole, then seeded crops of them in turn, half of them mirrored; all image_size square."""
    size = config.image_size
    photographs = [_shrunk(_open(path), 2 * size) for path in photograph_files(PAYLOAD).values()]
    generator = np.random.default_rng(config.seed)
    for k in range(distinct):
        photograph = photographs[k % len(photographs)]
        yield _squared(photograph, size) if k < len(photographs) else _crop(photograph, size, generator)


def _squared(photograph: Image.Image, size: int) -> Image.Image:
    return photograph.resize((size, size), Image.Resampling.BICUBIC)


def _crop(photograph: Image.Image, size: int, generator: np.random.Generator) -> Image.Image:
    """Return a random part, resized to size x size (smoothed where it shrinks), by chance mirrored."""
    width, height = photograph.size
    share = generator.uniform(_SMALLEST_CROP, 1.0, size=2)
    left, top = generator.uniform(0.0, 1.0 - share)
    box = (left * width, top * height, (left + share[0]) * width, (top + share[1]) * height)
    picture = photograph.resize((size, size), Image.Resampling.BICUBIC, box=box)
    return ImageOps.mirror(picture) if generator.random() < 0.5 else picture


def _shrunk(photograph: Image.Image, shorter_side: int) -> Image.Image:
    """Return a large photograph made smaller once, so that hundreds of crops of it are cheap."""
    return _resized(photograph, shorter_side) if min(photograph.size) > shorter_side else photograph


def _file_rows(files: Sequence[Path], size: int) -> Tensor:
    means, stds = (PREPROCESSING.mean,) * 3, (PREPROCESSING.std,) * 3
    pictures = (_centre(_resized(_open(path), max(PREPROCESSING.resize, size)), size) for path in files)
    return torch.stack([_normalised(np.asarray(picture), means, stds) for picture in pictures])


def _resized(picture: Image.Image, shorter_side: int) -> Image.Image:
    width, height = picture.size
    scale = shorter_side / min(width, height)
    return picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)


def _centre(picture: Image.Image, size: int) -> Image.Image:
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _open(path: Path) -> Image.Image:
    """Read an image as RGB, the right way up. Raises InputError."""
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: not readable as an image ({error}); give JPEG, PNG or the like") from error


def _normalised(pixels: Pixels, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (value / 255 - mean) / std, float32 [..., 3, height, width] of uint8 [..., height, width, 3]."""
    scale = np.array([1 / (255 * s) for s in std], dtype=np.float32)
    shift = np.array([m / s for m, s in zip(mean, std, strict=True)], dtype=np.float32)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(pixels * scale - shift, -1, -3)))
