"""A deployment written out is the same deployment, and says where its values came from."""

import json
import math
import tempfile
import tomllib
from pathlib import Path
from typing import Literal, get_args, get_origin

import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.deployment_text import as_json, as_toml
from headrace.serve_config import MODEL_NAME
from headrace.settings import MODELS, OPTIONS, SERVER
from tests.deployments import ALL, TWO, read

TEXT = st.text(st.characters(exclude_categories=("Cc", "Cs")), min_size=1)


def value_of(described):
    """Return a strategy of what may be written for an option."""
    least, most = described.details.get("limits", (-1e9, 1e9))
    most = 1e9 if most == math.inf else most
    special = {
        "source": st.sampled_from(["resnet18", "a.b:c", "../m.py:build", "folder/", "x.pt2", 'q"\\#/é.py:f']),
        "name": st.from_regex(MODEL_NAME, fullmatch=True),
        "device": st.sampled_from(["auto", "cpu"]),
        "buckets": st.lists(st.integers(1, 65536), min_size=1, max_size=5, unique=True).map(sorted),
        "versions": st.sampled_from([("latest",), ("all",), ("2", "10")]).map(list),
        "queue_rows": st.integers(65536, 1 << 62),  # room for any batch
        "allow_origin": st.sampled_from([["*"], ["http://a.test:3000", "tauri://localhost"]]),
        "trace_endpoint": st.sampled_from(["http://127.0.0.1:4318", "https://collector.lan/otlp"]),
        "allow_host": st.sampled_from([["gpu.lan"], ["gpu.lan", "fd00::1"]]),
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


# `gpus` is left out everywhere: what it may be depends on the machine.
TLS = {"tls_cert", "tls_key", "tls_client_ca"}


@st.composite
def written(draw, section, source=False):
    """Return some options of a section, with values, by key."""
    chosen = draw(st.sets(st.sampled_from([each.field for each in OPTIONS[section] if each.field != "gpus"])))
    if chosen >= {"buckets", "max_batch_size"}:  # which would have to agree
        chosen.remove("buckets")
    chosen = together(chosen) | ({"source"} & {source})
    return {each: draw(value_of(each)) for each in OPTIONS[section] if each.field in chosen}


def together(fields):
    """Return the fields with those that they are of no use without."""
    return fields | TLS if fields & TLS else fields


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
    free = [
        each for each in ALL if each.field not in {"name", "version", "source", "buckets", "max_batch_size", "gpus"}
    ]
    chosen = together(draw(st.sets(st.sampled_from([each.field for each in free]))))
    outside = {each: draw(value_of(each)) for each in free if each.field in chosen}
    environment = {each.variable: text(value) for each, value in outside.items() if draw(st.booleans())}
    flags = [
        flag(each, value) for each, value in outside.items() if each.variable not in environment or draw(st.booleans())
    ]
    file = {SERVER: {each.key: value for each, value in server.items()}, MODELS: tables}
    return tomli_w.dumps(file), environment, flags


def text(value):
    if isinstance(value, list):
        return ",".join(map(text, value))
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
        "grpc = true  # default",
    ]
    assert {
        "frontends = 1  # default",
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
