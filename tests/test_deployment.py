"""A deployment's three sources say the same things, in one order."""

import json
import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec
import pytest

from headrace import deployment_text, model_options, options
from headrace.config import ModelConfig
from headrace.errors import DeviceUnavailable, InvalidOption
from headrace.gpus import ChosenGpu
from headrace.model_options import default_name, user_cache
from headrace.option_fields import option, options_of
from headrace.serve_config import ServeConfig
from headrace.settings import MODELS, OPTIONS, SERVER
from tests.commands import call, model_file, run, start
from tests.deployments import ALL, TWO, parser, read

README = Path(__file__).parents[1] / "README.md"

# One declaration, three sources


def test_every_field_of_the_server_but_its_models_is_an_option():
    assert [each.field for each in OPTIONS[SERVER]] == [
        each.name for each in fields(ServeConfig) if each.name not in (MODELS, "repository")
    ]


def test_no_two_options_share_a_flag_a_variable_or_a_field():
    for names in ([o.flag for o in ALL], [o.variable for o in ALL], [o.field for o in ALL]):
        assert len(set(names)) == len(names)


def test_a_declared_field_is_a_flag_a_variable_and_a_key():
    @dataclass(frozen=True)
    class Declared:
        grpc_port: int | None = option(None, "for gRPC", metavar="PORT", limits=(0, 65535), computed="no gRPC")
        grace_s: float = option(1.5, "how long", key="grace")
        other: int = 3

    port, grace = options_of(Declared)
    assert (port.flag, port.variable, port.key) == ("--grpc-port", "HEADRACE_GRPC_PORT", "grpc_port")
    assert (grace.flag, grace.variable, grace.key) == ("--grace", "HEADRACE_GRACE", "grace")
    assert port.read_text("8001", "x") == port.read(8001, "x") == 8001
    assert (port.default_words, grace.default_words) == ("no gRPC", "1.5")


def test_the_help_shows_every_flag_with_its_variable_and_its_default_in_groups():
    text = " ".join(parser().format_help().split())
    for each in ALL:
        assert each.variable in text
        if each.field != "source":
            assert f"{each.flag} " in text
            assert f"(default: {each.default_words}; {each.variable})" in text
    assert re.search(r"server: --host .* model: MODEL .* lanes: --num-workers", text)


# Which source counts


@pytest.mark.parametrize(
    ("toml", "environment", "flags", "port", "origin"),
    [
        (None, {}, "", 8000, "default"),
        ("[server]\nhttp_port = 1", {}, "", 1, "file"),
        ("[server]\nhttp_port = 1", {"HEADRACE_HTTP_PORT": "2"}, "", 2, "HEADRACE_HTTP_PORT"),
        ("[server]\nhttp_port = 1", {"HEADRACE_HTTP_PORT": "2"}, "--http-port 3", 3, "--http-port"),
        ("[server]\nhttp_port = 1", {}, "--http-port 3", 3, "--http-port"),
        (None, {"HEADRACE_HTTP_PORT": "2"}, "--http-port 3", 3, "--http-port"),
        (None, {"HEADRACE_HTTP_PORT": "2"}, "--http-port 8000", 8000, "--http-port"),
    ],
)
def test_flags_go_before_variables_before_the_file_before_defaults(tmp_path, toml, environment, flags, port, origin):
    deployment = read(tmp_path, f"resnet18 --device cpu {flags}", environment, toml)
    assert deployment.config().http_port == port
    assert deployment.server.settings["http_port"].origin == origin


@pytest.mark.parametrize(
    ("flag", "variable", "key", "field", "value"),
    [
        ("--compile", "true", "true", "compile", True),
        ("--no-spin", "0", "false", "spin", False),
        ("--buckets 1 8", "1,8", "[1, 8]", "buckets", (1, 8)),
        ("--buckets 1,8", "1, 8", "[1, 8]", "buckets", (1, 8)),
        ("--precision bf16", "bf16", '"bf16"', "precision", "bf16"),
        ("--body-timeout 2", "2.0", "2", "body_timeout_s", 2.0),
        ("--host ::1", "::1", '"::1"', "host", "::1"),
        ("--num-workers 3", "3", "3", "num_workers", 3),
        ("--model-version 7", "7", "7", "version", 7),
    ],
)
def test_a_value_means_the_same_from_every_source(tmp_path, flag, variable, key, field, value):
    (described,) = (each for each in ALL if each.field == field)
    section = "[server]" if described in OPTIONS[SERVER] else '[[models]]\nsource = "resnet18"'
    for deployment in (
        read(tmp_path, ["resnet18", *flag.split()]),
        read(tmp_path, ["resnet18"], {described.variable: variable}),
        read(tmp_path, () if "models" in section else "resnet18", toml=f"{section}\n{described.key} = {key}"),
    ):
        got = (deployment.server if field in deployment.server.settings else deployment.models[0]).values()[field]
        assert (got, type(got)) == (value, type(value))


