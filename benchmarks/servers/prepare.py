"""Make what a comparison needs before any server starts: weights, inputs, and the eager model's answers to them."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from models import SEED, build, checkpoint_path
from settings import ROW_SHAPE

from headrace.model.checkpoint import make_random_checkpoint

DISTINCT = 8  # inputs
PATCH = 50  # pixels, of coarse random patterns: noise alone makes networks give nearly the same answer to all


def inputs() -> npt.NDArray[np.float32]:
    """Return float32 [8, 3, 250, 250] that no network takes for each other."""
    random = np.random.default_rng(SEED)
    channels, height, width = ROW_SHAPE
    coarse = random.standard_normal((DISTINCT, channels, height // PATCH, width // PATCH))
    pattern = coarse.repeat(PATCH, axis=2).repeat(PATCH, axis=3)
    noise = random.standard_normal((DISTINCT, *ROW_SHAPE))
    strength = np.linspace(0.1, 1.5, DISTINCT).reshape(-1, 1, 1, 1)
    return (pattern + strength * noise).astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make weights, inputs.npy and expected.npy.")
    parser.add_argument("--model", choices=("resnet18", "tiny"), required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    path = checkpoint_path(args.model, args.folder)
    if args.model != "tiny" and not path.is_file():
        make_random_checkpoint(args.model, path, SEED)
    rows = inputs()
    with torch.inference_mode():
        expected = build(args.model, args.folder)(torch.from_numpy(rows)).numpy()
    np.save(args.folder / "inputs.npy", rows)
    np.save(args.folder / "expected.npy", expected)


if __name__ == "__main__":
    main()
