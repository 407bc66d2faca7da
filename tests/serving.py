"""`headrace serve` in processes of its own, with a model that can be made to fail or to wait."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import psutil

WAIT_S = 60
MODEL = """
import os
import torch

class Model(torch.nn.Module):
    def forward(self, values, ids):
        if (ids == 13).any():
            raise ValueError("thirteen in /srv/models/x.py, http://a/b")
        if (ids == 77).any():  # until somebody opens the other end
            with open(os.environ["GATE"]) as gate:
                gate.read()
        return {"doubled": values * 2, "sum": ids.sum(1)}

def build():
    return Model()

def example_inputs():
    return {"values": torch.zeros(2, 3), "ids": torch.zeros(2, 4, dtype=torch.int64)}
"""


class Server:
    """`headrace serve` in a process of its own. `stop` returns its exit code."""

    def __init__(self, folder, *options, model=MODEL):
        (folder / "served.py").write_text(model)
        self.gate = folder / "gate"
        os.mkfifo(self.gate)
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "headrace", "serve", f"{folder}/served.py:build", "--name", "served"),
                *("--device", "cpu", "--http-port", "0", "--grpc-port", "0", "--max-batch-size", "4", *options),
            ],
            stderr=subprocess.PIPE,
            text=True,
            env=environment() | {"GATE": str(self.gate)},
        )
        ready = self.wait_for("ready: ")
        self.address = re.search(r"http://([\d.:]+)/", ready).group(1)
        self.grpc_address = re.search(r"gRPC on ([\d.:]+)", ready).group(1)
        self._drain = threading.Thread(target=lambda: self.lines.extend(self.process.stderr), daemon=True)

    def wait_for(self, words):
        for line in self.process.stderr:
            self.lines.append(line)
            if words in line:
                return line
        raise AssertionError(f"the server ended: {''.join(self.lines)}")

    def backend(self):
        """Return the backend's process: the one that has torch, and so many threads, loaded."""
        children = psutil.Process(self.process.pid).children()
        return max(children, key=lambda child: child.memory_info().rss)

    def frontend(self):
        """Return the process of the only frontend."""
        backend = self.backend()
        (frontend,) = (
            child
            for child in psutil.Process(self.process.pid).children()
            if child.pid != backend.pid and "spawn_main" in " ".join(child.cmdline())
        )
        return frontend

    def call(self, path, body=None, headers=None, method=None):
        """Return status, headers and body."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        request = urllib.request.Request(
            f"http://{self.address}{path}",
            data,
            headers or {},
            method=method or ("POST" if data is not None else "GET"),
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as response:  # noqa: S310
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def infer(self, ids, values=(0.0, 0.0, 0.0)):
        return self.call("/v2/models/served/infer", infer_body(ids, values))

    def is_ready(self):
        try:
            return self.call("/v2/health/ready")[0] == 200
        except OSError:  # between a frontend's death and the next one
            return False

    def hold(self, pool):
        """Send a request that the model holds until `release`; return its future."""
        return pool.submit(self.infer, [77, 0, 0, 0])

    def release(self):
        with self.gate.open("w"):
            pass

    def drain(self):
        """Read what the server says from now on, so that it can say any amount."""
        if self._drain.ident is None:
            self._drain.start()

    def stop(self, number=signal.SIGTERM):
        self.drain()
        self.process.send_signal(number)
        return self.process.wait(WAIT_S)


def environment():
    """Return ours without the tests' own: the server refuses variables of its prefix that it does not know."""
    return {name: value for name, value in os.environ.items() if not name.startswith("HEADRACE_SOAK_")}


def infer_body(ids, values=(0.0, 0.0, 0.0)):
    return {
        "inputs": [
            {"name": "values", "shape": [1, 3], "datatype": "FP32", "data": list(values)},
            {"name": "ids", "shape": [1, 4], "datatype": "INT64", "data": list(ids)},
        ]
    }