def test_several_models_each_have_their_own_options(tmp_path):
    config = read(tmp_path, "--device cpu", toml=TWO).config()
    first, second = config.models
    assert (first.name, first.version, first.model.precision, first.num_lanes) == ("resnet18", "2", "bf16", 1)
    assert (second.name, second.version, second.model.precision, second.num_lanes) == ("fifty", "1", "tf32", 2)
    assert (first.lanes.buckets, second.lanes.buckets) == ((1, 2, 4, 8, 16, 32), (1, 2, 4))
    assert [config.queue_rows_of(each.largest_batch) for each in (first, second)] == [256, 32]


def test_a_flag_or_variable_for_a_model_holds_for_every_model_of_the_file(tmp_path):
    config = read(tmp_path, "--device cpu --compile", {"HEADRACE_PRECISION": "fp16"}, TWO).config()
    assert [(each.model.compile, each.model.precision) for each in config.models] == [(True, "fp16")] * 2


@pytest.mark.parametrize(
    ("flags", "environment", "written"),
    [("resnet34", {}, "MODEL resnet34"), ("", {"HEADRACE_MODEL": "resnet34"}, "HEADRACE_MODEL=resnet34")],
)
def test_a_model_on_the_command_line_takes_the_place_of_the_files(tmp_path, flags, environment, written):
    deployment = read(tmp_path, f"{flags} --device cpu", environment, TWO + "[server]\nhttp_port = 5")
    assert [(each.name, each.model.precision) for each in deployment.config().models] == [("resnet34", "tf32")]
    assert deployment.config().http_port == 5
    assert f"headrace.toml: its models are not served, since {written} is" in deployment.notes


def test_a_file_in_the_current_folder_is_used_and_that_is_said(tmp_path):
    assert read(tmp_path, "resnet18").notes == ()
    deployment = read(tmp_path, toml=TWO)
    assert deployment.notes == ("headrace.toml is used, which lies in the current folder",)


def test_a_named_file_takes_the_place_of_the_current_folders_and_a_flag_that_of_a_variable(tmp_path):
    (tmp_path / "headrace.toml").write_text("nonsense")
    for name, port in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(f'[server]\nhttp_port = {port}\n[[models]]\nsource = "resnet18"')
    by_variable = read(tmp_path, "--device cpu", {"HEADRACE_CONFIG": "a"})
    assert (by_variable.config().http_port, by_variable.notes) == (1, ())
    assert read(tmp_path, "--device cpu --config b", {"HEADRACE_CONFIG": "a"}).config().http_port == 2


# Paths and names


def test_relative_paths_of_the_file_are_relative_to_its_folder_and_others_to_the_current_one(tmp_path):
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy/x.toml").write_text(
        '[[models]]\nsource = "../my.py:build"\nmodel_dir = "weights"\ncompile_cache = "/var/cache"'
    )
    config = read(tmp_path, "--config deploy/x.toml --device cpu").config()
    model = config.models[0].model
    assert Path(model.name.removesuffix(":build")).resolve() == tmp_path / "my.py"
    assert (model.model_dir, model.compile_cache) == (tmp_path / "deploy/weights", Path("/var/cache"))
    config = read(tmp_path, "my.py:build --device cpu", {"HEADRACE_MODEL_DIR": "weights"}).config()
    assert config.models[0].model == ModelConfig(
        name=f"{tmp_path}/my.py:build", model_dir=tmp_path / "weights", compile_cache=user_cache()
    )


def test_a_home_is_found_and_an_unknown_one_left(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/her")
    values = read(tmp_path, ["~/m.py:build", "--model-dir", "~no-such-user/x"]).models[0].values()
    assert values["source"] == "/home/her/m.py:build"
    assert values["model_dir"] == tmp_path / "~no-such-user/x"


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("resnet18", "resnet18"),
        ("package.module:Small", "Small"),
        ("/srv/my_model.py:build", "build"),
        ("/srv/exported/resnet.pt2", "resnet"),
        ("/srv/repository/", "repository"),
    ],
)
def test_a_model_without_a_name_is_called_by_its_source(source, name):
    assert default_name(source) == name


def test_names_that_are_no_paths_are_left_as_they_are(tmp_path):
    toml = "".join(f'[[models]]\nsource = "{source}"\n' for source in ("resnet18", "my.package:build"))
    sources = [section.values()["source"] for section in read(tmp_path, toml=toml).models]
    assert sources == ["resnet18", "my.package:build"]


