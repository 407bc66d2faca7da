"""`headrace deploy` on a Ray cluster that has two GPUs: an engine on each. Skipped where there are fewer, or no Ray."""

import json
import os
import runpy
import signal
from itertools import count

import grpc
import numpy as np
import pytest
import torch

from headrace.bench.answers import nearest_distinct, relative_errors, tolerance
from headrace.gpus import choose_gpus
from headrace.wire.grpc import inference_pb2 as pb
from tests.commands import environment, run
from tests.ray_serve.cluster import WAIT_S, Served

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]
# Tells who computed: the process, its GPU by the UUID that CUDA knows, how many it sees, and which of them it used.
MODEL = """
import os
import torch

def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 5, stride=3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(256, 10),
    )

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.network = network()
        uuid = str(torch.cuda.get_device_properties(0).uuid)
        self.register_buffer("who", torch.tensor([os.getpid(), int(uuid[:8], 16), torch.cuda.device_count()]))

    def forward(self, images):
        rows = len(images)
        used = images.new_full((rows, 1), images.get_device(), dtype=torch.int64)
        return {"scores": self.network(images), "who": torch.cat([self.who.expand(rows, 3), used], 1)}

def build():
    return Model()

def example_inputs():
    return {"images": torch.zeros(2, 3, 48, 48)}
"""
IMAGES = 8
AT_LEAST = 100  # requests, before and after what happens
THREADS = 8
TOLERANCE = tolerance("cuda", "bf16", compiled=False)


class OnGpus(Served):
    """The model on the cluster. A replica is known by its process and the GPU that it says it computes on."""

    def __init__(self, folder, address):
        super().__init__(folder, address)
        (folder / "served.py").write_text(MODEL)
        self.images = images()
        self.expected = eager(f"{folder}/served.py", self.images)
        self._turns = count()

    def deploy(self, *options):
        return run(
            *(
                "deploy",
                f"{self.folder}/served.py:build",
                "--name",
                "served",
                "--device",
                "cuda",
                "--precision",
                "bf16",
            ),
            *("--ray-address", self.address, "--replicas", "2", "--max-batch-size", "8"),
            *("--http-port", self.http_port, "--grpc-port", self.grpc_port, *options),
            cwd=self.folder,
        )

    def infer(self, rows):
        """Return the response to these images over HTTP, as bytes after JSON both ways."""
        images = np.ascontiguousarray(self.images[rows])
        given = {"name": "images", "shape": images.shape, "datatype": "FP32"}
        head = json.dumps(
            {
                "inputs": [given | {"parameters": {"binary_data_size": images.nbytes}}],
                "parameters": {"binary_data_output": True},
            }
        ).encode()
        url = f"http://127.0.0.1:{self.http_port}/v2/models/served/infer"
        headers = {"Inference-Header-Content-Length": str(len(head))}
        return self.pool.request("POST", url, body=head + images.tobytes(), headers=headers)

    def check(self, rows, scores, who):
        """Return the replica that answered, once its answer is the eager model's in float32."""
        errors = relative_errors(scores.reshape(len(rows), -1), self.expected[rows])
        assert errors.max() <= TOLERANCE
        ((pid, gpu, seen, used),) = np.unique(who.reshape(len(rows), -1), axis=0).tolist()
        assert (seen, used) == (1, 0), "Ray shows a replica its own GPU alone, which CUDA calls 0"
        return pid, gpu

    def replicas(self):
        """Return who answers, as soon as two do."""
        with self.load(THREADS) as answers:
            answers.wait_until(lambda: len(answers.pids) == 2)
        assert not answers.errors + answers.silent
        return answers.pids

    def ask(self):
        rows = [next(self._turns) % IMAGES]
        response = self.infer(rows)

        def note(answers):
            answers.pids.add(self.check(rows, *tensors(response)))
            answers.factors.append(1)

        return response, note


def images():
    """Return float32 [8, 3, 48, 48], coarse patterns that a network does not take for each other."""
    patterns = np.random.default_rng(0).standard_normal((IMAGES, 3, 4, 4), np.float32)
    return patterns.repeat(12, axis=2).repeat(12, axis=3)


def eager(path, given):
    """Return the network's own answers [8, 10], in float32 on the CPU."""
    with torch.inference_mode():
        expected = runpy.run_path(path)["network"]().eval()(torch.from_numpy(given)).numpy()
    assert nearest_distinct(expected) > 2 * TOLERANCE, "a row that was exchanged must not pass"
    return expected.astype(np.float64)


