"""ResNet-18 behind TorchServe: raw bodies, its batching, several workers. Needs Java 17."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import settings

HERE = Path(__file__).parent
LIMIT_BYTES = 256 << 20
TIMEOUT_S = 60


def main() -> None:
    given = settings.from_environment()
    folder = Path(tempfile.mkdtemp())
    scripts = Path(sys.executable).parent
    os.environ["PATH"] = os.pathsep.join([str(scripts), os.environ["PATH"]])  # its workers are "python"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    os.environ |= {"TMPDIR": str(folder), "LOG_LOCATION": str(folder), "METRICS_LOCATION": str(folder)}
    archive = [str(scripts / "torch-model-archiver"), "--model-name", "model", "--version", "1.0"]
    archive += ["--handler", str(HERE / "torchserve_handler.py"), "--export-path", str(folder)]
    subprocess.run(archive, check=True)
    config = folder / "config.properties"
    config.write_text(_config(given))
    command = [str(scripts / "torchserve"), "--start", "--foreground", "--ncs", "--disable-token-auth"]
    command += ["--model-store", str(folder), "--ts-config", str(config), "--models", "model=model.mar"]
    os.execv(command[0], command)  # noqa: S606


def _config(given: settings.Settings) -> str:
    model = {
        "defaultVersion": True,
        "marName": "model.mar",
        "minWorkers": given.workers,
        "maxWorkers": given.workers,
        "batchSize": given.max_batch_size,
        "maxBatchDelay": max(1, round(given.delay_ms)),
        "responseTimeout": TIMEOUT_S,
    }
    lines = {
        "inference_address": f"http://127.0.0.1:{given.port}",
        "management_address": f"http://127.0.0.1:{_free_port()}",
        "metrics_address": f"http://127.0.0.1:{_free_port()}",
        "grpc_inference_port": _free_port(),
        "grpc_management_port": _free_port(),
        "max_request_size": LIMIT_BYTES,
        "max_response_size": LIMIT_BYTES,
        "job_queue_size": 1024,
        "disable_system_metrics": "true",
        "models": json.dumps({"model": {"1.0": model}}),
    }
    return "\n".join(f"{key}={value}" for key, value in lines.items()) + "\n"


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


if __name__ == "__main__":
    main()
