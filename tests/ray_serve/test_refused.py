"""Deployments that cannot be, told in one line and in time."""

import argparse
import os
import socket
import subprocess
import sys

import pytest

from headrace import ray_options
from headrace.errors import DeviceUnavailable, InvalidOption, RunFailed, Unreachable
from tests.commands import environment, model_file

WITHOUT_RAY = "Ray is not installed; pip install 'headrace[ray]'"
NODES = [{"CPU": 1.0}, {"CPU": 2.0}, {"CPU": 2.0}]


@pytest.fixture
def read(tmp_path, monkeypatch):
    """Read the words of `headrace deploy tiny.py:build`, in a folder with files to choose from."""
    (tmp_path / "locked.toml").write_text('[server]\ntoken_file = "tokens"\n')
    (tmp_path / "two.toml").write_text('[[models]]\nsource = "resnet18"\n[[models]]\nsource = "resnet50"\n')
    source = model_file(tmp_path)
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    ray_options.add_ray_options(parser)

    def deployment(*options):
        model = [] if "two.toml" in options else [source]
        return ray_options.ray_deployment(parser.parse_args([*model, "--device", "cpu", *options]))

    return deployment


def test_what_is_not_given_is_left_to_the_cluster_and_the_replicas(read):
    given = read("--name", "mine", "--max-batch-size", "8")
    assert (given.name, given.app_name, given.ray.fixed) == ("mine", "mine", None)
    assert (given.model.max_batch_size, given.model.num_workers, given.server.http_port) == (8, None, 8000)