def test_the_readmes_example_is_a_deployment(tmp_path):
    (block,) = re.findall(r"```toml\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    deployment = read(tmp_path, toml=block)
    given_keys = {key for table in tomllib.loads(block)[MODELS] for key in table}
    assert {"source", "precision"} <= given_keys
    assert len(read(tmp_path, "--device cpu").config().models) == len(deployment.models) == 2


# The commands


def test_the_command_prints_the_file_on_standard_output_and_the_rest_beside_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADRACE_FRONTENDS", "3")
    (tmp_path / "headrace.toml").write_text(TWO)
    ended = run("config", "--http-port", "7000", cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert (
        tomllib.loads(ended.out)["server"] | {"http_port": 7000, "frontends": 3} == tomllib.loads(ended.out)["server"]
    )
    assert "frontends = 3  # HEADRACE_FRONTENDS\n" in ended.out
    assert ended.err == "headrace.toml is used, which lies in the current folder\n"
    assert json.loads(call("config", "--json", cwd=tmp_path).out)["models"][1]["name"] == "fifty"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--htp-port", "1"], "there is no option --htp-port; did you mean --http-port?"),
        (["--http-port", "65536"], "headrace: --http-port 65536: must be 0 to 65535"),
    ],
)
def test_the_command_refuses_what_is_wrong(tmp_path, words, message):
    ended = call("config", "resnet18", *words, cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_serve_needs_no_model_where_the_file_names_one(tmp_path, monkeypatch):
    model_file(tmp_path)
    (tmp_path / "headrace.toml").write_text(
        '[server]\nhttp_port = 1\n[[models]]\nsource = "tiny.py:build"\nname = "tiny"\ndevice = "cpu"\n'
        "max_batch_size = 2\nimage_size = 32"
    )
    monkeypatch.setenv("HEADRACE_HTTP_PORT", "0")
    monkeypatch.setenv("HEADRACE_GRPC_PORT", "0")
    with start("serve", cwd=tmp_path) as process:
        first = process.stderr.readline()
        ready = next((line for line in process.stderr if line.startswith("ready: ")), "")
        process.terminate()
        _, rest = process.communicate(timeout=60)
    assert first == "headrace.toml is used, which lies in the current folder\n"
    assert re.fullmatch(
        r"ready: http://127\.0\.0\.1:\d+/v2/models/tiny \(version 1\), gRPC on 127\.0\.0\.1:\d+\n", ready
    ), rest
    assert ":1/" not in ready
    assert ":8001" not in ready


def gpus_of(monkeypatch, count=2):
    """A machine that has so many GPUs, and a torch that can use them."""
    chosen = tuple(ChosenGpu(number=number, uuid=f"GPU-{number}", name="H100") for number in range(count))

    def choose(text):
        return chosen if text == "all" else tuple(chosen[int(number)] for number in text.split(","))

    monkeypatch.setattr(options, "choose_gpus", choose)
    monkeypatch.setattr(model_options, "choose_gpus", choose)
    monkeypatch.setattr(options.importlib.metadata, "version", lambda _: "2.11.0+cu130")
    return chosen


@pytest.mark.parametrize(
    ("flags", "environment", "toml"),
    [
        ("resnet18 --gpus all", {}, None),
        ("resnet18 --device cpu --gpus 0,1", {}, None),
        ("resnet18", {"HEADRACE_GPUS": "0,1"}, None),
        ("", {}, '[[models]]\nsource = "resnet18"\ngpus = "all"\ndevice = "cpu"'),
    ],
    ids=["all", "before the device", "a variable", "the file"],
)
def test_gpus_are_chosen_from_every_source_and_take_the_place_of_the_device(
    tmp_path, monkeypatch, flags, environment, toml
):
    chosen = gpus_of(monkeypatch)
    deployment = read(tmp_path, flags, environment, toml)
    config = deployment.config()
    (served,) = config.models
    assert (served.gpus, served.device, served.num_engines) == (chosen, "cuda", 2)
    assert served.num_lanes == model_options.LANES_GPU, "of each"
    assert config.gpus == chosen
    assert config.watched_devices == ("GPU-0", "GPU-1")
    (written,) = msgspec.json.decode(deployment_text.as_json(deployment))["models"]
    assert written["gpus"] == "0,1"


def test_a_deployment_with_gpus_is_written_out_as_it_was_given(tmp_path, monkeypatch):
    gpus_of(monkeypatch)
    text = deployment_text.as_toml(read(tmp_path, "resnet18 --gpus all --engines-per-device 2"))
    assert '\ngpus = "all"  # --gpus; here "0,1"\n' in text
    assert "\nengines_per_device = 2  # --engines-per-device\n" in text


def test_several_engines_on_the_cpu_need_no_gpu(tmp_path):
    config = read(tmp_path, "resnet18 --device cpu --engines-per-device 3").config()
    assert config.models[0].num_engines == 3
    assert config.gpus == config.watched_devices == ()


@pytest.mark.parametrize("count", [0, 65])
def test_engines_have_a_bound(tmp_path, count):
    with pytest.raises(InvalidOption, match=f"--engines-per-device {count}"):
        read(tmp_path, f"resnet18 --device cpu --engines-per-device {count}").config()


def test_gpus_are_refused_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(DeviceUnavailable, match="--gpus all: no"):
        read(tmp_path, "resnet18 --gpus all").config()
