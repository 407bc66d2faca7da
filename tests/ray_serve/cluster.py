"""A Ray cluster of three nodes on this machine, a model that can be told to fail, and load on it."""

import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import psutil
import urllib3

from tests.commands import run

WAIT_S = 60
MAX_BODY_BYTES = 1 << 20
PAUSE_S = 0.02  # of a sender between requests: replicas that start need the processors too
MODEL = """
import os
import torch

class Model(torch.nn.Module):
    def forward(self, values, ids):
        if (ids == 13).any():
            raise ValueError("thirteen in /srv/models/x.py")
        rows = len(ids)
        return {{
            "scaled": values * {factor},
            "batch": torch.full((rows,), rows),
            "pid": torch.full((rows,), os.getpid()),
        }}

def build():
    return Model()

def example_inputs():
    return {{"values": torch.zeros(2, 3), "ids": torch.zeros(2, 4, dtype=torch.int64)}}
"""
BAD = 'def build():\n    raise ValueError("no weights today")\n'


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@dataclass
class Answers:
    """What requests under load came to: factors by which the answers were scaled, statuses and texts of errors."""

    factors: list[float] = field(default_factory=list)
    errors: list[tuple[int, str]] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)  # neither answered nor told
    pids: set[int] = field(default_factory=set)  # of the replicas that answered
    largest_batch: int = 0
    moved: threading.Condition = field(default_factory=threading.Condition)

    def wait_for(self, more):
        """Return when so many more have ended."""
        before = self.ended
        self.wait_until(lambda: self.ended >= before + more)

    def wait_until(self, happened):
        with self.moved:
            assert self.moved.wait_for(happened, WAIT_S), self

    def forget(self):
        """Begin anew."""
        with self.moved:
            self.factors, self.errors, self.silent, self.pids = [], [], [], set()

    @property
    def ended(self):
        return len(self.factors) + len(self.errors) + len(self.silent)


class Served:
    """The model on the cluster, by its ports."""

    def __init__(self, folder, address):
        self.folder = folder
        self.address = address
        self.http_port, self.grpc_port = free_port(), free_port()
        self.pool = urllib3.PoolManager(maxsize=64, retries=False, timeout=WAIT_S)

    def write(self, factor):
        self.factor = factor
        (self.folder / "served.py").write_text(MODEL.format(factor=factor))

    def deploy(self, file="served.py"):
        """Run the command as a user does: two replicas, few rows, small bodies."""
        return run(
            *("deploy", f"{self.folder}/{file}:build", "--name", "served", "--device", "cpu"),
            *("--ray-address", self.address, "--proxies", "head", "--max-batch-size", "4"),
            *("--replicas", "2", "--max-body-bytes", MAX_BODY_BYTES, "--working-dir", self.folder),
            *("--http-port", self.http_port, "--grpc-port", self.grpc_port),
            cwd=self.folder,
        )

    def call(self, path, body=None, headers=None, method=None):
        url = f"http://127.0.0.1:{self.http_port}{path}"
        method = method or ("POST" if body is not None else "GET")
        return self.pool.request(method, url, body=body, headers=headers)

    def infer(self, ids=(0, 0, 0, 0), values=(1.0, 2.0, 3.0)):
        return self.pool.request(
            "POST",
            f"http://127.0.0.1:{self.http_port}/v2/models/served/infer",
            json={
                "inputs": [
                    {"name": "values", "shape": [1, 3], "datatype": "FP32", "data": list(values)},
                    {"name": "ids", "shape": [1, 4], "datatype": "INT64", "data": list(ids)},
                ]
            },
        )

    @contextmanager
    def load(self, threads=2):
        """Send requests one after the other from several threads, until the block ends."""
        answers, stop = Answers(), threading.Event()

        def send():
            while not stop.wait(PAUSE_S):
                self._one(answers)

        with ThreadPoolExecutor(threads) as pool:
            sending = [pool.submit(send) for _ in range(threads)]
            try:
                yield answers
            finally:
                stop.set()
        for each in sending:
            each.result()

    def ask(self):
        """Send a request; return the response, and what notes a good one in the answers."""
        response = self.infer()

        def note(answers):
            outputs = {each["name"]: each["data"] for each in response.json()["outputs"]}
            answers.factors.append(factor_of(outputs["scaled"]))
            answers.pids.add(outputs["pid"][0])
            answers.largest_batch = max(answers.largest_batch, outputs["batch"][0])

        return response, note

    def _one(self, answers):
        try:
            response, note = self.ask()
            with answers.moved:
                if response.status == 200:
                    note(answers)
                else:
                    answers.errors.append((response.status, response.data.decode()))
                answers.moved.notify_all()
        except urllib3.exceptions.HTTPError as error:
            with answers.moved:
                answers.silent.append(repr(error))
                answers.moved.notify_all()


def factor_of(scaled):
    """Return what 1, 2, 3 was multiplied with; nothing else is an answer."""
    factor = scaled[0]
    np.testing.assert_allclose(scaled, [factor, 2 * factor, 3 * factor])
    return factor


def raylet_pid(node):
    """Return the pid of a node's own process."""
    (raylet,) = node.all_processes["raylet"]
    return raylet.process.pid


def raylet_of(pid):
    """Return the pid of the node's process that a worker belongs to."""
    return next(parent.pid for parent in psutil.Process(pid).parents() if parent.name() == "raylet")
