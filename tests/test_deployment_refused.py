"""Nothing that is wrong passes, and what is said of it names its place and the remedy."""

import re

import pytest

from headrace.errors import InvalidOption
from headrace.serve_config import ServeConfig, ServedModelConfig
from tests.deployments import TWO, read


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        ("[server]\nhtp_port = 1", "headrace.toml: [server] htp_port: there is no such key; did you mean http_port?"),
        (
            "[server]\nxyzzy = 1",
            "xyzzy: there is no such key; there are: allow_host, allow_origin, body_timeout, ",
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
        ('[[models]]\nsource = "x"\nprecision = "fp4"', 'precision = "fp4": must be one of tf32, float32, bf16, fp16'),
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
        (
            {"HEADRACE_XYZZY": "1"},
            "nothing reads this variable; there are: HEADRACE_ALLOW_HOST, HEADRACE_ALLOW_ORIGIN,",
        ),
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
        ("resnet18 --precision fp4", "--precision fp4: must be one of tf32, float32, bf16, fp16"),
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
