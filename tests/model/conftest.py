import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image


@pytest.fixture(scope="session")
def photographs() -> Callable[[int], torch.Tensor]:
    """Photographs of scikit-image as [rows, 3, size, size], values about -2 to 2."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data"

    def rows(size: int) -> torch.Tensor:
        names = ("chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "camera.png")
        pictures = [Image.open(folder / name).convert("RGB").resize((size, size)) for name in names]
        values = np.stack([np.asarray(picture, dtype=np.float32) for picture in pictures])
        return torch.from_numpy(values / 64 - 2).permute(0, 3, 1, 2).contiguous()

    return rows
