"""A deployment's three sources say the same things, in one order, and nothing that is wrong passes."""

import argparse
import json
import math
import re
import shlex
import tempfile
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace import serve_options
from headrace.config import ModelConfig, ServeConfig, ServedModelConfig
from headrace.deployment import Surroundings, read_deployment
from headrace.deployment_text import as_json, as_toml
from headrace.errors import InvalidOption
from headrace.model_options import default_name
from headrace.option_fields import option, options_of
from headrace.settings import MODELS, OPTIONS, SERVER
from tests.commands import model_file, run, start

README = Path(__file__).parents[1] / "README.md"
ALL = (*OPTIONS[SERVER], *OPTIONS[MODELS])


def parser():
    made = argparse.ArgumentParser()
    serve_options.add_serve_options(made)
    return made


def read(folder, flags=(), environment=None, toml=None):
    """Return what the three sources describe in a folder, where `toml` is its headrace.toml."""
    if toml is not None:
        (folder / "headrace.toml").write_text(toml)
    args = parser().parse_args(shlex.split(flags) if isinstance(flags, str) else flags)
    return read_deployment(
        Surroundings(flags=vars(args), config=args.config, environment=environment or {}, folder=folder)
    )


# One declaration, three sources


def test_every_field_of_the_server_but_its_models_is_an_option():
    assert [each.field for each in OPTIONS[SERVER]] == [
        each.name for each in fields(ServeConfig) if each.name != MODELS
    ]


def test_no_two_options_share_a_flag_a_variable_or_a_field():
    for names in ([o.flag for o in ALL], [o.variable for o in ALL], [o.field for o in ALL]):
        assert len(set(names)) == len(names)


def test_a_declared_field_is_a_flag_a_variable_and_a_key():
    from dataclasses import dataclass  # noqa: PLC0415  beside what it declares

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


TWO = """
[[models]]
source = "resnet18"
version = 2
precision = "bf16"

[[models]]
source = "resnet50"
name = "fifty"
max_batch_size = 4
num_workers = 2
"""


def test_several_models_each_have_their_own_options(tmp_path):
    config = read(tmp_path, "--device cpu", toml=TWO).config()
    first, second = config.models
    assert (first.name, first.version, first.model.precision, first.num_lanes) == ("resnet18", "2", "bf16", 1)
    assert (second.name, second.version, second.model.precision, second.num_lanes) == ("fifty", "1", "tf32", 2)
    assert (first.lanes.buckets, second.lanes.buckets) == ((1, 2, 4, 8, 16, 32), (1, 2, 4))
    assert (config.queue_rows_of(first), config.queue_rows_of(second)) == (256, 32)


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
    assert config.models[0].model == ModelConfig(name=f"{tmp_path}/my.py:build", model_dir=tmp_path / "weights")


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