def tensors(response):
    """Return the outputs `scores` and `who` of a response over HTTP."""
    length = int(response.headers["Inference-Header-Content-Length"])
    outputs = json.loads(response.data[:length])["outputs"]
    assert [each["name"] for each in outputs] == ["scores", "who"]
    middle = length + outputs[0]["parameters"]["binary_data_size"]
    return np.frombuffer(response.data[length:middle], np.float32), np.frombuffer(response.data[middle:], np.int64)


def first_digits(gpu):
    return int(gpu.uuid.removeprefix("GPU-")[:8], 16)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """Two replicas on one node with two GPUs, deployed as a user does."""
    pytest.importorskip("ray", reason="Ray is not installed; pip install 'headrace[ray]'")
    utilities = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", environment()["PYTHONPATH"])  # for the node, whose folder is another
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        head = {"num_cpus": 4, "num_gpus": 2, "include_dashboard": False, "object_store_memory": 80 << 20}
        cluster = utilities.Cluster(initialize_head=True, head_node_args=head)
        try:
            made = OnGpus(tmp_path_factory.mktemp("ray"), cluster.address)
            ended = made.deploy()
            assert ended.code == 0, ended.err
            assert "ready: served, 2 replicas" in ended.err
            yield made
        finally:
            cluster.shutdown()


def test_each_replica_has_a_gpu_of_its_own(served):
    replicas = served.replicas()
    assert {gpu for _, gpu in replicas} == {first_digits(gpu) for gpu in choose_gpus("0,1")}


def test_answers_in_bf16_are_the_eager_models_over_http(served):
    response = served.infer(range(IMAGES))
    assert response.status == 200, response.data
    served.check(range(IMAGES), *tensors(response))


def test_answers_in_bf16_are_the_eager_models_over_grpc(served):
    request = pb.ModelInferRequest(model_name="served")
    request.inputs.add(name="images", datatype="FP32", shape=served.images.shape)
    request.raw_input_contents.append(served.images.tobytes())
    with grpc.insecure_channel(f"127.0.0.1:{served.grpc_port}") as channel:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        answer = infer(request, timeout=WAIT_S)
    scores, who = answer.raw_output_contents
    served.check(range(IMAGES), np.frombuffer(scores, np.float32), np.frombuffer(who, np.int64))


def test_a_replica_that_is_killed_costs_what_it_held_and_comes_back_on_its_gpu(served):
    with served.load(THREADS) as answers:
        answers.wait_until(lambda: len(answers.pids) == 2)
        killed, survivor = sorted(answers.pids)
        os.kill(killed[0], signal.SIGKILL)
        answers.forget()
        answers.wait_until(lambda: len(answers.factors) >= AT_LEAST)
        assert answers.pids - {killed} == {survivor}, "the other one serves on"
        answers.wait_until(lambda: len(answers.pids - {killed}) == 2)
        told, silent = answers.errors, answers.silent
        answers.forget()
        answers.wait_for(AT_LEAST)
    assert not silent, "every request is answered or told"
    assert {status for status, _ in told} <= {500, 503}
    (new,) = answers.pids - {survivor}
    assert new[0] != killed[0]
    assert new[1] == killed[1]
    assert not answers.errors + answers.silent, "nothing is sent to the dead one any more"


def test_a_third_replica_is_refused_with_what_the_node_has_and_the_two_serve_on(served):
    before = served.replicas()
    ended = served.deploy("--replicas", "3")
    assert ended.code == 2
    assert ended.message == (
        "headrace: --replicas 3: each replica takes 1 CPU and 1 GPU, and the cluster has room for 2 (nodes: 4 CPU and"
        " 2 GPU); ask for less, or add nodes"
    )
    assert served.replicas() == before


def test_an_update_without_room_beside_the_old_replicas_is_told_and_they_serve_on(served):
    before = served.replicas()
    ended = served.deploy("--gpus-per-replica", "0.5", "--ready-timeout", "4", "--drain-timeout", "2")
    assert ended.code == 1
    assert "served is not ready after 4 s, and Ray goes on trying" in ended.message
    assert "the version before goes on serving" in ended.message
    assert served.replicas() == before


def test_two_replicas_of_half_a_gpu_share_one_after_an_update_that_takes_old_ones_away_first(served):
    with served.load(THREADS) as answers:
        answers.wait_for(AT_LEAST)
        before = set(answers.pids)
        ended = served.deploy("--gpus-per-replica", "0.5", "--surge-percent", "0")
        answers.forget()
        answers.wait_for(AT_LEAST)
    assert ended.code == 0, ended.err
    assert not answers.errors + answers.silent
    after = served.replicas()
    assert not before & after
    assert len({gpu for _, gpu in after}) == 1
