import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from headrace.errors import ModelError
from headrace.model.source import resolve

GOOD = "import torch\n\ndef make():\n    return torch.nn.Flatten()\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.py"
    path.write_text(text)
    return path


@pytest.mark.parametrize(("name", "kind"), [("resnet18", "torchvision"), ("efficientnet_lite0", "efficientnet_lite0")])
def test_known_names(name, kind):
    source = resolve(name)
    assert (source.name, source.kind) == (name, kind)


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet"])
def test_a_torchvision_source_builds_without_warnings(name, recwarn):
    assert isinstance(resolve(name).build(), nn.Module)
    assert not recwarn.list


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        pytest.param("resnet81", "resnet18", id="a near torchvision name"),
        pytest.param("efficientnet_lite", "efficientnet_lite0", id="a near built-in name"),
        pytest.param("zzzz", "path/to/file.py:callable", id="nothing near: the forms"),
        pytest.param(":make", "around the colon", id="no module"),
        pytest.param("mine.py:", "around the colon", id="no callable"),
    ],
)
def test_an_unknown_name_is_refused_with_a_hint(name, hint):
    with pytest.raises(ModelError, match=name) as error:
        resolve(name)
    assert hint in str(error.value)


def test_a_callable_of_a_module():
    source = resolve("torch.nn:Flatten")
    assert source.kind == "callable"
    assert isinstance(source.build(), nn.Flatten)


def test_a_callable_of_a_file(tmp_path):
    module = resolve(f"{write(tmp_path, GOOD)}:make").build()
    assert module(torch.zeros(2, 3, 4)).shape == (2, 12)


def test_a_file_may_import_its_neighbour_also_late_and_leaves_the_path_as_it_was(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("from torch.nn import Identity\n")
    path = write(tmp_path, "def make():\n    import neighbour_of_mine\n    return neighbour_of_mine.Identity()\n")
    before = list(sys.path)
    assert isinstance(resolve(f"{path}:make").build(), nn.Identity)
    assert sys.path == before


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param("x = 1\nraise ValueError('no luck')\n", ["ValueError: no luck", "line 2"], id="raises"),
        pytest.param("import nowhere_at_all\n", ["nowhere_at_all", "line 1 of mine.py"], id="missing import"),
        pytest.param("x = 1\n\ndef make(:\n", ["SyntaxError", "line 3 of mine.py"], id="syntax error"),
        pytest.param("import sys\nsys.exit(3)\n", ["SystemExit: 3", "line 2"], id="exits"),
        pytest.param("def made(): ...\n", ["make is not defined", "did you mean made"], id="no such callable"),
        pytest.param("make = 3\n", ["make is not callable"], id="not callable"),
    ],
)
def test_a_bad_file_is_refused_with_cause_and_line(tmp_path, text, parts):
    with pytest.raises(ModelError) as error:
        resolve(f"{write(tmp_path, text)}:make")
    assert [part for part in parts if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        pytest.param(
            "def make():\n    return inner()\n\ndef inner():\n    1 / 0\n",
            ["ZeroDivision", "line 5"],
            id="raises",
        ),
        pytest.param(
            "import json\ndef make():\n    json.loads('x')\n",
            ["JSONDecodeError", "line 3 of mine.py"],
            id="raises in a library: the user's line is named",
        ),
        pytest.param("def make(size): ...\n", ["without arguments", "size"], id="wants arguments"),
        pytest.param("def make():\n    return [1]\n", ["returned list", "torch.nn.Module"], id="no module returned"),
    ],
)
def test_a_bad_callable_is_refused_when_it_builds(tmp_path, text, parts):
    source = resolve(f"{write(tmp_path, text)}:make")
    with pytest.raises(ModelError) as error:
        source.build()
    assert [part for part in parts if part not in str(error.value)] == []


@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param("no/such/file.py:make", "there is no file no/such/file.py", id="missing file"),
        pytest.param("no_such_package.models:make", "No module named 'no_such_package'", id="missing module"),
    ],
)
def test_what_is_not_there_is_refused(name, part):
    with pytest.raises(ModelError, match=part):
        resolve(name)


def test_a_file_that_is_no_python_file_is_refused(tmp_path):
    (tmp_path / "model.txt").write_text(GOOD)
    with pytest.raises(ModelError, match=r"must end in \.py"):
        resolve(f"{tmp_path}/model.txt:make")


def examples_of(folder, text):
    return resolve(f"{write(folder, GOOD + text)}:make").example_inputs(48)


@pytest.mark.parametrize(
    ("made", "shapes"),
    [
        ("torch.zeros(4, 5)", [(4, 5)]),
        ("[torch.zeros(4, 5), torch.zeros(4)]", [(4, 5), (4,)]),
    ],
    ids=["a tensor", "a sequence"],
)
def test_a_file_says_what_its_model_takes(tmp_path, made, shapes):
    examples = examples_of(tmp_path, f"\ndef example_inputs():\n    return {made}\n")
    assert [tuple(tensor.shape) for tensor in examples] == shapes


def test_a_file_may_name_its_inputs(tmp_path):
    examples = examples_of(tmp_path, "\ndef example_inputs():\n    return {'ids': torch.zeros(4, 5)}\n")
    assert list(examples) == ["ids"]


def test_a_file_that_does_not_say_it_takes_images(tmp_path):
    assert [tuple(tensor.shape) for tensor in examples_of(tmp_path, "")] == [(2, 3, 48, 48)]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 3", "must return a tensor"),
        ("return [3]", "must return a tensor"),
        ("return []", "must return a tensor"),
        ("return torch.tensor(1.0)", "must return a tensor"),
        ("raise OSError('no file')", r"example_inputs failed: OSError: no file \(line 7 of mine\.py\)"),
    ],
    ids=["a number", "numbers", "nothing", "no rows", "an exception"],
)
def test_examples_that_are_none_are_refused(tmp_path, body, words):
    with pytest.raises(ModelError, match=words):
        examples_of(tmp_path, f"\ndef example_inputs():\n    {body}\n")


def test_a_file_is_run_once_for_its_model_and_its_examples(tmp_path):
    text = "\nmade = []\ndef example_inputs():\n    made.append(1)\n    return torch.zeros(len(made), 1)\n"
    source = resolve(f"{write(tmp_path, GOOD + text)}:make")
    assert [len(source.example_inputs(1)[0]) for _ in range(2)] == [1, 2]


def test_more_rows_are_made_where_they_are_our_own_noise():
    (noise,) = resolve("resnet18").more_inputs(48, 128)
    assert noise.shape == (128, 3, 48, 48)


def test_a_modules_own_example_is_all_there_is(tmp_path):
    text = "\ndef example_inputs():\n    return torch.zeros(4, 5)\n"
    (given,) = resolve(f"{write(tmp_path, GOOD + text)}:make").more_inputs(48, 128)
    assert given.shape == (4, 5)