# What is refused


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[server]\nhtp_port = 1", "headrace.toml: [server] htp_port: there is no such key; did you mean http_port?"),
        (
            "[server]\nxyzzy = 1",
            "xyzzy: there is no such key; there are: body_timeout, drain_timeout, frontends, host,",
        ),
        ("[server]\nprecision = 1", "[server] precision: there is no such key; it belongs in [[models]]"),
        ('[[models]]\nsorce = "x"', "[[models]] sorce: there is no such key; did you mean source?"),
        ('[[models]]\nhost = "x"', "[[models]] host: there is no such key; it belongs in [server]"),
        (
            '[[models]]\nsource="a"\n[[models]]\nsed=1',
            "[[models]] number 2 sed: there is no such key; did you mean seed?",
        ),
        ("[sever]", "headrace.toml: sever: there is no such section; did you mean [server]?"),
        ("[xyzzy]", "xyzzy: there is no such section; there are: [[models]], [server]"),
        ("http_port = 1", "http_port: there is no such section; it belongs in [server]"),
        ("[models]", "headrace.toml: models: write it as [[models]]"),
        ("[[server]]", "headrace.toml: server: write it as [server]"),
        ("models = [1]", "headrace.toml: models: write it as [[models]]"),
        ("[server]\nhttp_port = '1'", '[server] http_port = "1": must be a whole number, 0 to 65535'),
        ("[server]\nhttp_port = 1.0", "http_port = 1.0: must be a whole number, 0 to 65535"),
        ("[server]\nhttp_port = true", "http_port = true: must be a whole number, 0 to 65535"),
        ("[server]\nhttp_port = 65536", "http_port = 65536: must be 0 to 65535"),
        ("[server]\nhttp_port = -1", "http_port = -1: must be 0 to 65535"),
        ("[server]\nbody_timeout = nan", "body_timeout = NaN: must be at least 0.001"),
        ("[server]\nbody_timeout = inf", "body_timeout = Infinity: must be at least 0.001"),
        ("[server]\nbody_timeout = 0", "body_timeout = 0: must be at least 0.001"),
        ("[server]\nbody_timeout = true", "body_timeout = true: must be a number, at least 0.001"),
        ('[server]\nhost = ""', 'host = "": must be text'),
        ('[server]\nhost = "a\\u0000"', 'host = "a\\u0000": must be text'),
        ("[server]\nhost = 2020-01-01", 'host = "2020-01-01": must be text'),
        (f"[server]\nhost = {list(range(99))}", "20, 21, 2...: must be text"),
        ("[[models]]\nsource = 5", "[[models]] source = 5: must be text"),
        ('[[models]]\nsource = "x"\nprecision = "fp8"', 'precision = "fp8": must be one of tf32, float32, bf16, fp16'),
        ('[[models]]\nsource = "x"\ncompile = "yes"', 'compile = "yes": must be true or false'),
        ('[[models]]\nsource = "x"\ncompile_cache = 1', "compile_cache = 1: must be a path"),
        (
            '[[models]]\nsource = "x"\nbuckets = 8',
            "buckets = 8: must be a list of one or more, each a whole number, 1 to 65536",
        ),
        ('[[models]]\nsource = "x"\nbuckets = []', "buckets = []: must be a list of one or more"),
        ('[[models]]\nsource = "x"\nbuckets = [0, 1]', "buckets = [0, 1]: must be a list of one or more"),
        ('[[models]]\nsource = "x"\nbuckets = [8, 1]', "[[models]] buckets = [8, 1]: give ascending numbers of rows"),
        ('[[models]]\nname = "x"', "headrace.toml: [[models]]: source is missing"),
        ('[[models]]\nsource = "x"\nname = "a/b"', '[[models]] name = "a/b": must be letters, digits'),
        ('[[models]]\nsource = "./a b.pt2"', "headrace.toml: [[models]]: --name a b: must be letters, digits"),
        ('[[models]]\nsource = "x"\ndevice = "gpu"', '[[models]] device = "gpu": choose auto, cpu, cuda or cuda:N'),
        (
            '[[models]]\nsource = "x"\nmax_batch_size = 4\nbuckets = [1, 8]',
            "[[models]] max_batch_size = 4: the largest of the buckets that are given is 8",
        ),
        (
            '[[models]]\nsource = "x"\n[server]\nqueue_rows = 31',
            "headrace.toml: [server] queue_rows = 31: must hold a largest batch of x, 32 rows",
        ),
        ('[[models]]\nsource = "x"\n' * 2, "headrace.toml: two models are called x, version 1; give each a name or"),
        ("[server", "headrace.toml: is not a TOML file: "),
        ("a = 1\nb = c", "headrace.toml: is not a TOML file: Invalid value (at line 2, column 5)"),
        ("[server]\nhost = " + "[" * 9999, "headrace.toml: is not a TOML file"),
        ("", "no model to serve: name one"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place_and_the_remedy(tmp_path, toml, words):
    with pytest.raises(InvalidOption) as raised:
        read(tmp_path, toml=toml).config()
    assert words in str(raised.value)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("content", [None, b"\xff\xfe"], ids=["missing", "not UTF-8"])
def test_a_file_that_cannot_be_read_is_told_by_its_name(tmp_path, content):
    if content:
        (tmp_path / "my.toml").write_bytes(content)
    with pytest.raises(InvalidOption, match=r"^my\.toml: (cannot be read \(No such file|is not a TOML file: 'utf-8')"):
        read(tmp_path, "--config my.toml")


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        (
            {"HEADRACE_HTP_PORT": "1"},
            "HEADRACE_HTP_PORT: nothing reads this variable; did you mean HEADRACE_HTTP_PORT?",
        ),
        ({"HEADRACE_XYZZY": "1"}, "nothing reads this variable; there are: HEADRACE_BODY_TIMEOUT, HEADRACE_BUCKETS,"),
        ({"HEADRACE_HTTP_PORT": "x"}, "HEADRACE_HTTP_PORT=x: must be a whole number, 0 to 65535"),
        ({"HEADRACE_HTTP_PORT": ""}, "HEADRACE_HTTP_PORT=: must be a whole number, 0 to 65535"),
        ({"HEADRACE_COMPILE": "maybe"}, "HEADRACE_COMPILE=maybe: must be true or false"),
        ({"HEADRACE_BUCKETS": "1,,2"}, "HEADRACE_BUCKETS=1,,2: must be a list of one or more"),
        ({"HEADRACE_HOST": "\udcff"}, r"HEADRACE_HOST='\udcff': must be text"),
        ({"HEADRACE_QUEUE_ROWS": "31"}, "HEADRACE_QUEUE_ROWS=31: must hold a largest batch"),
        ({"HEADRACE_DEVICE": "cuda:x"}, "HEADRACE_DEVICE=cuda:x: choose auto, cpu, cuda or cuda:N"),
        ({"HEADRACE_HTTP_PORT": "tcp://10.0.0.1:80"}, "set enableServiceLinks: false in the pod"),
        ({"HEADRACE_CONFIG": ""}, ": cannot be read (Is a directory)"),
    ],
)
def test_a_wrong_variable_is_refused(tmp_path, environment, words):
    with pytest.raises(InvalidOption) as raised:
        read(tmp_path, "resnet18", environment).config()
    assert words in str(raised.value)


