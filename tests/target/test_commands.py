"""`headrace bench --url`, `null-server` and `calibrate`, as typed."""

import json
import re
import urllib.request
from dataclasses import replace

import pytest

from headrace import capacity_options
from headrace.bench import calibration
from headrace.bench.calibration import Ceiling
from headrace.bench.summary import load_summary
from headrace.config import AccessConfig
from headrace.errors import InvalidOption
from headrace.target_options import target_run_config
from tests import commands
from tests.bench.test_validity import CALIBRATION as SLOW

CALIBRATION = replace(SLOW, ceilings=(Ceiling(payload_bytes=1, requests_per_s=1, p50_s=1, p99_s=1),))

QUICK = ("--load", "closed", "--concurrency", 2, "--num-iters", 20)


def options(*words, command="bench"):
    from headrace.cli import build_parser  # noqa: PLC0415

    return build_parser().parse_args([command, *map(str, words)])


def test_a_server_is_measured_and_told_as_json(tmp_path):
    ended = commands.run(
        *("bench", "--url", "null://fixed?service=1ms", *QUICK, "--batch-size", 3, "--json"),
        *("--output-dir", "run", "--output-file", "runs.csv", "--bound", "10s"),
        cwd=tmp_path,
    )
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert told["metrics"]["rows"] == 60
    assert told["metrics"]["goodput_samples_per_s"] == pytest.approx(told["metrics"]["throughput_samples_per_s"])
    assert load_summary(tmp_path / "run").options.target.url == "null://fixed?service=1ms"
    assert "null-null" in (tmp_path / "runs.csv").read_text()


def test_a_server_that_lies_fails_the_command_and_says_why(tmp_path):
    ended = commands.run(
        *("bench", "--url", "null://fixed?service=1ms&wrong=0.5", *QUICK, "--output-dir", "run"), cwd=tmp_path
    )
    assert ended.code == 1
    assert "answers are wrong" in ended.message
    assert "right answers" in ended.out


def test_the_null_server_serves_other_load_generators(tmp_path):
    law = "null://fixed?service=1ms&bytes=8"
    with commands.start("null-server", "--law", law, "--port", 0, cwd=tmp_path) as process:
        address = re.search(r"http://([\d.:]+)/", process.stderr.readline())[1]
        body = {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
        answers = [ask(f"http://{address}/v2/models/null/infer", body) for _ in range(2)]
        metadata = ask(f"http://{address}/v2/models/null")
        configs = [ask(f"http://{address}/v2/models/null{version}/config") for version in ("", "/versions/1")]
        (stats,) = ask(f"http://{address}/v2/models/null/stats")["model_stats"]
    assert answers[0] == answers[1]
    assert len(answers[0]["outputs"][0]["data"]) == 8
    assert metadata["inputs"] == [{"name": "input", "datatype": "FP32", "shape": [-1, 2]}]
    assert configs[0] == configs[1]
    assert configs[0]["input"] == [{"name": "input", "data_type": "TYPE_FP32", "dims": [2]}]
    assert {name: each["count"] for name, each in stats["inference_stats"].items()} == {
        **dict.fromkeys(("success", "queue", "compute_input", "compute_infer", "compute_output"), 2),
        "fail": 0,
    }


def ask(url, body=None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data), timeout=30) as response:  # noqa: S310
        return json.loads(response.read())


def test_a_run_is_held_against_the_calibration(tmp_path):
    calibration.save(CALIBRATION, tmp_path / "calibration.json")
    ended = commands.run(
        *("bench", "--url", "null://fixed?service=0us", "--calibration", "calibration.json", "--output-dir", "run"),
        *QUICK,
        cwd=tmp_path,
    )
    assert ended.code == 0, ended.err
    assert any("client-limited" in mark for mark in load_summary(tmp_path / "run").marks)
    assert load_summary(tmp_path / "run").calibration == CALIBRATION


def test_options_become_a_target():
    config = target_run_config(
        options(
            *("--url", "grpc://h:1", "--model", "m", "--model-version", 2, "--generators", 3, "--shape", "a=1,2"),
            *("--shape", "b=3", "--int-range", -1, 5, "--request-timeout", "250ms", "--load", "poisson", "--rate", 9),
        )
    )
    target = config.target
    assert (target.model, target.version, target.generators, target.int_range) == ("m", "2", 3, (-1, 5))
    assert target.shapes == {"a": (1, 2), "b": (3,)}
    assert target.request_timeout_s == 0.25
    assert (config.load.kind, config.load.rate, config.load.duration_s) == ("poisson", 9, 10)
    assert config.inputs.batch_size == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--url", "http://h:1"), "add --model"),
        (("--url", "ftp://h:1", "--model", "m"), "must begin with one of"),
        (("--url", "http://h:1", "--model", "m", "--shape", "a=1,x"), "write it as NAME=1,3,224,224"),
        (("--url", "http://h:1", "--model", "m", "--generators", 9, "--connections", 4), "each of the 9 generators"),
        (("--url", "http://h:1", "--model", "m", "--reference", "a", "--check-model", "b"), "give one"),
        (("--url", "http://h:1", "--model", "m", "--int-range", 5, 1), "the smaller comes first"),
        (("--url", "http://me:secret@h:1", "--model", "m"), r"http://...@h:1: holds a name or password"),
        (("--url", "http://h:1", "--model", "m", "--ca-file", "a"), "is for TLS; give https:// or grpcs://"),
        (("--url", "grpc://h:1", "--model", "m", "--client-cert", "a", "--client-key", "b"), "is for TLS"),
        (("--url", "https://h:1", "--model", "m", "--client-cert", "a"), "give both"),
        (("--url", "https://h:1", "--model", "m", "--ca-file", "none.pem"), "--ca-file none.pem: cannot be used"),
        (("--url", "https://h:1", "--model", "m", "--client-cert", "a", "--client-key", "b"), "cannot be used"),
        (("--url", "http://h:1", "--model", "m", "--token-file", "a", "--token-env", "B"), "give one"),
        (("--url", "http://h:1", "--model", "m", "--token-file", "none"), "cannot be read"),
        (("--url", "http://h:1", "--model", "m", "--token-env", "HEADRACE_NO_TOKEN"), "not set, or empty"),
        (("--url", "null://fixed", "--token-env", "HEADRACE_NO_TOKEN"), "a null server asks for no token"),
        (("--url", "http://h:1", "--model", "m", "--profile"), "--profile: is about a design of ours"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(words, message):
    with pytest.raises(InvalidOption, match=message):
        target_run_config(options(*words))


def test_a_token_in_place_of_its_variables_name_is_not_repeated():
    with pytest.raises(InvalidOption, match="the name of an environment variable") as refused:
        target_run_config(options("--url", "http://h:1", "--model", "m", "--token-env", "eyJhbGciOi.secret"))
    assert "secret" not in str(refused.value)


def test_a_search_gets_in_as_a_run_does(tmp_path):
    (tmp_path / "token").write_text("secret\n")
    (tmp_path / "token").chmod(0o600)
    words = ("--p99", "1s", "--url", "https://h:1", "--model", "m", "--token-file", tmp_path / "token")
    config = capacity_options.run_config(options(*words, command="capacity"))
    assert config.target.access == AccessConfig(token_file=tmp_path / "token")
    assert "secret" not in repr(config)


def test_a_design_has_its_usual_model_and_batch_size_still():
    args = options()
    assert (args.url, args.of_designs) == (None, {"model": "resnet18", "batch_size": 32})
