"""Runs against a real server over both transports: its counts and ours agree, and its answers are the model's."""

import numpy as np
import pytest

from headrace.config import LoadConfig
from headrace.errors import InputError, ModelError, UnknownModel, Unreachable
from tests.serving import Server
from tests.target.running import answered, measure

OTHER = """
import torch

class Other(torch.nn.Module):
    def forward(self, values, ids):
        return {"doubled": values * 2.2, "sum": ids.sum(1)}

def build():
    return Other()
"""
BURST = LoadConfig(kind="burst", num_iters=12)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    started = Server(folder)
    started.folder = folder
    (folder / "other.py").write_text(OTHER)
    yield started
    started.stop()


def url(server, transport):
    return f"http://{server.address}" if transport == "http" else f"grpc://{server.grpc_address}"


@pytest.mark.parametrize("transport", ["http", "grpc"])
@pytest.mark.parametrize(
    "load",
    [
        BURST,
        LoadConfig(kind="closed", concurrency=3, num_iters=30),
        LoadConfig(kind="constant", rate=60, num_iters=30),
    ],
    ids=lambda load: load.kind,
)
def test_every_load_is_answered_counted_and_right(server, tmp_path, transport, load):
    outcome = measure(
        tmp_path,
        url(server, transport),
        load,
        rows=2,
        model="served",
        int_range=(20, 60),
    )
    summary = outcome.summary
    assert summary.error is None
    assert summary.target.server_success == len(answered(outcome)) == load.num_iters
    assert summary.metrics.rows == 2 * load.num_iters
    assert summary.answers.checked_rows == 2 * 2 * load.num_iters, "two outputs"
    assert summary.experiment == f"{transport}-served"


def test_answers_are_compared_with_the_eager_models(server, tmp_path):
    model = {"model": "served", "int_range": (20, 60)}
    same = measure(tmp_path, url(server, "grpc"), BURST, check_model=f"{server.folder}/served.py:build", **model)
    assert same.summary.error is None
    assert same.summary.target.compared_with == "the eager model's answers"
    outcome = measure(tmp_path, url(server, "http"), BURST, check_model=f"{server.folder}/other.py:build", **model)
    assert outcome.summary.metrics.wrong == 12
    assert outcome.summary.metrics.throughput_samples_per_s is None
    assert "12 of 12 answers are wrong" in outcome.summary.error


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_errors_are_counted_with_the_servers_words(server, tmp_path, transport):
    """Id 13 makes the model fail, which asking one by one before the run finds: nothing is written."""
    values = np.zeros((1, 1, 3), np.float32)
    np.savez(tmp_path / "inputs.npz", values=values, ids=np.full((1, 1, 4), 13))
    with pytest.raises(Exception, match="thirteen"):
        measure(tmp_path, url(server, transport), BURST, model="served", distinct=1, input_file=tmp_path / "inputs.npz")
    assert not (tmp_path / "run").exists()


def test_answers_may_be_given_in_a_file(server, tmp_path):
    values, ids = np.ones((2, 1, 3), np.float32), np.full((2, 1, 4), 5)
    values[1] = 2
    np.savez(tmp_path / "inputs.npz", values=values, ids=ids)
    right = {"doubled": 2 * values, "sum": ids.sum(2)}
    for name, expected in (("right.npz", right), ("wrong.npz", {**right, "sum": ids.sum(2) + 1})):
        np.savez(tmp_path / name, **expected)
    inputs = {"model": "served", "distinct": 2, "input_file": tmp_path / "inputs.npz"}
    good = measure(tmp_path, url(server, "http"), BURST, reference=tmp_path / "right.npz", **inputs)
    assert good.summary.error is None
    assert good.summary.answers.wrong_rows == 0
    bad = measure(tmp_path, url(server, "http"), BURST, reference=tmp_path / "wrong.npz", **inputs)
    assert bad.summary.metrics.wrong == 12


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_a_model_that_is_not_there_is_named(server, tmp_path, transport):
    with pytest.raises(UnknownModel, match="nowhere"):
        measure(tmp_path, url(server, transport), BURST, model="nowhere")


def test_what_cannot_be_sent_is_refused(server, tmp_path):
    with pytest.raises(InputError, match="the server takes"):
        measure(tmp_path, url(server, "http"), BURST, model="served", shapes={"ids": (1, 5)})
    with pytest.raises(InputError, match="no such input"):
        measure(tmp_path, url(server, "http"), BURST, model="served", shapes={"words": (1, 5)})


@pytest.mark.parametrize("scheme", ["http", "grpc"])
def test_no_server_is_unreachable(tmp_path, scheme):
    with pytest.raises(Unreachable):
        measure(tmp_path, f"{scheme}://127.0.0.1:9", BURST, model="served", request_timeout_s=2)


def test_a_check_model_that_fails_says_so(server, tmp_path):
    (tmp_path / "bad.py").write_text("def build():\n    raise ValueError('no weights')\n")
    with pytest.raises(ModelError, match="no weights"):
        measure(
            tmp_path,
            url(server, "http"),
            BURST,
            model="served",
            int_range=(20, 60),
            check_model=f"{tmp_path}/bad.py:build",
        )
