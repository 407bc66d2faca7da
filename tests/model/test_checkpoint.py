import hashlib
import resource
from pathlib import Path

import pytest
import torch
from torchvision.models import get_model

from headrace.config import ModelConfig
from headrace.errors import ModelError, OutputError
from headrace.model import checkpoint
from headrace.model.checkpoint import (
    Checkpoint,
    DownloadError,
    ensure_checkpoint,
    fetch,
    make_random_checkpoint,
    published_url,
)
from headrace.model.load import load_model

SMALL = "squeezenet1_1"
SMALL_FILE = "squeezenet1_1-b8a52dc0.pth"
WITH_BATCH_NORM = "shufflenet_v2_x0_5"


def config(folder: Path, name: str = SMALL, *, download: bool = False) -> ModelConfig:
    return ModelConfig(name=name, model_dir=folder, download=download)


def silent(_text: str) -> None:
    raise AssertionError("nothing was to be told")


def writes(content: bytes):
    return lambda _url, target: target.write(content)


def breaks(url, target):
    target.write(b"half")
    raise DownloadError("download broke off (timed out)")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("resnet18", "resnet18-f37072fd.pth"),
        pytest.param("resnet50", "resnet50-0676ba61.pth", id="the first of two versions"),
        pytest.param("vit_h_14", "vit_h_14_swag-80465313.pth", id="the default where there is no first version"),
    ],
)
def test_the_published_file(name, file):
    assert published_url(name).endswith(f"/{file}")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "torch.nn:Flatten"])
def test_models_with_weights_of_their_own_need_no_checkpoint(tmp_path, name):
    assert ensure_checkpoint(config(tmp_path, name), silent) is None


def test_an_unknown_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="did you mean"):
        ensure_checkpoint(config(tmp_path, "resnet81"), silent)


def test_a_checkpoint_that_is_there_is_taken(tmp_path):
    (tmp_path / SMALL_FILE).write_bytes(b"weights")
    found = ensure_checkpoint(config(tmp_path, download=True), silent, fetch=breaks)
    assert found == Checkpoint(path=tmp_path / SMALL_FILE, random=False)


def test_a_damaged_download_is_not_kept(tmp_path):
    told: list[str] = []
    found = ensure_checkpoint(config(tmp_path, download=True), told.append, fetch=writes(b"not the weights"))
    assert found is not None
    assert found.random
    assert "the download is damaged" in told[0]
    assert [path.name for path in tmp_path.iterdir()] == [f"{SMALL}-random-seed0.pth"]


def test_a_failed_download_leaves_random_weights_and_says_so_once(tmp_path):
    told: list[str] = []
    found = ensure_checkpoint(config(tmp_path, download=True), told.append, fetch=breaks)
    assert found == Checkpoint(path=tmp_path / f"{SMALL}-random-seed0.pth", random=True)
    assert [path.name for path in tmp_path.iterdir()] == [f"{SMALL}-random-seed0.pth"]
    (sentence,) = told
    for part in (str(found.path), SMALL_FILE, "timed out", "labels of its answers mean nothing"):
        assert part in sentence


def test_without_download_nothing_is_fetched_and_random_weights_are_used_again(tmp_path):
    told: list[str] = []
    first = ensure_checkpoint(config(tmp_path), told.append, fetch=breaks)
    assert first is not None
    written = first.path.stat().st_mtime_ns
    second = ensure_checkpoint(config(tmp_path), told.append, fetch=breaks)
    assert second == first
    assert first.path.stat().st_mtime_ns == written
    assert ["downloads are off" in text for text in told] == [True, True]


def test_a_whole_download_takes_its_place(tmp_path):
    content = b"weights"
    name = f"model-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / name).write_bytes(content)
    with (tmp_path / name).open("wb") as target:
        fetch((tmp_path / "served" / name).as_uri(), target)
    assert (tmp_path / name).read_bytes() == content


@pytest.mark.parametrize("url", ["file:///no/such/file.pth", "nonsense"], ids=["nothing there", "not an address"])
def test_a_fetch_that_fails_says_why(tmp_path, url):
    with (tmp_path / "target").open("wb") as target, pytest.raises(DownloadError, match="download failed"):
        fetch(url, target)


def test_random_weights_have_torchvisions_keys_and_follow_the_seed(tmp_path):
    states = []
    for k, seed in enumerate([1, 1, 2]):
        make_random_checkpoint(WITH_BATCH_NORM, tmp_path / f"{k}.pth", seed)
        states.append(torch.load(tmp_path / f"{k}.pth", weights_only=True))
    first, again, other = states
    assert first.keys() == get_model(WITH_BATCH_NORM).state_dict().keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["fc.weight"], other["fc.weight"])


def test_making_random_weights_leaves_the_global_generator_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    make_random_checkpoint(SMALL, tmp_path / "any.pth", 0)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param("resnet18", 64, id="batch norm"),
        pytest.param("efficientnet_b0", 128, id="batch norm whose rounding errors grow to 5e-4 badly calibrated"),
        pytest.param(WITH_BATCH_NORM, 64, id="batch norm whose answers agree to 5e-6 uncalibrated"),
    ],
)
def test_random_weights_answer_different_photographs_differently_and_exactly(tmp_path, photographs, name, size):
    path = tmp_path / "random.pth"
    make_random_checkpoint(name, path, 0)
    model = load_model(config(tmp_path, name), path, torch.device("cpu"), lambda _stage: None)
    rows = photographs(size)
    answers = model(rows).double()
    exact = model.double()(rows.double())
    norms = answers.norm(dim=1)
    assert 1e-2 < norms.min() <= norms.max() < 1e6
    distances = torch.cdist(answers, answers) / torch.maximum(norms[:, None], norms[None, :])
    distances.fill_diagonal_(1.0)
    assert distances.min() > 1e-2
    assert ((answers - exact).norm(dim=1) / exact.norm(dim=1)).max() < 1e-5


@pytest.mark.parametrize(
    ("shape", "becomes_random"), [((3, 4), True), ((4,), False)], ids=["a matrix of zeros", "a bias of zeros"]
)
def test_a_head_that_begins_as_zeros_is_given_values(shape, becomes_random):
    parameter = torch.zeros(shape)
    checkpoint._enliven(parameter)
    assert parameter.any() == becomes_random


@pytest.mark.parametrize("name", ["efficientnet_lite0", "torch.nn:Flatten"])
def test_random_checkpoints_are_for_torchvision_models_only(tmp_path, name):
    with pytest.raises(ModelError, match="brings its own weights"):
        make_random_checkpoint(name, tmp_path / "any.pth", 0)


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    (tmp_path / "occupied").write_text("a file where a folder is needed")
    with pytest.raises(OutputError, match="--model-dir"):
        ensure_checkpoint(config(tmp_path / "occupied"), silent)


def test_a_disk_without_room_is_an_output_error_and_leaves_nothing_behind(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # a write beyond it fails, as on a full disk
    try:
        with pytest.raises(OutputError, match="cannot be written"):
            make_random_checkpoint(SMALL, tmp_path / "any.pth", 0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
