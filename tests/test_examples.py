"""The example that takes JPEG files, served as the README says, and asked as the README says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.serving import WAIT_S
from tests.test_readme import python_blocks

EXAMPLE = Path(__file__).parents[1] / "examples" / "resnet18_jpeg.py"
DEFAULT_ADDRESS = "127.0.0.1:8000"


@pytest.fixture(scope="module")
def address():
    """Serve the example; yield the HTTP address."""
    options = ("--name", "photos", "--device", "cpu", "--http-port", "0", "--no-grpc", "--max-batch-size", "2")
    command = [sys.executable, "-m", "headrace", "serve", f"{EXAMPLE}:build", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        ready = next((line for line in server.stderr if line.startswith("ready: ")), "")
        yield ready.removeprefix("ready: http://").partition("/")[0]
        server.terminate()
        assert server.wait(WAIT_S) == 0


@pytest.mark.parametrize("form", ["tritonclient", "headrace import Client"])
def test_files_get_labels_from_the_clients_as_shown(address, form, tmp_path, monkeypatch, capsys):
    assert address
    for name, shade in (("cat", 60), ("dog", 190)):
        Image.new("RGB", (90, 70), (shade,) * 3).save(tmp_path / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    (block,) = (each for each in python_blocks() if form in each and '"photos"' in each)
    shown = {}
    exec(compile(block.replace(DEFAULT_ADDRESS, address), "README.md", "exec"), shown)  # noqa: S102
    answer = shown["answer"]
    names, scores = (
        (answer.as_numpy(name) for name in ("names", "scores")) if form == "tritonclient" else answer.values()
    )
    assert (names.shape, scores.shape) == ((2, 5), (2, 5))
    assert all(name.decode() for name in names.flat)
    assert (np.diff(scores) <= 0).all(), "the likeliest first"
    assert names[0, 0].decode() in capsys.readouterr().out