def test_a_model_file_is_sent_with_its_folder_and_found_in_it(read, tmp_path):
    assert read("--working-dir", ".").model.source == "./tiny.py:build"
    assert read().model.source == f"{tmp_path}/tiny.py:build"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--replicas", "0"], "--replicas 0: must be auto, or a whole number, at least 1"),
        (["--replicas", "many"], "--replicas many: must be auto"),
        (["--min-replicas", "3", "--max-replicas", "2"], "--max-replicas 2: must be at least --min-replicas, 3"),
        (["--replicas", "2", "--max-replicas", "4"], "are for --replicas auto; leave them out"),
        (["--route-prefix", "cat"], "--route-prefix cat: must begin with /"),
        (["--working-dir", "/proc"], "--working-dir /proc: tiny.py does not lie in it"),
        (["--device", "tpu"], "--device tpu: on Ray, give auto, cpu or cuda"),
        (["--device", "cuda:1"], "--device cuda:1: on Ray, give auto, cpu or cuda; Ray chooses the GPU"),
        (["--gpus-per-replica", "1"], "--gpus-per-replica 1: --device cpu uses none"),
        (["--http-port", "0"], "--http-port 0: on Ray, give a port above 0"),
        (["--config", "locked.toml"], "Serve's proxies check no tokens and do not encrypt; put a gateway in front"),
        (["--config", "two.toml"], "2 models: an application on Ray has one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_that_cannot_be_are_refused(read, options, words):
    with pytest.raises(InvalidOption) as caught:
        read(*options)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            ["--replicas", "9"],
            InvalidOption,
            "--replicas 9: each replica takes 1 CPU, and the cluster has room for 5 (nodes: 1 CPU, 2 CPU, 2 CPU)",
        ),
        (["--min-replicas", "6"], InvalidOption, "--min-replicas 6: each replica takes 1 CPU"),
        (["--cpus-per-replica", "3"], InvalidOption, "--min-replicas 1: each replica takes 3 CPU"),
        (["--device", "cuda"], DeviceUnavailable, "--device cuda: none of the cluster's 3 nodes has a GPU; use"),
        (
            ["--device", "auto", "--gpus-per-replica", "0.5"],
            DeviceUnavailable,
            "--gpus-per-replica 0.5: none of the cluster's 3 nodes has a GPU",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_the_cluster_has_no_room_for_is_refused(read, options, error, words):
    launch = pytest.importorskip("headrace.ray_serve.launch", reason=WITHOUT_RAY, exc_type=ImportError)
    with pytest.raises(error) as caught:
        launch.planned(read(*options), NODES)
    assert words in str(caught.value)


def test_what_is_left_open_follows_from_the_cluster(read):
    launch = pytest.importorskip("headrace.ray_serve.launch", reason=WITHOUT_RAY, exc_type=ImportError)
    on_cpus = launch.planned(read("--device", "auto"), NODES)
    on_gpus = launch.planned(read("--device", "auto"), [*NODES, {"CPU": 8.0, "GPU": 4.0}])
    more = launch.planned(read("--max-replicas", "8"), NODES)
    assert (on_cpus.least, on_cpus.most, on_cpus.gpus) == (1, 5, 0)
    assert (on_gpus.least, on_gpus.most, on_gpus.gpus) == (1, 4, 1)
    assert (more.most, *more.notes) == (
        8,
        "--max-replicas 8: the cluster has room for 5 now; more need more nodes",
    )


def test_an_address_where_nothing_is_is_told(read):
    launch = pytest.importorskip("headrace.ray_serve.launch", reason=WITHOUT_RAY, exc_type=ImportError)
    with pytest.raises(Unreachable, match=r"--ray-address 127\.0\.0\.1:9: nothing answers there"):
        launch.connect("127.0.0.1:9", 5)
    with pytest.raises(InvalidOption, match="--ray-address there: must be HOST:PORT"):
        launch.connect("there", 5)


def test_something_that_answers_and_is_no_cluster_is_told_in_time():
    launch = pytest.importorskip("headrace.ray_serve.launch", reason=WITHOUT_RAY, exc_type=ImportError)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(Unreachable) as caught:
            launch.connect(address, 0.5)
    assert f"--ray-address {address}: the cluster did not answer within 0.5 s" in str(caught.value)


def test_a_path_that_another_application_has_is_refused_and_that_one_goes_on(read, served):
    launch = pytest.importorskip("headrace.ray_serve.launch", reason=WITHOUT_RAY, exc_type=ImportError)
    given = read("--name", "other")
    with pytest.raises(InvalidOption) as caught:
        launch._run(given, launch.planned(given, NODES))
    assert '--route-prefix /: Prefix / is being used by application "served"' in str(caught.value)
    assert served.infer().status == 200


def test_an_application_that_is_not_ready_in_time_is_told_with_what_still_serves(read, served):
    launch = pytest.importorskip("headrace.ray_serve.launch", reason=WITHOUT_RAY, exc_type=ImportError)
    with pytest.raises(RunFailed) as caught:
        launch._wait(read("--app-name", "absent", "--ready-timeout", "1"), serves=True)
    assert str(caught.value) == (
        "absent is not ready after 1 s, and Ray goes on trying (not known yet); the version before goes on serving;"
        " raise --ready-timeout to wait longer"
    )


def test_without_ray_the_command_names_the_extra(tmp_path):
    (tmp_path / "ray.py").write_text("raise ImportError(\"No module named 'ray'\")")
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])}
    command = [sys.executable, "-m", "headrace", "deploy", model_file(tmp_path), "--device", "cpu"]
    ended = subprocess.run(command, env=environment() | paths, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == (
        "headrace: Ray is not installed (No module named 'ray'); pip install 'headrace[ray]'"
    )


def test_commands_that_do_not_need_ray_do_not_import_it():
    modules = "headrace.cli, headrace.ray_options, headrace.ray_serve.grpc_services"
    command = [
        sys.executable,
        "-c",
        f"import sys, {modules}; headrace.cli.build_parser(); print('ray' in sys.modules, 'torch' in sys.modules)",
    ]
    assert subprocess.check_output(command, env=environment(), text=True, timeout=60).split() == ["False", "False"]
