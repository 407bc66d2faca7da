"""`headrace tune` for a tiny model on the CPU: real processes, two sets of options, short runs."""

import json
import tomllib

import pytest

from tests import commands

TINY = ("--device", "cpu", "--image-size", 48, "--batch-size", 2, "--input", "random", "--distinct-images", 4)
ONE = ("--search", "workers=1", "--search", "max_queue_delay_us=0", "--search", "precision=float32")


@pytest.mark.timeout(170)
def test_the_winner_is_written_as_a_deployment_that_serves_it(tmp_path):
    ended = commands.run(
        *("tune", "--p99", "500ms", "--time", "100s", "--run-duration", "300ms", "--finalists", 1, "--json"),
        *("--model", commands.model_file(tmp_path), *TINY, *ONE, "--search", "max_batch_size=2,8"),
        *("--output-dir", "found"),
        cwd=tmp_path,
    )
    assert ended.code == 0, ended.err
    told = json.loads(ended.out)
    assert json.loads((tmp_path / "found" / "tune.json").read_text()) == told
    assert {each["choice"]["max_batch_size"] for each in told["tried"]} <= {2, 8}
    for each in told["tried"]:
        for point in each["points"]:
            assert (tmp_path / "found" / "trials" / point["trial"] / "requests.parquet").is_file()
    names = {path.name for path in (tmp_path / "found").iterdir()}
    assert names - {"tune.png"} == {"trials", "tune.json", "tune.md", "headrace.toml"}, "what the runs shared has gone"
    assert told["p99_s"] <= 0.5 or "does not hold" in told["verdict"]
    (model,) = tomllib.loads((tmp_path / "found" / "headrace.toml").read_text())["models"]
    assert max(model["buckets"]) == told["winner"]["max_batch_size"]
    assert (model["num_workers"], model["precision"], model["compile"]) == (1, "float32", False)
    checked = commands.call("config", "--config", "found/headrace.toml", "--json", cwd=tmp_path)
    assert checked.code == 0, checked.err
    assert "headrace serve --config found/headrace.toml" not in ended.out, "standard output is JSON alone"
    assert str(told["winner"]["max_batch_size"]) in (tmp_path / "found" / "tune.md").read_text()


@pytest.mark.timeout(120)
def test_a_bound_below_what_one_request_alone_takes_fails_the_command(tmp_path):
    ended = commands.run(
        *("tune", "--p99", "1us", "--time", "60s", "--run-duration", "500ms", "--output-dir", "found"),
        *("--model", commands.model_file(tmp_path), *TINY, *ONE),
        cwd=tmp_path,
    )
    assert ended.code == 1
    assert "--p99 0.001 ms: nothing can hold it. float32: one request alone takes" in ended.message
    assert not (tmp_path / "found" / "headrace.toml").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--time", "1s"), "--time 1s: too short for a single set of options"),
        (("--search", "wrkers=1"), "--search wrkers=1: there is no such key; did you mean workers?"),
        (("--repeats", "1"), "--repeats 1: at least 2"),
        (("--allow-shed", "2"), "--allow-shed 2: give a share"),
        (("--output-dir", "."), "exists already; choose another --output-dir"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, words, message):
    (tmp_path / "file").write_text("")
    ended = commands.call("tune", "--p99", "20ms", "--device", "cpu", *words, cwd=tmp_path)
    assert ended.code in (1, 2)
    assert message in ended.message
    assert not (tmp_path / "results").exists()