def test_variables_of_others_are_left_alone(tmp_path):
    environment = {
        "HEADRACE_GIT_REVISION": "abc",
        "HEADRACE_DEBUG": "1",
        "HEADRACE_PORT": "tcp://10.0.0.1:8000",
        "HEADRACE_PORT_8000_TCP_ADDR": "10.0.0.1",
        "HEADRACE_SERVICE_HOST": "10.0.0.1",
        "HEADRACE_SERVICE_PORT_HTTP": "8000",
        "HEADRACE_METRICS_SERVICE_PORT": "8002",
        "PATH": "/bin",
    }
    assert read(tmp_path, "resnet18 --device cpu", environment).config() == read(tmp_path, "resnet18").config()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("resnet18 --http-port x", "--http-port x: must be a whole number, 0 to 65535"),
        ("resnet18 --buckets 1 x", "--buckets 1 x: must be a list of one or more"),
        ("resnet18 --precision fp8", "--precision fp8: must be one of tf32, float32, bf16, fp16"),
        ("resnet18 --max-batch-size 0", "--max-batch-size 0: must be 1 to 65536"),
        ("''", "MODEL : must be text"),
        ("--precision bf16", "no model to serve: name one"),
    ],
)
def test_a_wrong_flag_is_refused(tmp_path, flags, words):
    with pytest.raises(InvalidOption, match=re.escape(words)):
        read(tmp_path, flags).config()


@pytest.mark.parametrize("flag", ["--name x", "--model-version 3"])
def test_what_is_one_models_own_cannot_be_said_of_several(tmp_path, flag):
    with pytest.raises(InvalidOption, match=f"^{flag}: 2 models cannot share it"):
        read(tmp_path, flag, toml=TWO)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"http_port": 65536}, "--http-port 65536: must be 0 to 65535"),
        ({"frontends": "two"}, "--frontends two: must be a whole number, 1 to 64"),
        ({"models": ()}, "there is no model to serve"),
        ({"models": (ServedModelConfig(name="a", version="x"),)}, "--model-version x: must be a whole number"),
        ({"models": (ServedModelConfig(name="a", num_lanes=0),)}, "--num-workers 0: at least 1 lane"),
        ({"models": (ServedModelConfig(name=""),)}, "--name : must be letters"),
        ({"models": (ServedModelConfig(name="a"),) * 2}, "two models are called a, version 1"),
    ],
)
def test_a_server_made_in_a_program_is_checked_like_a_described_one(changes, words):
    with pytest.raises(InvalidOption, match=re.escape(words)):
        ServeConfig(**{"models": (ServedModelConfig(name="a"),)} | changes).validate()


# The deployment written out

TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1)
LETTERS = "abcZ09_.-é"


def value_of(described):
    """Return a strategy of what may be written for an option."""
    least, most = described.details.get("limits", (-1e9, 1e9))
    most = 1e9 if most == math.inf else most
    special = {
        "source": st.sampled_from(["resnet18", "a.b:c", "../m.py:build", "folder/", "x.pt2", 'q"\\#/é.py:f']),
        "name": st.text(LETTERS, min_size=1),
        "device": st.sampled_from(["auto", "cpu"]),
        "buckets": st.lists(st.integers(1, 65536), min_size=1, max_size=5, unique=True).map(sorted),
        "queue_rows": st.integers(65536, 1 << 62),  # room for any batch
    }
    if described.field in special:
        return special[described.field]
    if get_origin(described.kind) is Literal:
        return st.sampled_from(get_args(described.kind))
    return {
        bool: st.booleans(),
        int: st.integers(int(least), int(most)),
        float: st.floats(least, most),
        str: TEXT,
        Path: TEXT,
    }[described.kind]


@st.composite
def written(draw, section, source=False):
    """Return some options of a section, with values, by key."""
    chosen = draw(st.sets(st.sampled_from([each.field for each in OPTIONS[section]])))
    if chosen >= {"buckets", "max_batch_size"}:  # which would have to agree
        chosen.remove("buckets")
    return {each: draw(value_of(each)) for each in OPTIONS[section] if each.field in chosen | ({"source"} & {source})}


