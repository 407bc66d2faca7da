import os

import pytest

from headrace.config import ModelConfig
from headrace.errors import InvalidOption, ModelError, UnknownModel
from headrace.repository import Repository
from headrace.serve_config import RepositoryConfig, ServeConfig, ServedModelConfig
from headrace.supervisor import Supervisor


@pytest.fixture
def folder(tmp_path):
    for name, version, file in [
        ("cat", "1", "model.py"),
        ("cat", "9", "model.pt2"),
        ("cat", "10", "model.py"),
        ("dog", "3", "model.py"),
    ]:
        (tmp_path / name / version).mkdir(parents=True)
        (tmp_path / name / version / file).write_text("")
    for name in (".hidden", "cat/draft", "cat/011", "cat/12", "dog/0"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "a file").write_text("")
    return tmp_path


def repository(folder, *versions, models=()):
    defaults = ServedModelConfig(name="model", num_lanes=3)
    config = RepositoryConfig(folder=folder, defaults=defaults, versions=versions or ("latest",))
    return Repository(ServeConfig(repository=config, models=models))


def versions_of(found):
    return [each.version for each in found]


def test_models_are_folders_with_a_good_name(folder):
    assert repository(folder).names() == ("cat", "dog", "empty")


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [((), ["10"]), (("all",), ["1", "9", "10"]), (("9", "1", "77"), ["1", "9"])],
    ids=["the latest", "all", "some"],
)
def test_the_policy_chooses_among_versions_in_the_order_of_their_numbers(folder, policy, wanted):
    versions = repository(folder, *policy).look("cat")
    assert versions_of(versions.found) == ["1", "9", "10"]
    assert versions_of(versions.wanted) == wanted


def test_a_version_is_served_as_its_file_says_with_the_servers_options(folder):
    one, nine, _ = repository(folder).look("cat").found
    assert one.served.model.name == f"{folder}/cat/1/model.py:build"
    assert nine.served.model.name == f"{folder}/cat/9/model.pt2"
    assert (one.served.name, one.served.num_lanes) == ("cat", 3)


@pytest.mark.parametrize("name", ["bird", "../cat", "cat/1", "..", "", "a file", ".hidden", "/etc"])
def test_a_name_that_is_not_there_is_refused_whatever_it_looks_like(folder, name):
    with pytest.raises(UnknownModel):
        repository(folder).look(name)


def test_a_model_without_a_version_says_what_it_needs(folder):
    with pytest.raises(ModelError, match=r"model\.py or model\.pt2"):
        repository(folder).look("empty")


def test_versions_that_are_asked_for_and_not_there_are_named(folder):
    with pytest.raises(ModelError, match="has versions 3, and --versions asks for 1"):
        repository(folder, "1").look("dog")


def test_a_new_version_is_seen_at_the_next_look(folder):
    models = repository(folder)
    before = models.look("dog").wanted
    (folder / "dog" / "4").mkdir()
    (folder / "dog" / "4" / "model.py").write_text("")
    assert versions_of(models.look("dog").wanted) == ["4"]
    assert versions_of(before) == ["3"]


def test_a_version_is_another_one_when_any_of_its_files_changes(folder):
    models = repository(folder)
    weights = folder / "dog" / "3" / "weights.pth"
    weights.write_text("old")
    os.utime(weights, ns=(1, 1))
    before = models.look("dog").wanted
    assert models.look("dog").wanted == before
    (folder / "dog" / "3" / "__pycache__").mkdir()
    (folder / "dog" / "3" / "__pycache__" / "model.pyc").write_text("")
    assert models.look("dog").wanted == before
    os.utime(weights, ns=(2, 2))
    assert models.look("dog").wanted != before


def test_models_of_the_command_line_come_before_those_of_the_folder(folder):
    given = [ServedModelConfig(name="cat", version=version, model=ModelConfig(name="resnet18")) for version in "21"]
    models = repository(folder, models=tuple(given))
    assert models.names() == ("cat", "dog", "empty")
    assert versions_of(models.look("cat").wanted) == ["1", "2"]


def test_a_message_for_clients_names_no_place_of_ours(folder):
    (found,) = repository(folder).look("dog").found
    place = folder / "dog" / "3"
    told = found.public(f"--model {place}/model.py:build: no ({place}/weights with space.pth, /usr/lib/x.py)")
    assert told == "--model (path): no ((path)(path) with space.pth, (path))"


def test_a_server_of_a_folder_without_models_does_not_start(tmp_path):
    config = RepositoryConfig(folder=tmp_path, defaults=ServedModelConfig(name="model"))
    with pytest.raises(InvalidOption, match=r"NAME/VERSION/model\.py"):
        Supervisor(ServeConfig(repository=config), print).run()


@pytest.mark.parametrize(
    ("models", "words"),
    [
        ([], "no model to serve"),
        ([{"name": "a/b"}], "begin with a letter"),
        ([{"name": "a", "version": "01"}], "must be a whole number"),
        ([{"name": "a"}, {"name": "a"}], "give each a name or a version"),
    ],
    ids=["none", "name", "version", "twice"],
)
def test_models_that_cannot_be_told_apart_or_named_are_refused(models, words):
    with pytest.raises(InvalidOption, match=words):
        ServeConfig(models=tuple(ServedModelConfig(**each) for each in models)).validate()
