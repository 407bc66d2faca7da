from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import get_model

from headrace.config import ModelConfig
from headrace.errors import CheckpointError, ModelError
from headrace.model import load
from headrace.model.checkpoint import make_random_checkpoint
from headrace.model.load import load_model

CPU = torch.device("cpu")
SMALL = "squeezenet1_1"


def ignore(_stage: str) -> None:
    pass


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("models") / "random.pth"
    make_random_checkpoint(SMALL, path, 0)
    return path


@pytest.fixture
def state(checkpoint):
    return torch.load(checkpoint, weights_only=True)


def saved(folder: Path, content: object) -> Path:
    torch.save(content, folder / "changed.pth")
    return folder / "changed.pth"


def plainly_loaded(name: str, path: Path) -> nn.Module:
    model = get_model(name)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()


def test_the_loaded_model_answers_as_torchvisions_own(checkpoint):
    rows = torch.randn(2, 3, 64, 64)
    model = load_model(ModelConfig(name=SMALL), checkpoint, CPU, ignore)
    assert torch.equal(model(rows), plainly_loaded(SMALL, checkpoint)(rows))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_model_that_cannot_be_built_without_memory_loads_as_well(tmp_path):
    name, path = "regnet_y_400mf", tmp_path / "random.pth"
    make_random_checkpoint(name, path, 0)
    rows = torch.randn(1, 3, 64, 64)
    answers = load_model(ModelConfig(name=name), path, CPU, ignore)(rows)
    assert torch.equal(answers, plainly_loaded(name, path)(rows))


@pytest.mark.parametrize("persistent", [True, False], ids=["in the checkpoint", "to be computed"])
def test_buffers_are_told_apart(persistent):
    model = nn.Linear(1, 1)
    model.register_buffer("table", torch.zeros(1), persistent=persistent)
    assert load.all_in_state(model) == persistent


@pytest.mark.parametrize(
    ("compiled", "stages"),
    [(False, ["weights"]), (True, ["weights", "compile wrap"])],
    ids=["eager", "compiled"],
)
def test_stages_are_marked_in_order(checkpoint, compiled, stages):
    marked: list[str] = []
    load_model(ModelConfig(name=SMALL, compile=compiled), checkpoint, CPU, marked.append)
    assert marked == stages


def test_a_callable_model_needs_no_checkpoint():
    model = load_model(ModelConfig(name="torch.nn:Flatten"), None, CPU, ignore)
    assert model(torch.zeros(2, 3, 4)).shape == (2, 12)


def test_old_files_that_cannot_be_mapped_are_read(tmp_path, state):
    path = tmp_path / "old.pth"
    torch.save(state, path, _use_new_zipfile_serialization=False)
    model = load_model(ModelConfig(name=SMALL), path, CPU, ignore)
    assert torch.equal(model.state_dict()["features.0.weight"], state["features.0.weight"])


def test_half_precision_weights_become_the_models_float32(tmp_path, state):
    path = saved(tmp_path, {key: value.half() for key, value in state.items()})
    model = load_model(ModelConfig(name=SMALL), path, CPU, ignore)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_densenets_published_names_are_understood():
    names = ["denselayer1.norm.1.weight", "denselayer2.conv.2.weight", "conv0.weight"]
    old = {f"features.{name}": torch.zeros(1) for name in names}
    expected = ["denselayer1.norm1.weight", "denselayer2.conv2.weight", "conv0.weight"]
    load._rename_old_densenet(old, {f"features.{name}": torch.zeros(1) for name in expected})
    assert sorted(old) == sorted(f"features.{name}" for name in expected)


def without_one(state):
    del state["features.0.weight"]
    return state


def with_others(state):
    return state | {f"extra.{k}": torch.zeros(1) for k in range(5)}


def with_another_shape(state):
    return state | {"features.0.bias": torch.zeros(7)}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        pytest.param(without_one, ["1 missing (features.0.weight)"], id="a missing key"),
        pytest.param(with_others, ["5 unexpected (extra.0, extra.1, extra.2, ...)"], id="unexpected keys"),
        pytest.param(with_another_shape, ["1 mis-shaped (features.0.bias [7] instead of [64])"], id="another shape"),
        pytest.param(lambda _state: {}, ["missing"], id="an empty dictionary"),
        pytest.param(
            lambda state: {"state_dict": state, "epoch": 3}, ["state_dict, epoch"], id="a training checkpoint"
        ),
        pytest.param(lambda _state: [1, 2], ["holds list"], id="no dictionary"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, state, change, parts):
    path = saved(tmp_path, change(state))
    with pytest.raises(CheckpointError) as error:
        load_model(ModelConfig(name=SMALL), path, CPU, ignore)
    assert [part for part in (str(path), *parts) if part not in str(error.value)] == []


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda whole: whole[: len(whole) // 2], id="truncated"),
        pytest.param(lambda _whole: b"", id="empty"),
        pytest.param(lambda _whole: b"<html>Not Found</html>", id="a web page"),
        pytest.param(lambda whole: b"PK\x03\x04" + whole[4:-100], id="a zip without its end"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, checkpoint, content):
    path = tmp_path / "damaged.pth"
    path.write_bytes(content(checkpoint.read_bytes()))
    with pytest.raises(CheckpointError, match=r"damaged or no checkpoint.*headrace checkpoint"):
        load_model(ModelConfig(name=SMALL), path, CPU, ignore)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    path = saved(tmp_path, {"features.0.weight": nn.Linear(1, 1)})
    with pytest.raises(CheckpointError, match="no checkpoint"):
        load_model(ModelConfig(name=SMALL), path, CPU, ignore)


@pytest.mark.parametrize(
    ("path", "part"),
    [(None, "none was given"), (Path("not-there.pth"), "no such checkpoint")],
    ids=["none", "absent"],
)
def test_a_missing_checkpoint_is_refused(path, part):
    with pytest.raises(CheckpointError, match=part):
        load_model(ModelConfig(name=SMALL), path, CPU, ignore)


def test_a_device_that_is_not_there_is_a_model_error(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import torch\n\ndef make():\n    return torch.nn.Linear(1, 1)\n")
    with pytest.raises(ModelError, match="cannot be moved to cuda:99"):
        load_model(ModelConfig(name=f"{path}:make"), None, torch.device("cuda", 99), ignore)