@st.composite
def three_sources(draw):
    """Return a file's content, an environment and flags that go together."""
    server = draw(written(SERVER))
    models = draw(st.lists(written(MODELS), min_size=1, max_size=3))
    source = next(each for each in OPTIONS[MODELS] if each.field == "source")
    tables = [
        {each.key: value for each, value in (model | {source: draw(value_of(source))}).items()} | {"version": number}
        for number, model in enumerate(models, 1)
    ]
    free = [each for each in ALL if each.field not in {"name", "version", "source", "buckets", "max_batch_size"}]
    outside = {each: draw(value_of(each)) for each in draw(st.lists(st.sampled_from(free), unique=True))}
    environment = {each.variable: text(value) for each, value in outside.items() if draw(st.booleans())}
    flags = [
        flag(each, value) for each, value in outside.items() if each.variable not in environment or draw(st.booleans())
    ]
    file = {SERVER: {each.key: value for each, value in server.items()}, MODELS: tables}
    return tomli_w.dumps(file), environment, flags


def text(value):
    return repr(value) if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def flag(described, value):
    if isinstance(value, bool):
        return described.flag if value else described.flag.replace("--", "--no-", 1)
    return f"{described.flag}={text(value)}"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(three_sources())
def test_what_is_written_out_and_read_again_is_the_same_server(sources):
    toml, environment, flags = sources
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        described = read(Path(one), flags, environment, toml)
        again = read(Path(other), toml=as_toml(described))
        assert again.config() == described.config()
        assert tomllib.loads(as_toml(again)) == tomllib.loads(as_toml(described))


def test_each_line_says_where_its_value_came_from(tmp_path):
    toml = '[server]\nhttp_port = 1\n[[models]]\nsource = "resnet18"\nmax_batch_size = 3'
    lines = as_toml(read(tmp_path, "--no-spin", {"HEADRACE_HOST": "::1"}, toml)).splitlines()
    assert lines[:4] == [
        "[server]",
        'host = "::1"  # HEADRACE_HOST',
        "http_port = 1  # file",
        "frontends = 1  # default",
    ]
    assert {
        "# queue_rows =  # default: 8 largest batches of the model",
        'source = "resnet18"  # file',
        "spin = false  # --no-spin",
        'device = "auto"  # default; here "cpu"',
        "# buckets = [1, 2, 3]  # default: the powers of two up to max_batch_size",
    } <= set(lines)


def test_a_written_file_can_be_changed_at_one_place(tmp_path):
    first = as_toml(read(tmp_path, "resnet18 --max-batch-size 8"))
    config = read(tmp_path, toml=first.replace("max_batch_size = 8", "max_batch_size = 4")).config()
    assert config.models[0].lanes.buckets == (1, 2, 4)


def test_json_has_what_is_found_out_at_the_start_and_the_origins(tmp_path):
    content = json.loads(as_json(read(tmp_path, "--compile-cache c", toml=TWO)))
    assert content["file"] == str(tmp_path / "headrace.toml")
    assert content["server"]["http_port"] == 8000
    assert [model["buckets"] for model in content["models"]] == [[1, 2, 4, 8, 16, 32], [1, 2, 4]]
    assert content["models"][0]["compile_cache"] == str(tmp_path / "c")
    assert content["origins"]["models"][1]["compile_cache"] == "--compile-cache"
    assert content["origins"]["models"][1]["max_batch_size"] == "file"


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
    assert json.loads(run("config", "--json", cwd=tmp_path).out)["models"][1]["name"] == "fifty"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--htp-port", "1"], "there is no option --htp-port; did you mean --http-port?"),
        (["--http-port", "65536"], "headrace: --http-port 65536: must be 0 to 65535"),
    ],
)
def test_the_command_refuses_what_is_wrong(tmp_path, words, message):
    ended = run("config", "resnet18", *words, cwd=tmp_path)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.err


def test_serve_needs_no_model_where_the_file_names_one(tmp_path, monkeypatch):
    model_file(tmp_path)
    (tmp_path / "headrace.toml").write_text(
        '[server]\nhttp_port = 1\n[[models]]\nsource = "tiny.py:build"\nname = "tiny"\ndevice = "cpu"\n'
        "max_batch_size = 2\nimage_size = 32"
    )
    monkeypatch.setenv("HEADRACE_HTTP_PORT", "0")
    with start("serve", cwd=tmp_path) as process:
        first = process.stderr.readline()
        ready = next((line for line in process.stderr if line.startswith("ready: ")), "")
        process.terminate()
        _, rest = process.communicate(timeout=60)
    assert first == "headrace.toml is used, which lies in the current folder\n"
    assert re.fullmatch(r"ready: http://127\.0\.0\.1:\d+/v2/models/tiny\n", ready), rest
    assert ":1/" not in ready
